"""Per-row numbers from a live base: what it gives each target token, and how far it is from the bare base.

Rows come in; per-token tensors, one set a row, go out to the metrics. Only target positions reach the output head,
and logits are never held for more than a batch. The reference is kept as the hidden states in front of the head
(d numbers a token instead of V), taken with all adapters off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.source import Row
from ..data.tokenize import Example, tokenize
from ..errors import DataError
from ..inference.bank import Bank
from ..models.base import Base
from ..models.forward import BatchBuilder, picked_logits

_MAX_LOGITS = 2**26  # of a batch: 256 MB in float32
_CHUNK = 128  # tokens whose distributions are worked on at once


@dataclass(frozen=True)
class RowTokens:
    """The n target tokens of one row, on the CPU in float32.

    Attributes:
        log_p: log-probability of each token, nats, (n,).
        greedy: whether the token is the most likely one, (n,).
        mean: mean of log p(v) over v ~ p, nats, (n,).
        std: its standard deviation, (n,).
        closing: whether the token is an end-of-turn marker, (n,).
        text: the completion as text, for its compressed length.
    """

    log_p: Tensor
    greedy: Tensor
    mean: Tensor
    std: Tensor
    closing: Tensor
    text: str

    @property
    def loss(self) -> float:
        """Mean loss over all targets, the end-of-turn marker among them (as TOFU and open-unlearning), nats/token."""
        return -float(self.log_p.double().mean())

    def answer(self, values: Tensor) -> Tensor:
        """Return per-token values without end-of-turn markers; all of them if there is nothing else."""
        return values if bool(self.closing.all()) else values[~self.closing]


def questions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return prompt and answer of each row that is one question and its answer.

    Other rows (text, dialogues) are left out, which the n of a score tells.
    """
    found = []
    for row in rows:
        if {"prompt", "completion"} <= row.keys():
            found.append((row["prompt"], row["completion"]))
        elif [message["role"] for message in row.get("messages", [])] == ["user", "assistant"]:
            found.append((row["messages"][0]["content"], row["messages"][1]["content"]))
    return found


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
    base: Base,
    rows: Sequence[Row],
    *,
    what: str = "rows",
    chat_template: bool = True,
    batch_size: int = 8,
    max_length: int = 512,
) -> list[RowTokens]:
    """Return what the base, with whatever is attached, gives the target tokens of each row.

    Raises:
        DataError: see `data.tokenize`.
    """
    common = dict(max_length=max_length, chat_template=chat_template, what=what)
    examples = tokenize(rows, base.tokenizer, **common)  # type: ignore[arg-type]
    bare = tokenize(rows, base.tokenizer, closing=False, **common)  # type: ignore[arg-type]
    result = []
    for start, batch, logits in _batches(base, examples, batch_size):
        labels = torch.tensor(_labels(batch), device=logits.device)
        parts = [_of_logits(logits[i : i + _CHUNK], labels[i : i + _CHUNK]) for i in range(0, len(labels), _CHUNK)]
        log_p, greedy, mean, std = (torch.cat(column) for column in zip(*parts, strict=True))
        at = 0
        for n, example in enumerate(batch):
            own = slice(at, at + sum(example.is_target))
            at = own.stop
            closing = [not b for a, b in zip(example.is_target, bare[start + n].is_target, strict=True) if a]
            ids = [i for i, target in zip(example.ids, bare[start + n].is_target, strict=True) if target]
            text = base.tokenizer.decode(ids, skip_special_tokens=True)
            result.append(
                RowTokens(log_p[own], greedy[own], mean[own], std[own], torch.tensor(closing, dtype=torch.bool), text)
            )
    return result


@dataclass(frozen=True)
class BaseReference:
    """The bare base's predictions for some rows, one tensor a row.

    Hidden states in front of the head (n, d), or where a model does more behind its head (scaling, capping),
    logits (n, V).
    """

    rows: list[Tensor]
    hidden: bool
    texts: list[str] = field(default_factory=list)  # its greedy answers to the rows' questions, where they were asked


