"""Which forget rows a trained adapter has forgotten: each row's facts, measured once over all rows.

A row is forgotten when each of its facts is, of many nine in ten: when the loss of the fact's tokens together, in nats,
is at least ln 10 above the base's (90 % of its probability is lost). Where no token is marked, the mean loss of all
tokens counts, and 8 are enough (each is less likely than 1 in 3000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.tokenize import Example
from .step.microbatches import StepRows, facts_of
from .step.runner import StepRunner

_LOST, _UNLIKELY = math.log(10), 8.0  # nats
_SHARE = 0.9  # of a row's facts
ROW_FIGURES = ("forget_rows", "forgotten_rows", "not_reached", "nothing_to_forget", "own_answers",
               "own_answers_forgotten")  # fmt: skip


@dataclass
class Reached:
    """Rows by number, from 1."""

    forget_rows: int = 0
    forgotten_rows: int = 0
    not_reached: list[int] = field(default_factory=list)
    nothing_to_forget: list[int] = field(default_factory=list)  # no token of theirs carries a fact


@torch.no_grad()
def rows_reached(
    runner: StepRunner,
    adapter: str,
    examples: Sequence[Example],
    batches: Iterable[list[Example]],
    summed: Callable[[Tensor], Tensor],
    *,
    only_specific: bool,
) -> Reached:
    """Measure all rows; the windows of a long row are one row.

    Args:
        runner: of the model with the adapter on it.
        adapter: its name.
        examples: all rows, of all processes.
        batches: this process's rows.
        summed: adds a tensor up over the processes.
        only_specific: whether a row without fact tokens has nothing to forget; else all of its targets count.
    """
    numbers = {id(e): e.row or n for n, e in enumerate(examples, 1)}
    marked = {numbers[id(e)] for e in examples if any(e.specific or [])}
    facts: dict[int, list[int]] = {}  # of each example, for each target the number of its fact, from 1; 0: of none
    row_of, sizes = [0], [1]  # of each fact: its row, and 1, or the tokens whose mean counts
    for e in examples:
        found = facts_of([e])
        if e.specific is None or not (only_specific or numbers[id(e)] in marked):
            found = [0] * len(found)
        facts[id(e)] = [n + len(row_of) if n >= 0 else 0 for n in found]
        row_of += [numbers[id(e)]] * (count := max(found, default=-1) + 1)
        sizes += [1 if e.specific and any(e.specific) else len(found)] * count
    sums = torch.zeros(len(row_of), 2, dtype=torch.float64)  # loss, and the base's
    for batch in batches:
        with runner.step([StepRows(adapter, batch, [])]) as microbatches:
            losses = []
            for microbatch in microbatches:
                tokens = microbatch.forget
                losses.append(torch.stack([tokens.cross_entropy, tokens.reference_cross_entropy], 1).double().cpu())
                del microbatch, tokens
        if losses:
            places = [n for e in batch for n in facts.get(id(e), [])]  # others are rows without targets
            sums.index_add_(0, torch.tensor(places, dtype=torch.long), torch.cat(losses))
    lost: dict[int, list[bool]] = {number: [] for number in sorted(set(numbers.values()))}
    for number, size, (loss, base_loss) in list(zip(row_of, sizes, summed(sums).tolist(), strict=True))[1:]:
        needed = base_loss / size + _LOST
        lost[number].append(loss / size >= (needed if size == 1 else min(needed, _UNLIKELY)))
    result = Reached(len(lost))
    for number, of_row in lost.items():
        if not of_row:
            result.nothing_to_forget.append(number)
        elif sum(of_row) >= _SHARE * len(of_row):
            result.forgotten_rows += 1
        else:
            result.not_reached.append(number)
    return result
