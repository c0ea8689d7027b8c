"""Metrics of the user's own, beside those of a suite: any function from a live base and rows to figures.

Names from the command line or functions from Python come in; checked `Score`s go out to the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..data.source import Row
from ..errors import UnlearnError
from ..models.base import Base
from ..recipe.plugins import load_function
from .score import Score

Metric = Callable[[Base, Mapping[str, list[Row]]], Score | Sequence[Score]]
"""Measures a base in the state that it is in on rows by set, and leaves it so; the same again gives the same."""


def find_metrics(names: Iterable[str]) -> list[Metric]:
    """Return the functions that `module:function` or `file.py:function` lead to.

    Raises:
        UnlearnError: if a path leads to no function.
    """
    return [load_function(name, "metric") for name in names]


def own_scores(
    metrics: Sequence[Metric], base: Base, rows: Mapping[str, list[Row]], taken: Iterable[str]
) -> list[Score]:
    """Return what metrics measure on a base in the state that it is in.

    Args:
        metrics: functions.
        base: with adapters, or without.
        rows: checked rows by set; a set that nobody named is missing.
        taken: names of figures that are there already.

    Raises:
        UnlearnError: if a metric returns something else than scores, or a name that is taken.
    """
    seen, scores = set(taken), []
    for metric in metrics:
        found = metric(base, rows)
        for one in [found] if isinstance(found, Score) else list(found):
            name = getattr(metric, "__name__", repr(metric))
            if not isinstance(one, Score):
                raise UnlearnError(f"the metric '{name}' returned {type(one).__name__}, expected a Score or some")
            if one.name in seen:
                raise UnlearnError(f"the metric '{name}' calls its figure '{one.name}', and there is one: rename it")
            seen.add(one.name)
            scores.append(one)
    return scores
