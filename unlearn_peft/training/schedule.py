"""A run's length, a step's rows and its learning rate: functions of recipe, row count and step alone.

So a resumed run has the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from ..recipe.schema import Recipe

T = TypeVar("T")
_STEPS, _BATCH = 45, 8  # of a small forget set
_MAX_BATCH = 32  # a larger one grows to that first, then the run gets longer
_MAX_STEPS = 3000  # beyond that a recipe must say so itself


class Length(NamedTuple):
    """How long a run is, and how many forget rows a step has."""

    steps: int
    forget_batch: int
    needed: int  # steps for the recipe's `visits` of each row: more than `steps` where these are capped or set


def length_of(recipe: Recipe, rows: int) -> Length:
    """Return the length of a run over so many forget rows, the base's own answers among them."""
    visits, batch = recipe.visits * rows, recipe.forget_batch or _BATCH
    if recipe.steps is None and recipe.forget_batch is None:
        batch = min(max(batch, math.ceil(visits / _STEPS)), _MAX_BATCH)
    needed = math.ceil(visits / min(batch, rows))
    return Length(recipe.steps or min(max(needed, _STEPS), _MAX_STEPS), batch, needed)


def balanced(rows: Sequence[T], own_answers: Sequence[T]) -> list[T]:
    """Return both, the user's rows as often as makes them about half, or more: the base's answers drown none of them.

    The base may have said one fact in forty answers and another in none.
    """
    return [*rows] * max(len(own_answers) // max(len(rows), 1), 1) + [*own_answers]


class Schedule:
    """Which of `rows` rows are in a step's batch."""

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed = rows, min(batch, rows), seed
        self._orders: dict[int, list[int]] = {}  # of the newest epochs: a large set's is not drawn at each step

    def at(self, step: int) -> list[int]:
        """Return the row numbers of `step` (from 0); each row comes once before any comes again."""
        first = step * self.batch
        places = [divmod(i, self.rows) for i in range(first, first + self.batch)]
        epochs = {epoch for epoch, _ in places}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        return [self._orders[epoch][place] for epoch, place in places]

    def never(self, steps: int) -> set[int]:
        """Return the rows that are in none of so many steps."""
        return set(self._order(0)[steps * self.batch :])

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.rows, generator=generator).tolist()


def rate(step: int, recipe: Recipe, steps: int) -> float:
    """Return the learning rate's factor at `step` (from 0) of `steps`: linear warm-up, then the recipe's schedule."""
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(steps - recipe.warmup_steps, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[recipe.schedule]
