"""The suites by name: which figures each has beside those of the quick one.

Light to import, so that the command line can name them. Another suite is a member and a branch in both functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from ...errors import DataError

if TYPE_CHECKING:
    from ...data.source import Row
    from ...models.base import Base
    from ..score import Array, Score
    from .rwku import Answered


class Suite(str, Enum):
    """Which figures are measured."""

    QUICK = "quick"
    FULL = "full"
    TOFU = "tofu"
    RWKU = "rwku"


def check(suite: Suite, rows: Mapping[str, list[Row]]) -> None:
    """Refuse rows that the suite cannot use, before minutes of measuring.

    Raises:
        DataError: if there are rows that it has no use for, or none that it needs; see also `full.check`, `tofu.check`.
        UnlearnError: if the extra `eval` is not installed.
    """
    from ..score import extra
    from . import full, tofu

    extra("rouge_score.rouge_scorer")
    if suite is Suite.QUICK and rows.get("holdout"):
        raise DataError("the quick suite has no use for held-out rows: choose --suite full, or leave them out")
    if (suite is Suite.RWKU) != bool(rows.get("rwku")):
        raise DataError("--suite rwku and --rwku FILE go together: the suite measures the questions of that file")
    if suite is Suite.FULL:
        full.check(rows)
    if suite is Suite.TOFU:
        tofu.check(rows)


def beside_quick(
    suite: Suite,
    base: Base,
    rows: Mapping[str, list[Row]],
    retrained: Array | None = None,
    answered: Answered | None = None,
    **options: Any,
) -> list[Score]:
    """Return the suite's further figures of a base in the state that it is in; for the arguments see its module."""
    from . import full, rwku, tofu

    if suite is Suite.FULL:
        return full.measure(base, rows, **options)
    if suite is Suite.TOFU:
        return tofu.measure_tofu(base, rows, retrained, forget_answers=False, **options).scores
    if suite is Suite.RWKU:
        options.pop("batch_size", None)  # nothing is scored
        return rwku.measure(base, rows["rwku"], answered, **options)
    return []
