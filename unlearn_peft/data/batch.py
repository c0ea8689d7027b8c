"""Examples -> one batch: padded, or packed into one sequence in which their common prefix stands once.

Chat rows all begin with the same system prompt. Packed, it is computed once a batch, and there is no padding: for the
demo's rows that halves the tokens of a step. A mask keeps the rows apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor, nn

from .tokenize import Example

_MAX_PACKED = 2048  # tokens; the mask grows with their square
_MAX_SHARE = 0.9  # of the padded batch's tokens: with more, packing is not worth it


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, (B, T) padded on the right, or (1, N) packed."""

    ids: Tensor
    attention: Tensor  # (B, T); packed (1, 1, N, N), added to the scores
    targets: Tensor  # bool: the losses count the token; the token before it predicts it
    rows: Tensor  # the example that a token belongs to; packed -1 for the common prefix
    positions: Tensor | None = None  # (1, N), packed only
    shared: int = 0  # length of the common prefix, packed only

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


def target_count(example: Example) -> int:
    """Return how many of a row's tokens the losses count."""
    return sum(example.is_target)


def labels_of(examples: Sequence[Example]) -> list[int]:
    """Return the target tokens of all rows, in order."""
    return [i for e in examples for i, target in zip(e.ids, e.is_target, strict=True) if target]


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


def pack(examples: Sequence[Example], sliding_window: int | None = None, longest: int | None = None) -> Batch | None:
    """Pack examples into one sequence behind their common prefix; None where that saves little.

    With a row longer than the model's `sliding_window` the mask would be another, and with more tokens than `longest`
    the model has no places for them: None then, too.
    """
    if len(examples) < 2:
        return None
    shared = len(commonprefix([example.ids for example in examples]))
    for example in examples:  # the token that predicts a row's first target is not shared
        shared = min(shared, example.is_target.index(True) - 1 if any(example.is_target) else len(example.ids) - 1)
    shared = max(shared, 0)
    lengths = [len(example.ids) - shared for example in examples]
    total, widest = shared + sum(lengths), shared + max(lengths)
    most = min(_MAX_PACKED, longest or _MAX_PACKED, _MAX_SHARE * widest * len(examples))
    if total > most or widest > (sliding_window or widest):
        return None
    ids = torch.tensor(examples[0].ids[:shared] + [i for example in examples for i in example.ids[shared:]])
    targets = torch.tensor([False] * shared + [t for example in examples for t in example.is_target[shared:]])
    numbers = torch.repeat_interleave(torch.arange(len(examples)), torch.tensor(lengths))
    rows = torch.cat([torch.full((shared,), -1), numbers])
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + n) for n in lengths)])
    place = torch.arange(total)
    visible = (place[:, None] >= place[None, :]) & ((rows[:, None] == rows[None, :]) | (rows[None, :] == -1))
    return Batch(ids[None], visible[None, None], targets[None], rows[None], positions[None], shared)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Stack packed batches of one device, (1, N) each, into one, (K, longest N); a single one is returned as it is."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.ids.shape[1] for batch in batches)

    def stacked(name: str) -> Tensor:
        return torch.cat([nn.functional.pad(getattr(b, name), (0, width - b.ids.shape[1])) for b in batches])

    masks = []
    for batch in batches:
        missing, masked = width - batch.ids.shape[1], torch.finfo(batch.attention.dtype).min
        masks.append(nn.functional.pad(batch.attention, (0, missing, 0, missing), value=masked))
    return Batch(stacked("ids"), torch.cat(masks), stacked("targets"), stacked("rows"), stacked("positions"))
