"""The frozen trunk below the first adapted layer: while a batch runs, kept states stand in for those layers.

An adapter on the upper layers never changes what the layers below it give. Their output is kept for each row (by the
engine, in its cache); here it is laid out for a batch and put in their place: all layers pass on what they get, the
last gives the kept states. Masks, positions and rotary embeddings are the model's own, as it makes them for the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .data.batch import Batch
from .models.layers import giving, standing_in


class Trunk:
    """The lowest layers of a model, which no adapter touches."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    def standing_in(self, states: Tensor) -> AbstractContextManager[None]:
        """Let `states` (B, T, d) be what the last of the layers gives, inside a `with` block."""

        def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

        return standing_in({**dict.fromkeys(self.layers, pass_on), self.layers[-1]: giving(states)})


def rows_apart(states: Tensor, batch: Batch, lengths: Sequence[int]) -> list[Tensor]:
    """Cut a batch's states (B, T, d) into those of its rows, (length, d) each."""
    if batch.positions is None:
        return [row[:length].clone() for row, length in zip(states, lengths, strict=True)]
    line, first = states[0], batch.shared
    parts = torch.split(line[first:], [length - first for length in lengths])
    return [torch.cat([line[:first], part]) for part in parts]


def laid_out(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    """Lay the states of rows out as the batch lays out their tokens, (B, T, d); the reverse of `rows_apart`."""
    if batch.positions is None:
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return torch.cat([rows[0][: batch.shared], *(states[batch.shared :] for states in rows)])[None]
