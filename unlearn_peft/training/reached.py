"""Which forget rows a trained adapter has forgotten: each row's fact tokens, measured once over all rows.

A row is forgotten when the mean loss of its fact tokens, in nats, is at least ln 10 above the base's (the tokens have
lost 90 % of their probability, as a geometric mean), or at least 7.6 (they are less likely than 1 in 2000; `ga_kl`
holds tokens at 8, a little above or below). A fact of several tokens need rise by no more than two, as in `ga_kl`: it
has lost 99 % of its probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.tokenize import Example
from .step.microbatches import StepRows
from .step.runner import StepRunner
from .tokens import fact_lengths

_LOST, _UNLIKELY = math.log(10), math.log(2000)  # nats
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
    rows = sorted(set(numbers.values()))
    places = {row: n for n, row in enumerate(rows)}
    marked = {numbers[id(e)] for e in examples if any(_specific(e))}
    sums = torch.zeros(len(rows), 3, dtype=torch.float64)  # loss, the loss that is needed, tokens
    for batch in batches:
        with runner.step([StepRows(adapter, batch, [])]) as microbatches:
            losses = []
            for microbatch in microbatches:
                tokens = microbatch.forget
                lengths, counted_as = fact_lengths(tokens)
                now, before = tokens.cross_entropy, tokens.reference_cross_entropy
                needed = before + _LOST * counted_as / lengths
                losses.append(torch.stack([now, needed, torch.ones_like(now)], 1).double().cpu())
                del microbatch, tokens
        place, counted = [], []
        for e in batch:
            row = numbers.get(id(e), 0)  # 0: a row without targets, of a process that has no other
            chosen = _specific(e) if row in marked or only_specific else e.is_target
            place += [places.get(row, 0)] * sum(e.is_target)
            counted += [yes for yes, target in zip(chosen, e.is_target, strict=True) if target]
        if losses:
            picked = torch.tensor(counted, dtype=torch.bool)
            sums.index_add_(0, torch.tensor(place, dtype=torch.long)[picked], torch.cat(losses)[picked])
    if len(rows):
        sums = summed(sums)
    found = Reached(len(rows))
    for row, (loss, needed, count) in zip(rows, sums.tolist(), strict=True):
        if not count:
            found.nothing_to_forget.append(row)
        elif loss >= min(needed, _UNLIKELY * count):
            found.forgotten_rows += 1
        else:
            found.not_reached.append(row)
    return found


def _specific(example: Example) -> list[bool]:
    return example.specific or example.is_target
