"""One forward pass: rows as a batch for a model, its backbone and head, and the positions that reach the head.

Rows come in; logits at their targets, or the hidden states in front of the head, go out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch, collate, pack
from ..data.tokenize import Example
from .layers import patched_forward, returning


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

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return the rows as one batch, on the model's device."""
        packed = None
        if self._packs is not False:
            packed = pack(examples, getattr(self.model.config, "sliding_window", None))
        if packed is not None:
            packed = packed.to(self.device, self.model.dtype)
            if self._packs is None:
                self._packs = self._same_logits(packed, self.padded(examples))
            if self._packs:
                return packed
        return self.padded(examples)

    def padded(self, examples: Sequence[Example]) -> Batch:
        """Return the rows as a padded batch, on the model's device."""
        return collate(examples, self.pad_id).to(self.device)

    @torch.no_grad()
    def _same_logits(self, packed: Batch, padded: Batch) -> bool:
        expected = picked_logits(self.model, self.head, padded)
        try:
            return alike(picked_logits(self.model, self.head, packed), expected)
        except (RuntimeError, TypeError, ValueError, IndexError):  # a model that takes no such mask
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

    def logits(self, states: Tensor, head_outputs: Tensor | None = None) -> Tensor:
        """Return the logits, (n, V), of final hidden states (n, d); `head_outputs`, (n, V): the head's, if known."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[None])
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        head = {} if head_outputs is None else {self.head: returning(head_outputs[None])}
        with patched_forward({self.backbone: returning(output), **head}):
            return self.model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]


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


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether two ways of computing the same logits agree to rounding."""
    if not expected.numel():
        return True
    scale = expected.abs().max().item() or 1.0
    slack = 0.05 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((found - expected).abs().max() <= slack * scale)
