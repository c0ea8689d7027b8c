"""How much longer a step takes the more rows it has: much on a CPU with a small model, hardly on a GPU."""

from __future__ import annotations

import math

_DECAY = 0.998  # of a step's weight with each further one, so that the last few hundred count


class StepTimes:
    """A line through the seconds of the last steps by their rows (least squares, weighted)."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weights, rows, seconds, rows * rows, rows * seconds

    def add(self, rows: int, seconds: float) -> None:
        """Note a step."""
        terms = (1.0, rows, seconds, rows * rows, rows * seconds)
        weight, all_rows, all_seconds, squares, products = map(lambda old, new: _DECAY * old + new, self._sums, terms)
        self._sums = weight, all_rows, all_seconds, squares, products

    def rows_within(self, times: float) -> float | None:
        """Return with how many rows a step takes `times` as long as with one.

        Infinity: with no number of rows. None: not known yet.
        """
        weight, rows, seconds, squares, products = self._sums
        spread = weight * squares - rows * rows
        if weight < 1 or spread < 1e-6 * weight * weight:  # none yet, or all with as many rows
            return None
        slope = (weight * products - rows * seconds) / spread
        of_one = (seconds - slope * rows) / weight + slope
        return 1 + (times - 1) * of_one / slope if slope > 0 and of_one > 0 else math.inf
