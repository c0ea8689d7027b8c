"""A recipe's adapter settings -> a PEFT config, checked against the model; each kind of adapter is a function here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import AdapterError, did_you_mean
from ..models.layers import head_name, linear_layers
from ..recipe.schema import HeadSettings, LoraSettings


def adapter_config(model: Any, settings: LoraSettings | HeadSettings) -> Any:
    """Return the `peft.PeftConfig` that puts an adapter of these settings on `model`.

    Raises:
        AdapterError: if the settings do not fit the model, e.g. a target module that it does not have.
    """
    return KINDS[settings.kind](model, settings)


def lora_config(model: nn.Module, settings: LoraSettings) -> Any:
    """Return the LoRA config for `model`.

    `all-linear` means every linear layer but the head, by default in the upper half of the model: on SmolLM2 that
    forgets as well as all layers at less harm, and the backward pass stops half way. PEFT does not combine it with
    `layers_to_transform`, so with that field it is written out as the names of the layers' linear modules.

    Raises:
        AdapterError: if a target module does not exist (those that do are named), or PEFT refuses a field.
    """
    from peft import LoraConfig

    fields = settings.model_dump(exclude={"kind", "layers"})
    targets = fields.pop("target_modules")
    available = linear_names(model)
    if settings.layers == "upper_half" and targets == "all-linear" and "layers_to_transform" not in fields:
        count = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        fields["layers_to_transform"] = list(range(count // 2, count))
    if isinstance(targets, str) and targets == "all-linear":
        if fields.get("layers_to_transform") is not None:
            targets = available
    else:
        is_pattern = isinstance(targets, str)
        unknown = [name for name in ([targets] if is_pattern else targets) if not _matches(model, name, is_pattern)]
        if unknown:
            raise AdapterError(
                f"unknown target modules: {', '.join(unknown)}{did_you_mean(unknown[0], available)}. "
                f"This base has: {', '.join([*available, head_name(model)])}"
            )
    try:
        return LoraConfig(task_type="CAUSAL_LM", **{**fields, "target_modules": targets})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"PEFT refuses these LoRA settings: {error}") from error


def head_config(model: nn.Module, settings: HeadSettings) -> Any:
    """Return the config of a delta on the output head: low-rank (an ordinary LoRA) or dense (see adapters/dense.py).

    Where the head is tied to the input embeddings, the delta is added to the head's output only, and never to theirs.
    """
    if settings.form == "dense":
        from ..adapters.dense import DenseHeadConfig

        return DenseHeadConfig(task_type="CAUSAL_LM", target_modules=[head_name(model)])
    from peft import LoraConfig

    targets = [head_name(model)]
    return LoraConfig(task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.lora_alpha, target_modules=targets)


def linear_names(model: nn.Module) -> list[str]:
    """Return the last name parts of the model's linear layers but the head, e.g. `q_proj`, in order."""
    head = head_name(model)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model) if name != head))


def _matches(model: nn.Module, target: str, is_pattern: bool) -> bool:
    """Return whether PEFT would find the target: a name or its end, or (a lone string) a regular expression."""
    names = [name for name, _ in model.named_modules()]
    if not is_pattern:
        return any(f".{name}".endswith(f".{target}") for name in names)
    try:
        return any(re.fullmatch(target, name) for name in names)
    except re.error:
        return False


KINDS: dict[str, Callable[[Any, Any], Any]] = {"lora": lora_config, "head": head_config}
