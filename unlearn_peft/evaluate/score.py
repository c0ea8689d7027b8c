"""Per-row numbers -> a `Score`: a figure with its unit, the number of rows behind it, and a bootstrap interval."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError, UnlearnError

Array = NDArray[np.float64]
RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0


@dataclass(frozen=True)
class Score:
    """One measured figure.

    Attributes:
        name: what was measured, on what.
        value: the figure, in `unit`.
        unit: e.g. `nats/token`; `share` is a fraction of 1.
        n: rows behind it (those that the interval draws from); with several sets, all of them together.
        low: lower end of the 95 % percentile bootstrap interval.
        high: upper end.
        higher_is_better: the wanted direction for a model that is to forget the forget set and nothing else.
    """

    name: str
    value: float
    unit: str
    n: int
    low: float
    high: float
    higher_is_better: bool


def score(
    name: str,
    unit: str,
    higher_is_better: bool,
    *samples: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Score:
    """Return a statistic (by default the mean) of one or more independent samples of rows as a `Score`.

    Each sample holds per-row numbers, (n,) or (n, columns), and is resampled by itself, its rows staying whole.

    Raises:
        DataError: if a sample is empty or holds a number that is not finite.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    for array in arrays:
        if not len(array) or not np.isfinite(array).all():
            why = "no rows" if not len(array) else "numbers that are not finite"
            raise DataError(f"cannot tell {name}: {why}; expected at least one row, each with a finite number")
    low, high = bootstrap(statistic, *arrays, resamples=resamples, seed=seed)
    return Score(name, float(statistic(*arrays)), unit, sum(map(len, arrays)), low, high, higher_is_better)


def bootstrap(
    statistic: Callable[..., Any], *samples: Array, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (Efron 1979) of a statistic of independent samples."""
    generator = np.random.default_rng(seed)
    values = [
        float(statistic(*(sample[generator.integers(len(sample), size=len(sample))] for sample in samples)))
        for _ in range(resamples)
    ]
    low, high = np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def per_token(rows: ArrayLike) -> float:
    """Return the mean over all tokens, from (n, 2) rows of a sum over the row's tokens and their number."""
    sums, counts = np.asarray(rows, dtype=np.float64).sum(0)
    return float(sums / counts)


def sums(values: Sequence[Any]) -> Array:
    """Return what `per_token` takes, from one tensor of per-token numbers a row."""
    return np.array([[float(row.double().sum()), len(row)] for row in values], dtype=np.float64).reshape(-1, 2)


def extra(module: str, name: str = "eval") -> Any:
    """Import a module of an optional extra of this package.

    Raises:
        UnlearnError: if the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnlearnError(
            f"this metric needs {module.partition('.')[0]}, which is not installed: pip install 'unlearn-peft[{name}]'"
        ) from error
