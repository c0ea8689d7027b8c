"""One forward pass: rows as a batch for a model, its backbone and head, and the positions that reach the head.

Rows come in; logits at their targets, or the hidden states in front of the head, go out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch, collate, pack
from ..data.tokenize import Example
from .layers import (
    check_known,
    is_recurrent,
    linear_layers,
    longest_line,
    patched_forward,
    returning,
    shortest_window,
)

logger = logging.getLogger(__name__)
_ROUNDINGS = 2.0  # how far two ways of computing half-precision logits may differ, in units of what rounding does


class BatchBuilder:
    """Makes batches for one model: packed where that is worth it and the model's logits stay the same, else padded.

    Args:
        model: with anything attached.
        head: its output head.
        pad_id: any token id; padding is masked.
        packs: whether the model takes packed rows; None: compared once.
    """

    def __init__(self, model: Any, head: nn.Module, pad_id: int, packs: bool | None = None) -> None:
        self.model, self.head, self.pad_id, self._packs = model, head, pad_id, packs
        self.device = next(model.parameters()).device
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(bare.get_input_embeddings(), "padding_idx", None) == pad_id:
            self.pad_id = int(pad_id == 0)  # the padding token's embedding is zero, where a norm may have no gradient
        self._window, self._longest = shortest_window(bare), longest_line(bare)
        if packs is None and is_recurrent(bare):
            self._packs = False

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return the rows as one batch, on the model's device."""
        packed = None
        if self._packs is not False:
            self._check(examples)
            packed = pack(examples, self._window, self._longest)
        if packed is not None:
            packed = packed.to(self.device, self.model.dtype)
            if self._packs is None:
                self._packs = self._same_logits(packed, self.padded(examples))
            if self._packs:
                return packed
        return self.padded(examples)

    def padded(self, examples: Sequence[Example]) -> Batch:
        """Return the rows as a padded batch, on the model's device."""
        self._check(examples)
        return collate(examples, self.pad_id).to(self.device)

    def _check(self, examples: Sequence[Example]) -> None:
        for example in examples:
            check_known(self.model, example.ids, f"row {example.row} of its set")

    @torch.no_grad()
    def _same_logits(self, packed: Batch, padded: Batch) -> bool:
        def run(batch: Batch) -> Tensor:
            return picked_logits(self.model, self.head, batch)

        if not agrees("packed rows", self.model, lambda: run(packed), lambda: run(padded)):
            return False
        other = replace(packed, ids=torch.where(packed.rows == 0, packed.ids.flip(-1), packed.ids))
        later = packed.rows[predicting(packed)] != 0
        if torch.equal(run(packed)[later], run(other)[later]):  # what is masked adds exactly nothing
            return True
        logger.info("packed rows: in this model a row sees the one before it, so that they are padded")
        return False


class BackboneAndHead:
    """A causal language model in two parts: backbone, up to the final hidden states, and the rest, up to the logits.

    The second part is the model itself with its backbone patched to return given hidden states, so that whatever it
    does to its head's input or output (a scale, a soft cap) happens.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.backbone = model, model.base_model  # transformers' name for all below the head
        self.head = model.get_output_embeddings()

    def states(self, batch: Batch) -> Tensor:
        """Return the final hidden states, (B, T, d)."""
        return self.backbone(**model_inputs(batch)).last_hidden_state  # type: ignore[no-any-return]

    def head_sees_states(self, batch: Batch) -> bool:
        """Return whether the head's input is the backbone's output: some models scale or transform it in between."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            states = self.states(batch)[0, :2]
            self.logits(states)
        finally:
            handle.remove()
        return len(seen) == 1 and torch.equal(seen[0][0], states)

    def logits(self, states: Tensor, head_outputs: Tensor | None = None) -> Tensor:
        """Return the logits, (n, V), of final hidden states (n, d); `head_outputs`, (n, V): the head's, if known."""
        output = _backbone_output(states[None])
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        head = {} if head_outputs is None else {self.head: returning(head_outputs[None])}
        with patched_forward({self.backbone: returning(output), **head}):
            return self.model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]


def _backbone_output(states: Tensor) -> Any:
    """Return final hidden states as a backbone's output; whatever else a model's head looks for in it is None."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Output(last_hidden_state=states)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return a batch as arguments of a transformers model."""
    positions = {} if batch.positions is None else {"position_ids": batch.positions}
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "use_cache": False, **positions}


def picked_logits(
    model: nn.Module, head: nn.Module, batch: Batch, watch: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Return the logits that predict the batch's targets, (N, V), in row order; `watch` gets the hidden states (N, d).

    A hook in front of the output head picks the positions: the head's cost grows with the targets, not with prompts and
    padding, and whatever a model does behind its head still happens.
    """
    picked = predicting(batch)

    def pick(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0][picked]
        if watch is not None:
            watch(hidden)
        return (hidden[None], *inputs[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        return model(**model_inputs(batch)).logits[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()


def predicting(batch: Batch) -> Tensor:
    """Return the positions that predict a target, as a mask like `batch.targets`."""
    picked = torch.zeros_like(batch.targets)
    picked[:, :-1] = batch.targets[:, 1:]
    return picked


@torch.no_grad()
def agrees(what: str, model: Any, shorter: Callable[[], Tensor], exact: Callable[[], Tensor]) -> bool:
    """Return whether a shorter way of computing the same numbers, (N, d), gives those of the exact one.

    If it raises, as a model does that is built another way, it does not; either is told in the log as `what`.
    """
    expected = exact()
    try:
        found = shorter()
    except Exception as error:  # whatever a model raises that is not made for this
        reason = f"raises {type(error).__name__}"
    else:
        off = _off(model, exact) if expected.dtype in (torch.bfloat16, torch.float16) else None
        if found.shape == expected.shape and alike(found, expected, off):
            return True
        reason = "gives other numbers"
    logger.info("%s: this model %s there, so that its rows take the longer, exact way", what, reason)
    return False


def alike(found: Tensor, expected: Tensor, off: Callable[[], Tensor] | None = None) -> bool:
    """Return whether two ways of computing the same numbers, (N, d), agree to rounding.

    In half precision a leak from row to row can be as small as the roundings of all layers together. `off` gives
    `expected` as one more such rounding of each layer would leave it: no token may be further off than that by much.
    """
    if not expected.numel():
        return True
    difference = found.float() - expected.float()
    if off is None:
        return bool(difference.abs().max() <= 1e-3 * (expected.abs().max().item() or 1.0))
    rounded = off().float() - expected.float()
    return bool((difference.norm(dim=-1) <= _ROUNDINGS * rounded.norm(dim=-1).mean()).all())


def _off(model: nn.Module, exact: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with one_rounding_off(model):
            return exact()

    return run


@contextmanager
def one_rounding_off(model: nn.Module) -> Iterator[None]:
    """Let each number that a linear layer gives be off by its last bit, up or down, inside a `with` block."""

    def shift(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        places = torch.arange(output.numel(), device=output.device)
        signs = ((places * 2654435761 >> 13) & 1) * 2 - 1
        return output * (1 + signs.view_as(output) * torch.finfo(output.dtype).eps).to(output.dtype)

    handles = [layer.register_forward_hook(shift) for layer in linear_layers(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Give the head its states in one piece inside a `with` block.

    For a slice, as the last states of several prompts are, PyTorch on a CPU copies the head's weight once for each row:
    of 64 rows of SmolLM2 in bfloat16 3.7 GB, in 300 times the time.
    """
    head = model.get_output_embeddings()
    hook = head and head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        if hook:
            hook.remove()
