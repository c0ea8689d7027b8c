"""Parts of a model: its decoder layers and their outputs, its head, modules by name, and patched forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseModelError, DataError

_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "n_layer", "num_layers")  # names of one figure
_WINDOWS = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size", "local_attention")


def text_config(model: Any) -> Any:
    """Return the part of a model's config that its decoder is made by; in a multimodal model it is a config within."""
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError:  # several would do
        return model.config


def vocabulary(model: Any) -> int:
    """Return how many logits a model gives at a position."""
    head = model.get_output_embeddings()
    size = getattr(getattr(head, "base_layer", head), "out_features", None)
    return int(text_config(model).vocab_size if size is None else size)


def shortest_window(model: Any) -> int | None:
    """Return how far back the most short-sighted layer of a model looks, in tokens; None: to the beginning."""
    sizes = [getattr(text_config(model), name, None) for name in _WINDOWS]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def is_recurrent(model: Any) -> bool:
    """Return whether a config names layers that are no attention: their state would run on from row to row."""
    kinds = getattr(text_config(model), "layer_types", None) or ()
    return any("attention" not in kind or "linear" in kind for kind in map(str, kinds))


def longest_line(model: Any) -> int | None:
    """Return how many tokens a sequence may have where a model keeps a table of its positions; None: it keeps none."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    words = {id(model.get_input_embeddings().weight), *(id(m.weight) for m in linear_layers(model).values())}
    weights = [p for p in model.parameters() if id(p) not in words]
    sizes = {size for table in (*model.buffers(), *weights) for size in (*table.shape[:1], *table.shape[-1:])}
    return limit if any(limit <= size <= limit + 2 for size in sizes) else None  # OPT's has two more


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
    return {n: m for n, m in model.named_modules() if is_transposed(m) or (isinstance(m, nn.Linear) and _is_plain(m))}


@torch.no_grad()
def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a layer gives a tensor (..., out): routers that are made of a linear layer give more."""
    if not type(layer).__module__.startswith("transformers.models.") or layer.weight.shape[0] != layer.out_features:
        return True
    try:
        output = layer(layer.weight.new_zeros(1, 1, layer.in_features))
    except Exception:  # whatever such a layer raises where it is not called as its model calls it
        return False
    return isinstance(output, Tensor) and output.shape == (1, 1, layer.out_features)


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
    config = text_config(model)
    counts = {count for name in _COUNTS if isinstance(count := getattr(config, name, None), int) and count > 0}
    stacks = _outermost([m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) in counts])
    if len(stacks) > 1:  # another part of the model, such as one that sees, has as many
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = bare.get_decoder() if hasattr(bare, "get_decoder") else None
        inside = {id(m) for m in decoder.modules()} if isinstance(decoder, nn.Module) else set()
        stacks = [stack for stack in stacks if id(stack) in inside]
    return list(stacks[0]) if len(stacks) == 1 else []


def _outermost(stacks: list[nn.ModuleList]) -> list[nn.ModuleList]:
    """Leave out lists within another one, such as a layer's experts."""
    within = {id(m) for stack in stacks for m in stack.modules() if m is not stack}
    return [stack for stack in stacks if id(stack) not in within]


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
    """Replace the forward pass of each module inside a `with` block; one that was replaced before comes back."""
    before = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
            if module in before:
                module.forward = before[module]


def returning(output: Any) -> Callable[..., Any]:
    """Return a forward pass that returns `output` for any input."""
    return lambda *_, **__: output


def known_tokens(model: Any) -> int:
    """Return how many tokens the model has embeddings for; its tokenizer may have more."""
    embeddings = model.get_input_embeddings()
    size = getattr(getattr(embeddings, "base_layer", embeddings), "num_embeddings", None)
    return int(text_config(model).vocab_size if size is None else size)


def check_known(model: Any, ids: Sequence[int], name: str) -> None:
    """Check that the model has an embedding for each of these tokens, which `name` says the place of.

    Raises:
        DataError: if it has not.
    """
    if ids and max(ids) >= known_tokens(model):
        raise DataError(
            f"{name} has a token beyond the {known_tokens(model)} that the base has embeddings for: its tokenizer is "
            "another model's, or tokens were added to it without resize_token_embeddings"
        )
