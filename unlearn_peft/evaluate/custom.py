"""The user's own metrics, beside those of a suite: any function from a live base and rows to `Score`s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..data.source import Row
from ..errors import UnlearnError
from ..models.base import Base
from .score import Score

Metric = Callable[[Base, Mapping[str, list[Row]]], Score | Sequence[Score]]
"""Measures a base in the state that it is in, on rows by set; must leave it so, and give the same again."""


def custom_scores(
    metrics: Sequence[Metric], base: Base, rows: Mapping[str, list[Row]], taken: Iterable[str]
) -> list[Score]:
    """Return what metrics measure on a base in the state that it is in.

    Raises:
        UnlearnError: if a metric returns something else than scores, or gives one a name that is `taken`.
    """
    names, scores = set(taken), []
    for metric in metrics:
        name = getattr(metric, "__name__", repr(metric))
        result = metric(base, rows)
        for score in [result] if isinstance(result, Score) else result:
            if not isinstance(score, Score):
                raise UnlearnError(f"the metric '{name}' returned {type(score).__name__}, expected a Score or several")
            if score.name in names:
                raise UnlearnError(f"the metric '{name}' calls its figure '{score.name}', and there is one: rename it")
            names.add(score.name)
            scores.append(score)
    return scores
