"""How much longer a step takes the more rows it has."""

import math

import pytest

from unlearn_peft.serve.engine.step_times import StepTimes


def test_rows_within_so_many_times_a_row_alone():
    times = StepTimes()
    for n in range(2000):
        rows = 1 + n % 8
        times.add(rows, (0.8 + 0.2 * rows) * (1 + 0.1 * (-1) ** (n // 8)))  # one takes 1
    assert times.rows_within(2.0) == pytest.approx(6, rel=0.05) and times.rows_within(1.0) == 1
    for n in range(4000):
        times.add(1 + n % 8, 1.0)  # since then a step takes as long whatever its rows
    assert times.rows_within(2.0) > 100


@pytest.mark.parametrize("steps", [[], [3] * 50], ids=["none", "all of three"])
def test_it_is_not_known_from_steps_that_are_alike(steps):
    times = StepTimes()
    for rows in steps:
        times.add(rows, 1 / rows)
    assert times.rows_within(2.0) is None


def test_no_number_of_rows_takes_longer():
    times = StepTimes()
    for rows in [8, 1] * 50:
        times.add(rows, 1 / rows)
    assert times.rows_within(2.0) == math.inf
