"""Rows -> one forward pass: side by side with padding, or packed into one line that shares what they begin with.

Chat rows all begin with the same system prompt. Packed, it is computed once for the whole batch instead of once a
row, and there is no padding: for the demo's rows that halves the tokens of a step. A mask keeps the rows apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor, nn

from .tokenize import Example

_MAX_PACKED = 2048  # tokens; the mask grows with their square
_WORTH_IT = 0.9  # of the padded tokens


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, (B, T) padded on the right, or (1, N) packed.

    `targets[b, t]` marks that token t is counted; the token before it, at t - 1, predicts it. `rows` names the
    example that a token belongs to. `attention` is (B, T), or (1, 1, N, N) to be added to the scores.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    rows: Tensor
    positions: Tensor | None = None  # (1, N), packed only
    shared: int = 0  # tokens that all rows begin with, kept once; packed only

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Return the batch on `device`, ready for a model that computes in `dtype`."""
        attention = self.attention
        if attention.dtype == torch.bool:
            attention = torch.zeros(attention.shape, dtype=dtype).masked_fill_(~attention, torch.finfo(dtype).min)
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(
            self.ids.to(device), attention.to(device), self.targets.to(device), self.rows.to(device), positions,
            self.shared,
        )  # fmt: skip


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right to the longest of them."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    attention = torch.zeros(len(examples), width, dtype=torch.long)
    targets = torch.zeros(len(examples), width, dtype=torch.bool)
    for b, example in enumerate(examples):
        n = len(example.ids)
        ids[b, :n] = torch.tensor(example.ids)
        attention[b, :n] = 1
        targets[b, :n] = torch.tensor(example.is_target)
    rows = torch.arange(len(examples))[:, None].expand(-1, width)
    return Batch(ids, attention, targets, rows)


def pack(examples: Sequence[Example], longest: int | None = None) -> Batch | None:
    """Put examples into one line behind the tokens that all of them begin with; None where that saves little.

    Args:
        examples: the rows of the batch.
        longest: the model's sliding window, if it has one; with a row beyond it the mask would be another.
    """
    if len(examples) < 2:
        return None
    shared = len(commonprefix([example.ids for example in examples]))
    for example in examples:  # what predicts a row's first target must be the row's own
        shared = min(shared, example.is_target.index(True) - 1 if any(example.is_target) else len(example.ids) - 1)
    shared = max(shared, 0)
    lengths = [len(example.ids) - shared for example in examples]
    total, widest = shared + sum(lengths), shared + max(lengths)
    if total > min(_MAX_PACKED, _WORTH_IT * widest * len(examples)) or widest > (longest or widest):
        return None
    ids = torch.tensor(examples[0].ids[:shared] + [i for example in examples for i in example.ids[shared:]])
    targets = torch.tensor([False] * shared + [t for example in examples for t in example.is_target[shared:]])
    own = torch.repeat_interleave(torch.arange(len(examples)), torch.tensor(lengths))
    rows = torch.cat([torch.full((shared,), -1), own])  # -1: everyone's
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + n) for n in lengths)])
    line = torch.arange(total)
    visible = (line[:, None] >= line[None, :]) & ((rows[:, None] == rows[None, :]) | (rows[None, :] == -1))
    return Batch(ids[None], visible[None, None], targets[None], rows[None], positions[None], shared)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Put packed batches, (1, N) each, below each other as the lines of one, (K, the longest N).

    Args:
        batches: on one device already, as `Batch.to` gives them; a single one, packed or not, is returned as it is.
    """
    if len(batches) == 1:
        return batches[0]
    width = max(batch.ids.shape[1] for batch in batches)

    def lines(name: str) -> Tensor:
        return torch.cat([nn.functional.pad(getattr(b, name), (0, width - b.ids.shape[1])) for b in batches])

    masks = []
    for batch in batches:
        more = width - batch.ids.shape[1]
        masks.append(
            nn.functional.pad(batch.attention, (0, more, 0, more), value=torch.finfo(batch.attention.dtype).min)
        )
    return Batch(lines("ids"), torch.cat(masks), lines("targets"), lines("rows"), lines("positions"))
