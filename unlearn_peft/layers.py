"""The decoder layers of a model: which of them an adapter changes, and the one whose output an objective sees.

A model comes in; its layers, or one of them, go out to the frozen trunk (`trunk.py`), the engine and the logit lens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .errors import RecipeError


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its dotted name, or None: what `get_submodule` does, but quickly, as a swap needs."""
    found: nn.Module | None = model
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return a model's parameters as `model.parameters()` gives them, but quickly, and a shared one each time."""
    modules, found = [model], []
    for module in modules:  # grows meanwhile
        modules += [child for child in module._modules.values() if child is not None]
        found += [parameter for parameter in module._parameters.values() if parameter is not None]
    return found


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder layers of a model, PEFT's or bare, from the bottom up; empty where it isn't plain which."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    return list(stacks[0]) if len(stacks) == 1 else []


def changed_layers(model: Any, layers: Sequence[nn.Module], adapter: str = "default") -> list[int]:
    """Return the numbers of the layers that have a part of the adapter; all, where the embeddings have one."""
    if _trains(model.get_base_model().get_input_embeddings(), adapter):
        return list(range(len(layers)))
    return [n for n, layer in enumerate(layers) if _trains(layer, adapter)]


def watched_layer(model: Any, number: int | bool | None, adapter: str = "default") -> nn.Module:
    """Return the layer whose output an objective sees.

    Args:
        model: the PEFT model.
        number: counted from 0; None: the middle one of those that the adapter changes.
        adapter: its name on the model.

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
def outputs_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect what a layer gives, (B, T, d), each time that it runs; with None, nothing.

    Whole, and with their gradients: what a hook computes here would be missing when checkpointing runs the layer again.
    """
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let each module run the function given for it instead of its own forward pass."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def giving(output: Any) -> Callable[..., Any]:
    """Return a forward pass that gives `output`, whatever it gets."""
    return lambda *_, **__: output


@contextmanager
def rows_use(model: Any, names: list[str] | None) -> Iterator[None]:
    """Let each row of the next batch run with the adapter of that name (PEFT's `adapter_names`); None: all as set."""
    if names is None:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    def tell(_: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**named, "adapter_names": names}

    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    handles = [module.register_forward_pre_hook(tell, with_kwargs=True) for module in tuned]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trains(module: nn.Module, adapter: str) -> bool:
    return any(p.requires_grad and adapter in name.split(".") for name, p in module.named_parameters())
