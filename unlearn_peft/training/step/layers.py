"""The layers that an adapter changes, and the one that an objective watches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import RecipeError
from ...models.layers import decoder_layers


def changed_layers(model: Any, layers: Sequence[nn.Module], adapter: str = "default") -> list[int]:
    """Return the numbers of the layers that have a part of the adapter; all, where it has one beside them.

    Beside them are the embeddings and what else is below the head's part, such as a projection.
    """
    base = model.get_base_model()
    known = {id(p) for module in (base.get_output_embeddings(), *layers) for p in module.parameters()}
    if any(id(p) not in known for p in _trained(base.base_model, adapter)):
        return list(range(len(layers)))
    return [n for n, layer in enumerate(layers) if _trained(layer, adapter)]


def watched_layer(model: Any, number: int | bool | None, adapter: str = "default") -> nn.Module:
    """Return the layer whose output an objective sees: by number from 0; None: the middle one of those adapted.

    Raises:
        RecipeError: if there is no such layer, or the adapter does not reach it.
    """
    layers = decoder_layers(model)
    if not layers:
        raise RecipeError(
            "this base's decoder layers were not found (expected one list of config.num_hidden_layers modules): "
            "use an objective that needs no hidden states"
        )
    changed, last = changed_layers(model, layers, adapter), len(layers) - 1
    if not changed:
        raise RecipeError(
            f"the objective works on the output of a decoder layer, and the adapter changes none of 0 to {last}: use a "
            "lora adapter on decoder layers (adapter: lora), or another objective"
        )
    if number is None:
        return layers[changed[len(changed) // 2]]
    if isinstance(number, bool) or not isinstance(number, int) or not changed[0] <= number <= last:
        raise RecipeError(
            f"objective.hidden_layer is {number!r}, expected {changed[0]} to {last} or null: the base has layers 0 to "
            f"{last}, and the adapter changes nothing below {changed[0]}. Choose one of these, or adapt lower layers "
            "(adapter.layers: all)"
        )
    return layers[number]


@contextmanager
def adapter_names(model: Any, names: list[str] | None) -> Iterator[None]:
    """Let each row of the next batch run with the adapter of that name (PEFT's `adapter_names`); None: all as set."""
    if names is None:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    def add_names(_: nn.Module, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**keywords, "adapter_names": names}

    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    handles = [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in adapted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trained(module: nn.Module, adapter: str) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if p.requires_grad and adapter in name.split(".")]


def training_mode(model: Any, gradient_checkpointing: bool) -> None:
    """Switch on the adapters' dropout and, if asked, checkpointing; the base's own dropout stays off."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.training = True
    if gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # this module's own flag: what lies inside stays in evaluation mode
