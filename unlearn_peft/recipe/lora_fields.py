"""Which fields of PEFT's `LoraConfig` a recipe may set: those whose adapter adds B A x to a linear layer's output.

Only such adapters are stacked, served and taken off exactly. Any other field keeps PEFT's default, also one that only a
later PEFT has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import did_you_mean, safe_repr

_INITS = ("gaussian", "orthogonal")
LORA_FIELDS: dict[str, tuple[Callable[[Any], bool], str] | None] = {  # None: checked with the base
    **dict.fromkeys(("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
                     "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")),
    "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"),
    "init_lora_weights": (
        lambda value: value is True or value in _INITS,
        f"true, {' or '.join(_INITS)}: others change the base's weights, need data, or do not begin as the base",
    ),
}  # fmt: skip


def lora_problems(fields: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with fields of `LoraConfig`; nothing (null, [], {}) stands for PEFT's default."""
    from peft import LoraConfig

    default, problems = LoraConfig(task_type="CAUSAL_LM"), []
    known = {*LoraConfig.__dataclass_fields__, "kind"}
    for name, value in fields.items():
        expected = LORA_FIELDS.get(name)
        if name not in known:
            problems.append(f"unknown key 'adapter.{name}'{did_you_mean(name, known)}")
        elif value in (None, [], {}) or (name in LORA_FIELDS and (expected is None or expected[0](value))):
            continue
        elif expected is not None:
            problems.append(f"'adapter.{name}' is {safe_repr(value)}, expected {expected[1]}")
        elif value != getattr(default, name):
            problems.append(
                f"'adapter.{name}' is {safe_repr(value)}, expected {getattr(default, name)!r}: a forget adapter only "
                "adds B A x to the outputs of linear layers, so that it can be stacked, served and taken off exactly"
            )
    return problems
