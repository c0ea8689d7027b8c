"""Parts of a model: its decoder layers and their outputs, its head, modules by name, and patched forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import BaseModelError


def head_is_tied(model: Any) -> bool:
    """Return whether `lm_head` and the input embeddings are one tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def head_name(model: nn.Module) -> str:
    """Return the module name of the output head, e.g. `lm_head`.

    Raises:
        BaseModelError: if the model has no output head.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head:
            return str(name)
    raise BaseModelError(f"{type(model).__name__} has no output head: expected a causal language model")


def is_transposed(module: Any) -> bool:
    """Return whether a layer is GPT-2's `Conv1D`, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return all linear layers by name, the output head among them."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)}


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its dotted name, or None; faster than `get_submodule`, for swaps of adapters."""
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return a model's parameters; faster than `model.parameters()`, and a shared one is there several times."""
    modules, result = [model], []
    for module in modules:  # grows meanwhile
        modules += [child for child in module._modules.values() if child is not None]
        result += [parameter for parameter in module._parameters.values() if parameter is not None]
    return result


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder layers of a model (bare or PEFT's), lowest first; empty where that is ambiguous."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    return list(stacks[0]) if len(stacks) == 1 else []


@contextmanager
def outputs_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect a layer's output, (B, T, d), each time that it runs; with None, nothing.

    As it is, with gradients: anything that the hook computed would be missing when checkpointing runs the layer again.
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
def patched_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward pass of each module inside a `with` block."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def returning(output: Any) -> Callable[..., Any]:
    """Return a forward pass that returns `output` for any input."""
    return lambda *_, **__: output
