"""A step's rows and learning rate: functions of recipe and step alone, so that a resumed run has the same."""

from __future__ import annotations

import math

import torch

from ..recipe.schema import Recipe


class Schedule:
    """Which of `rows` rows are in a step's batch."""

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed = rows, min(batch, rows), seed

    def at(self, step: int) -> list[int]:
        """Return the row numbers of `step` (from 0); each row comes once before any comes again."""
        first = step * self.batch
        places = [divmod(i, self.rows) for i in range(first, first + self.batch)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [orders[epoch][place] for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.rows, generator=generator).tolist()


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate's factor at `step` (from 0): linear warm-up, then the recipe's schedule."""
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[recipe.schedule]