@torch.no_grad()
def keep_reference(
    base: Base, rows: Sequence[Row], *, what: str = "rows", chat_template: bool = True, batch_size: int = 8
) -> BaseReference:
    """Remember what the bare base predicts at the targets of `rows`; adapters are off meanwhile."""
    examples = tokenize(rows, base.tokenizer, what=what, chat_template=chat_template)
    head = base.model.get_output_embeddings()
    hidden: bool | None = None
    kept: list[Tensor] = []
    with adapters_off(base):
        seen: list[Tensor] = []
        for _, batch, logits in _batches(base, examples, batch_size, seen):
            states = seen.pop()
            if hidden is None:
                hidden = torch.allclose(head.forward(states[None])[0], logits, rtol=1e-4, atol=1e-4)
            values = states if hidden else logits
            kept.extend(v.clone() for v in torch.split(values.cpu(), [sum(e.is_target) for e in batch]))
    return BaseReference(kept, bool(hidden))


@torch.no_grad()
def kl_to_reference(
    base: Base,
    rows: Sequence[Row],
    kept: BaseReference,
    *,
    what: str = "rows",
    chat_template: bool = True,
    batch_size: int = 8,
) -> list[Tensor]:
    """Return KL(current || bare base) at each target token, nats, one (n,) tensor a row, over the whole vocabulary.

    Raises:
        DataError: if `kept` was made of other rows, or in another way.
    """
    examples = tokenize(rows, base.tokenizer, what=what, chat_template=chat_template)
    if [len(states) for states in kept.rows] != [sum(example.is_target) for example in examples]:
        raise DataError(f"the reference was not made of these {len(rows)} rows of the {what} set: make it again")
    head = base.model.get_output_embeddings()
    result: list[Tensor] = []
    for start, batch, logits in _batches(base, examples, batch_size):
        reference = torch.cat(kept.rows[start : start + len(batch)]).to(logits.device)
        values = []
        for i in range(0, len(logits), _CHUNK):
            part = reference[i : i + _CHUNK]
            if kept.hidden:  # `forward` passes by the hooks through which an adapter on the head works
                part = head.forward(part[None])[0]
            values.append(kl(logits[i : i + _CHUNK], part))
        result.extend(torch.split(torch.cat(values).cpu(), [sum(e.is_target) for e in batch]))
    return result


def kl(current: Tensor, reference: Tensor) -> Tensor:
    """Return KL(current || reference) in nats, (N,), from logits (N, V)."""
    p, q = torch.log_softmax(current.float(), dim=-1), torch.log_softmax(reference.float(), dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def _of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    log_q = torch.log_softmax(logits.float(), dim=-1)  # (N, V)
    log_p = log_q.gather(-1, labels[:, None])[:, 0]
    q = log_q.exp()
    mean = (q * log_q).sum(-1)
    variance = (q * (log_q - mean[:, None]).square()).sum(-1)
    values = (log_p, log_q.argmax(-1) == labels, mean, variance.sqrt())
    return tuple(value.cpu() for value in values)


def _batches(
    base: Base, examples: Sequence[Example], batch_size: int, seen: list[Tensor] | None = None
) -> Iterator[tuple[int, list[Example], Tensor]]:
    """Yield where a batch begins, its examples, and the logits at their targets, (N, V)."""
    head = base.model.get_output_embeddings()
    most = max(_MAX_LOGITS // base.model.config.get_text_config().vocab_size, 1)
    laid_out = BatchBuilder(base.model, head, base.tokenizer.pad_token_id)
    start = 0
    while start < len(examples):
        stop, targets = start, 0
        while stop < min(start + batch_size, len(examples)):
            targets += sum(examples[stop].is_target)
            if stop > start and targets > most:
                break
            stop += 1
        batch = list(examples[start:stop])
        watch = None if seen is None else seen.append
        yield start, batch, picked_logits(base.model, head, laid_out.batch(batch), watch)
        start = stop


def _labels(examples: Sequence[Example]) -> list[int]:
    return [i for e in examples for i, target in zip(e.ids, e.is_target, strict=True) if target]
