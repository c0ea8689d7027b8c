"""Rows -> per-token numbers of a live base: the probability of each target token, and the KL to the bare base.

A row longer than a window is measured window by window, as training cuts it, and put together again: whole.
Only target positions reach the output head, and logits are never held for more than a batch. The reference is kept as
the hidden states in front of the head (d numbers a token instead of V).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.batch import labels_of, target_count
from ..data.source import Row
from ..data.tokenize import Example, by_row, tokenize, windows
from ..errors import DataError
from ..inference.bank import Bank
from ..models.base import Base
from ..models.forward import BackboneAndHead, BatchBuilder, picked_logits
from ..models.layers import vocabulary
from ..models.losses import kl_of_logits

_MAX_LOGITS = 2**26  # of a batch: 256 MB in float32
_WINDOW = 512  # tokens, if the model has as many positions
_CHUNK = 128  # tokens whose distributions over the vocabulary are in memory at once


@dataclass(frozen=True)
class RowTokens:
    """The n target tokens of one row, on the CPU in float32."""

    log_p: Tensor  # log-probability of each token, nats, (n,)
    greedy: Tensor  # whether the token is the most likely one, (n,)
    mean: Tensor  # mean of log p(v) over v ~ p, nats, (n,)
    std: Tensor  # its standard deviation, (n,)
    closing: Tensor  # whether the token is an end-of-turn marker, (n,)
    text: str  # the completion, for its compressed length

    @property
    def loss(self) -> float:
        """Mean loss over all targets, the end-of-turn marker among them (as TOFU and open-unlearning), nats/token."""
        return -float(self.log_p.double().mean())

    def answer(self, values: Tensor) -> Tensor:
        """Return per-token values without end-of-turn markers; all of them if there is nothing else."""
        return values if bool(self.closing.all()) else values[~self.closing]


@contextmanager
def adapters_off(base: Base) -> Iterator[Base]:
    """Take all adapters off inside a `with` block, and put them back after it."""
    bank = Bank.of(base)
    before = bank.adapters
    try:
        bank.restore({})
        yield base
    finally:
        bank.restore(before)


@torch.no_grad()
def row_tokens(
    base: Base, rows: Sequence[Row], *, what: str = "rows", chat_template: bool = True, batch_size: int = 8
) -> list[RowTokens]:
    """Return the numbers of each row's target tokens, with whatever adapters are attached.

    Raises:
        DataError: see `data.tokenize`, as for `what` and `chat_template`.
    """
    whole, unclosed = (
        tokenize(rows, base.tokenizer, max_length=None, what=what, chat_template=chat_template, closing=closing)
        for closing in (True, False)
    )
    examples = _windows(base, whole)
    columns: list[list[Tensor]] = [[], [], [], []]
    for _, batch, logits in _batches(base, examples, batch_size):
        labels = torch.tensor(labels_of(batch), device=logits.device)
        chunks = [_of_logits(logits[i : i + _CHUNK], labels[i : i + _CHUNK]) for i in range(0, len(labels), _CHUNK)]
        for column, values in zip(columns, zip(*chunks, strict=True), strict=True):
            column.extend(_split(torch.cat(values), batch))
    result = []
    per_row = zip(whole, unclosed, *(_joined(column, examples) for column in columns), strict=True)
    for example, bare, log_p, greedy, mean, std in per_row:
        closing = [not b for a, b in zip(example.is_target, bare.is_target, strict=True) if a]
        text = base.tokenizer.decode(labels_of([bare]), skip_special_tokens=True)
        result.append(RowTokens(log_p, greedy, mean, std, torch.tensor(closing, dtype=torch.bool), text))
    return result


@dataclass(frozen=True)
class BaseReference:
    """What the bare base predicts for some rows: its hidden states in front of the head, one (n, d) tensor a row.

    Its logits, V numbers a token, are never kept: they are computed again from the states, or, of a model of which
    that does not give the same (`again`), by the base itself with the adapters switched off meanwhile.
    """

    rows: list[Tensor]
    again: bool
    said: list[set[str]] = field(default_factory=list)  # facts in its greedy answers, where these are compared
    gold: list[set[str]] = field(default_factory=list)  # facts in the rows' own answers


@torch.no_grad()
def keep_reference(
    base: Base, rows: Sequence[Row], *, what: str = "rows", chat_template: bool = True, batch_size: int = 8
) -> BaseReference:
    """Return what the bare base predicts at the targets of `rows`; adapters are off meanwhile."""
    whole = tokenize(rows, base.tokenizer, max_length=None, what=what, chat_template=chat_template)
    examples = _windows(base, whole)
    again = False
    reference: list[Tensor] = []
    with adapters_off(base):
        seen: list[Tensor] = []
        for _, batch, logits in _batches(base, examples, batch_size, seen.append):
            states = seen.pop()
            again = again or (not reference and not _same(base, states, logits))
            reference.extend(v.clone() for v in _split(states.cpu(), batch))
    return BaseReference(_joined(reference, examples), again)


@torch.no_grad()
def kl_to_reference(
    base: Base,
    rows: Sequence[Row],
    reference: BaseReference,
    *,
    what: str = "rows",
    chat_template: bool = True,
    batch_size: int = 8,
) -> list[Tensor]:
    """Return KL(current || bare base) at each target token, nats, one (n,) tensor a row, over the whole vocabulary.

    Raises:
        DataError: if the reference was made of other rows, or in another way.
    """
    whole = tokenize(rows, base.tokenizer, max_length=None, what=what, chat_template=chat_template)
    examples = _windows(base, whole)
    if [len(states) for states in reference.rows] != [target_count(example) for example in whole]:
        raise DataError(f"the reference was not made of these {len(rows)} rows of the {what} set: make it again")
    before = [part for row, own in zip(reference.rows, by_row(examples), strict=True) for part in _split(row, own)]
    result: list[Tensor] = []
    for start, batch, logits in _batches(base, examples, batch_size):
        with adapters_off(base):
            if reference.again:
                ((_, _, of_base),) = _batches(base, batch, len(batch))
            else:
                of_base = _behind(base, torch.cat(before[start : start + len(batch)]).to(logits.device))
        parts = (slice(i, i + _CHUNK) for i in range(0, len(logits), _CHUNK))
        values = [kl_of_logits(logits[part], of_base[part]) for part in parts]
        result.extend(_split(torch.cat(values).cpu(), batch))
    return _joined(result, examples)


def _behind(base: Base, states: Tensor) -> Tensor:
    """Return the logits (n, V) of hidden states in front of the head (n, d): the head's, and what a model does to them.

    `forward` passes by the hooks through which an adapter on the head works.
    """
    parts = BackboneAndHead(base.model)
    return parts.logits(states, parts.head.forward(states[None])[0])


def _same(base: Base, states: Tensor, logits: Tensor) -> bool:
    try:
        return torch.allclose(_behind(base, states), logits, rtol=1e-4, atol=1e-4)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # a model that is not in two such parts
        return False


def _windows(base: Base, rows: Sequence[Example]) -> list[Example]:
    return [window for row in rows for window in windows(row, base.window(_WINDOW))]


def _joined(values: Sequence[Tensor], examples: Sequence[Example]) -> list[Tensor]:
    """Return one tensor a row from one for each of its windows."""
    parts = iter(values)
    return [torch.cat([next(parts) for _ in own]) for own in by_row(examples)]


def _split(values: Tensor, examples: Sequence[Example]) -> tuple[Tensor, ...]:
    return torch.split(values, [target_count(example) for example in examples])


def _of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return the first four fields of `RowTokens` from logits (N, V)."""
    log_q = torch.log_softmax(logits.float(), dim=-1)  # (N, V)
    log_p = log_q.gather(-1, labels[:, None])[:, 0]
    q = log_q.exp()
    mean = (q * log_q).sum(-1)
    variance = (q * (log_q - mean[:, None]).square()).sum(-1)
    values = (log_p, log_q.argmax(-1) == labels, mean, variance.sqrt())
    return tuple(value.cpu() for value in values)


def _batches(
    base: Base, examples: Sequence[Example], batch_size: int, watch: Callable[[Tensor], None] | None = None
) -> Iterator[tuple[int, list[Example], Tensor]]:
    """Yield the start of each batch, its examples, and the logits at their targets, (N, V)."""
    head = base.model.get_output_embeddings()
    max_targets = max(_MAX_LOGITS // vocabulary(base.model), 1)
    builder = BatchBuilder(base.model, head, base.pad_id)
    start = 0
    while start < len(examples):
        stop, targets = start, 0
        while stop < min(start + batch_size, len(examples)):
            targets += target_count(examples[stop])
            if stop > start and targets > max_targets:
                break
            stop += 1
        batch = list(examples[start:stop])
        yield start, batch, picked_logits(base.model, head, builder.batch(batch), watch)
        start = stop
