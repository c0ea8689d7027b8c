"""The names that PEFT and other trainers give to an adapter's tensors -> modules and weights of the base."""

from __future__ import annotations

import re
from typing import NamedTuple

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, checkpointing
_COPIES = ("base_layer", "original_module", "modules_to_save")  # where PEFT puts what it wraps
_PREFIX = re.compile(r"(module\.(?=base_model\.))?(base_model\.model\.)*")  # of DDP, and of PEFT
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(\.[^.]+)?\.weight")  # some save the adapter's name, too
_OTHER_KINDS = (
    ("lora_embedding_", "has a LoRA on embeddings, expected one on a linear layer: use it through PEFT alone"),
    ("lora_magnitude_vector", "has DoRA's magnitudes, expected a plain LoRA: use it through PEFT alone"),
    ("lora_a", "has factors as mlx-lm names them: transpose them, and name them lora_A.weight and lora_B.weight"),
    ("lora_b", "has factors as mlx-lm names them: transpose them, and name them lora_A.weight and lora_B.weight"),
)


class Factor(NamedTuple):
    """Which factor of which module's LoRA a tensor is."""

    module: str
    side: str  # lora_A or lora_B


def factor_of(key: str) -> Factor | None:
    """Return what a tensor's name says, None if it is no factor of a LoRA on a linear layer."""
    found = _FACTOR.fullmatch(base_name(key))
    return Factor(found[1], found[2]) if found else None


def base_name(key: str) -> str:
    """Return a tensor's name without what wrappers of the model put into it."""
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return _PREFIX.sub("", name, count=1)


def is_base_weight(key: str) -> bool:
    """Return whether a tensor may be a copy of a weight of the base, as PEFT saves it beside a LoRA on `lm_head`."""
    *parts, last = key.split(".")
    adapter = any(part.startswith(("lora_", "dense_head_")) for part in parts)
    return bool(parts) and last in ("weight", "bias") and not adapter


def weight_name(key: str) -> str:
    """Return the name in the base of the weight that a tensor is a copy of."""
    parts: list[str] = []
    before = ""
    for part in base_name(key).split("."):
        of_adapter = before == "modules_to_save" and part not in ("weight", "bias")  # its name
        if part not in _COPIES and not of_adapter:
            parts.append(part)
        before = part
    return ".".join(parts)


def why_not_lora(key: str) -> str:
    """Say what a tensor is that is no factor of a LoRA on a linear layer; the same for all of a module's."""
    for kind, why in _OTHER_KINDS:
        module, found, _ = base_name(key).partition("." + kind)
        if found:
            return f"'{module}' {why}"
    return f"tensor '{key}' is no LoRA weight"
