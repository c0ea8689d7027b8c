"""A recipe's adapter settings -> a PEFT config, checked against the model; each kind of adapter is a function here."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import AdapterError, did_you_mean
from ..models.layers import decoder_layers, head_name, linear_layers, text_config
from ..recipe.lora_fields import LORA_FIELDS
from ..recipe.schema import HeadSettings, LoraSettings

logger = logging.getLogger(__name__)
_LAYER_NUMBER = re.compile(r".*\.[^.]*\.(\d+)\.")  # where PEFT sees the number of a module's layer


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
    `layers_to_transform`, so with that field it is written out as the names of the layers' linear modules; in full
    where PEFT would see other numbers, such as those of experts. Weights that are no linear layers (experts that are
    stored as one) are not adapted, which is told in the log.

    Raises:
        AdapterError: if a target module does not exist (those that do are named), or PEFT refuses a field.
    """
    from peft import LoraConfig

    settings_by_name = settings.model_dump()
    fields = {name: settings_by_name[name] for name in LORA_FIELDS if settings_by_name.get(name) is not None}
    targets = _names_or_pattern(model, fields.pop("target_modules"))
    _check_places(model, fields)
    available = linear_names(model)
    layers, kept = decoder_layers(model), [name for name in available if not _refused_by_peft(model, name)]
    if targets == "all-linear" and settings.layers == "upper_half" and "layers_to_transform" not in fields and layers:
        fields["layers_to_transform"] = list(range(len(layers) // 2, len(layers)))
    if isinstance(targets, str) and targets == "all-linear":
        numbers = fields.get("layers_to_transform")
        if numbers is not None or kept != available:
            targets = kept
        if layers and (numbers is not None or text_config(model) is not model.config):
            chosen = layers if numbers is None else [layer for n, layer in enumerate(layers) if n in _listed(numbers)]
            wanted = [name for name in linear_within(model, chosen) if name.rpartition(".")[2] in kept]
            if set(wanted) != _seen_by_peft(model, targets, numbers):
                fields.pop("layers_to_transform", None)
                targets = wanted
        if not targets or not kept:
            raise AdapterError(
                f"{type(model).__name__} has no linear layers that LoRA could adapt in its decoder layers: use an "
                "adapter on the output head (adapter: head)"
            )
        _tell_what_stays(model, [name for name in available if name not in kept])
        if targets == "all-linear":  # by PEFT it would be the experts that are stored as one, too
            targets = [name for name in linear_layers(model) if name != head_name(model)]
    else:
        is_pattern, names = isinstance(targets, str), [targets] if isinstance(targets, str) else targets
        linear = list(linear_layers(model))
        unknown = [name for name in names if not _matches(linear, name, is_pattern)]
        if unknown:
            raise AdapterError(
                f"unknown target modules: {', '.join(unknown)}{did_you_mean(unknown[0], available)}. "
                f"This base has: {', '.join([*available, head_name(model)])}"
            )
        refused = [name for name in available if name not in kept and (is_pattern or name in targets)]
        if any(not is_pattern or re.search(rf"\b{name}\b", names[0]) for name in refused):
            raise AdapterError(
                f"PEFT does not adapt {', '.join(refused)} in this model (it calls experts so that are stored as one, "
                "or the model reads the layer's weight past it): leave them out. This base has, besides: "
                f"{', '.join([*kept, head_name(model)])}"
            )
    try:
        return LoraConfig(task_type="CAUSAL_LM", **{**fields, "target_modules": targets})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"PEFT refuses these LoRA settings: {error}") from error


def _names_or_pattern(model: nn.Module, value: str | list[str]) -> str | list[str]:
    """Return names of modules as a list; PEFT takes a lone string for a regular expression, which matches no such."""
    if not isinstance(value, str) or value == "all-linear" or _matches(list(linear_layers(model)), value, True):
        return value
    return re.split(r"[\s,]+", value.strip())


def _check_places(model: nn.Module, fields: dict[str, Any]) -> None:
    """Refuse what PEFT would pass over: layers that do not exist, and exclusions that exclude nothing.

    Raises:
        AdapterError: naming them.
    """
    if excluded := fields.get("exclude_modules"):
        excluded = fields["exclude_modules"] = _names_or_pattern(model, excluded)
        linear, is_pattern = list(linear_layers(model)), isinstance(excluded, str)
        names = [excluded] if isinstance(excluded, str) else excluded
        if unused := [name for name in names if not _matches(linear, name, is_pattern)]:
            raise AdapterError(
                f"adapter.exclude_modules names {', '.join(map(str, unused))}, which is no linear layer"
                f"{did_you_mean(str(unused[0]), linear_names(model))}. This base has: "
                f"{', '.join([*linear_names(model), head_name(model)])}"
            )
    count, numbers = len(decoder_layers(model)), fields.get("layers_to_transform")
    if numbers is not None and count and "layers_pattern" not in fields:
        if wrong := [n for n in _listed(numbers) if type(n) is not int or not 0 <= n < count]:
            raise AdapterError(
                f"adapter.layers_to_transform names {', '.join(map(repr, wrong))}: this base has layers 0 to "
                f"{count - 1}"
            )


def _listed(numbers: Any) -> list[int]:
    return numbers if isinstance(numbers, list) else [numbers]


def linear_within(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Return the full names of the linear layers of some decoder layers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [name for name, module in linear_layers(model).items() if id(module) in inside]


def _seen_by_peft(model: nn.Module, targets: Any, numbers: Any) -> set[str]:
    """Return which modules PEFT would adapt for these names (or `all-linear`) in the layers of these numbers."""
    head, found = head_name(model), set()
    for name in linear_layers(model) if targets == "all-linear" else dict(model.named_modules()):
        layer = _LAYER_NUMBER.match(name)
        if numbers is not None and (layer is None or int(layer[1]) not in _listed(numbers)):
            continue
        if targets == "all-linear" and name != head or name.rpartition(".")[2] in targets:
            found.add(name)  # also a module that is none but has a linear layer's name
    return found


def _refused_by_peft(model: Any, name: str) -> bool:
    """Return whether PEFT adapts no layer of this name in this model, or takes it for that of experts stored as one."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    config = LoraConfig(target_modules=[name])
    try:
        if check := getattr(tuners_utils, "_check_lora_target_modules_mamba", None):
            check(config, model, name)
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # Mamba reads its weight past the layer; or the name goes together with another
        return True
    except ImportError:  # an earlier PEFT renames nothing
        return False
    return bool(config.target_modules != {name})


def _tell_what_stays(model: nn.Module, left_out: list[str]) -> None:
    """Log what LoRA leaves as it is in decoder layers: experts that are stored as one tensor, and `left_out`."""
    tensors = {name for layer in decoder_layers(model) for name, p in layer.named_parameters() if p.dim() > 2}
    if names := [*sorted(tensors), *left_out]:
        logger.info("Not adapted, for to PEFT they are no linear layers: %s", ", ".join(names))


def head_config(model: nn.Module, settings: HeadSettings) -> Any:
    """Return the config of a delta on the output head: low-rank (an ordinary LoRA) or dense (see adapters/dense.py).

    Where the head is tied to the input embeddings, the delta is added to the head's output only, and never to theirs.
    """
    if settings.form == "dense":
        from ..adapters.dense import DenseHeadConfig

        return DenseHeadConfig(task_type="CAUSAL_LM", target_modules=_head_target(model))
    from peft import LoraConfig

    targets = _head_target(model)
    return LoraConfig(task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.lora_alpha, target_modules=targets)


def _head_target(model: nn.Module) -> list[str] | str:
    """Return the head's name as PEFT finds it alone: in a list a name also stands for all that end with it."""
    head = head_name(model)
    return head if any(name.endswith(f".{head}") for name, _ in model.named_modules()) else [head]


def linear_names(model: nn.Module) -> list[str]:
    """Return the last name parts of the model's linear layers but the head, e.g. `q_proj`, in order."""
    head = head_name(model)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model) if name != head))


def _matches(names: list[str], target: str, is_pattern: bool) -> bool:
    """Return whether PEFT would find the target: a name or its end, or (a lone string) a regular expression."""
    if not is_pattern:
        return any(f".{name}".endswith(f".{target}") for name in names)
    try:
        return any(re.fullmatch(target, name) for name in names)
    except re.error:
        return False


KINDS: dict[str, Callable[[Any, Any], Any]] = {"lora": lora_config, "head": head_config}
