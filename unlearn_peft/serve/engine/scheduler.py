"""Continuous batching over one model, a set of adapters for each row: requests join and leave between two steps.

One worker thread owns the model. Waiting requests are prefilled together, padded on the left; their KV caches are
joined with those of the running batch, rows that end are dropped from it, and padding that all rows share is cut.
No pass runs outside `bank.rows`. There is no prefix cache: keys and values live and die with their request, so they
cannot reach another set.

Why not transformers' own continuous batching (5.23, generation/continuous_batching)? On a CPU it is as fast as
`generate` (SmolLM2, 8 answers of 24 tokens: 2.6 s, 2.7 s), but it packs all rows into one of shape (1, T), and only
private objects know which token is whose, so a row cannot have its own adapters. It samples all rows or none, from one
global source of random numbers, has no logprobs of the likeliest tokens, and shares prefixes between requests by token
ids alone, which would cross sets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...data.prompt import end_tokens
from ...errors import AdapterError
from ...inference.bank import Bank
from ...inference.generate import own_ends
from ...inference.model_runner import KVBatch, ModelRunner
from .base import FormatError, Generation, GenerationError, TextChunk, TokenLogprobs, Unavailable
from .detokenize import TextStream, TokenBytes
from .sampling import Sampler

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ActiveRow:
    """One answer that is generated; the worker's thread calls its functions."""

    request: Generation
    lease: Any  # the row's adapters, for `bank.rows`
    deliver: Callable[[TextChunk | Exception], None]  # gets each chunk, or the error that ended the answer
    done: Callable[[], None]  # called once, when no pass will use `lease` any more
    generated: int = 0  # tokens
    undelivered: int = 0  # tokens that no chunk has counted yet
    cancelled: bool = False
    ended: bool = False
    text: TextStream = field(init=False)  # set when it is submitted

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request)


class Scheduler:
    """Runs rows in one batch of at most `max_batch` until they end; raises what `ModelRunner` raises.

    The tokenizer is the worker's own, since tokenizers don't like to be shared by threads. `prefill_tokens` (padding
    included) may join at once; a longer prompt joins alone.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank, *, max_batch: int = 8, prefill_tokens: int = 2048
    ) -> None:
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        self._runner = ModelRunner(model, bank.rows)
        self.ends = _end_tokens(model, tokenizer)
        self._waiting: deque[ActiveRow] = deque()
        self._rows: list[ActiveRow] = []  # row n of _batch
        self._batch: KVBatch | None = None
        self._wake, self._closed = threading.Condition(), False
        self._worker = threading.Thread(target=self._run, name="unlearn-peft scheduler", daemon=True)
        self._worker.start()

    def submit(self, row: ActiveRow) -> None:
        """Queue a row; if the scheduler is closed, call the row's `done` and raise a GenerationError."""
        row.text = TextStream(self._tokenizer, row.request.ids, row.request.stop)
        with self._wake:
            if not self._closed:
                self._waiting.append(row)
                self._wake.notify()
                return
        row.done()
        raise GenerationError("the server is shutting down")

    def cancel(self, row: ActiveRow) -> None:
        """Drop a row before the next step; it gets no more chunks."""
        with self._wake:
            row.cancelled = True
            self._wake.notify()

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Rows that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._worker.is_alive() and not self._closed

    def close(self) -> None:
        """Stop after the current step; rows that still run or wait end with a GenerationError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._worker.join()

    # what follows runs in the worker's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._rows or self._closed)
                if self._closed:
                    break
                joining = self._next_rows()
            self._guarded(self._rows, self._drop_cancelled)
            if joining:
                self._guarded(joining, self._join)
            if self._rows:
                self._guarded(self._rows, self._step)
        with self._wake:
            unfinished = [*self._rows, *self._waiting]
            self._waiting.clear()
        self._fail(unfinished, GenerationError("the server is shutting down"))
        self._rows, self._batch = [], None

    def _next_rows(self) -> list[ActiveRow]:
        """Take waiting rows, in their order, that fit into the batch and into one prefill."""
        taken: list[ActiveRow] = []
        width = 0
        while self._waiting and len(self._rows) + len(taken) < self.max_batch:
            row = self._waiting[0]
            width = max(width, len(row.request.ids))
            if taken and width * (len(taken) + 1) > self.prefill_tokens:
                break
            self._waiting.popleft()
            if row.cancelled:
                self._end(row)
            else:
                taken.append(row)
        return taken

    def _guarded(self, rows: Sequence[ActiveRow], run: Callable[[Sequence[ActiveRow]], None]) -> None:
        """A failure ends these rows, never the worker; rows that were not part of it go on."""
        try:
            run(rows)
        except Exception as error:
            logger.exception("a pass over %d rows failed; they are refused", len(rows))
            self._remove(rows)
            if isinstance(error, AdapterError):
                self._fail(rows, Unavailable(str(error), error.adapter))
            else:
                message = f"a pass over the model failed ({type(error).__name__}); see the server's log"
                self._fail(rows, GenerationError(message))

    def _join(self, rows: Sequence[ActiveRow]) -> None:
        began = time.monotonic()
        try:
            batch, logits = self._runner.prefill([row.request.ids for row in rows], [row.lease for row in rows])
        finally:
            for row in rows:
                row.request.prefilled((time.monotonic() - began) / len(rows))
        if remaining := self._advance(rows, batch, logits):
            if self._batch is None:
                self._batch = batch
            else:
                self._batch.extend(batch)
            self._rows = [*self._rows, *remaining]

    def _step(self, rows: Sequence[ActiveRow]) -> None:
        assert self._batch is not None
        logits = self._runner.step(self._batch, [row.lease for row in rows])
        self._rows = self._advance(rows, self._batch, logits)
        if not self._rows:
            self._batch = None

    def _advance(self, rows: Sequence[ActiveRow], batch: KVBatch, logits: Tensor) -> list[ActiveRow]:
        """Give each row its next token; returns the rows that go on, the only ones that the batch then holds."""
        has_nan = logits.isnan().any(-1).tolist()  # overflow in one row's adapters is that row's alone
        likeliest = logits.argmax(-1).tolist()
        tokens, remaining = [], []
        for n, row in enumerate(rows):
            if has_nan[n]:
                tokens.append(0)
                self._fail([row], GenerationError("the model gave NaN"))
                continue
            token, logprobs = likeliest[n], None
            if not row.sampler.plain:
                try:
                    token, logprobs = row.sampler.choose(logits[n].cpu(), self._bytes)
                except FormatError as error:  # this row's alone
                    tokens.append(0)
                    self._fail([row], error)
                    continue
            tokens.append(token)
            if not self._push(row, token, logprobs):
                remaining.append(n)
        batch.newest = batch.newest.new_tensor(tokens)[:, None]
        if remaining and len(remaining) < len(rows):
            batch.select(remaining)
        return [rows[n] for n in remaining]

    def _push(self, row: ActiveRow, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Add a token to an answer; returns whether it has ended."""
        row.generated, row.undelivered = row.generated + 1, row.undelivered + 1
        reason = None
        if (token in self.ends and not row.request.ignore_eos) or row.text.push(token, logprobs):
            reason = "stop"
        elif row.sampler.finished:  # a stop string may have come with the same token
            reason = "stop"
        elif row.generated >= row.request.max_tokens:
            reason = "length"
        text, ready = row.text.take(last=reason is not None)
        if text or ready or reason:
            self._deliver(row, TextChunk(text, row.undelivered, ready, reason))
            row.undelivered = 0
        if reason:
            self._end(row)
        return reason is not None

    def _drop_cancelled(self, rows: Sequence[ActiveRow]) -> None:
        cancelled = [row for row in rows if row.cancelled]
        self._remove(cancelled)
        for row in cancelled:
            self._end(row)

    def _remove(self, rows: Sequence[ActiveRow]) -> None:
        remaining = [n for n, row in enumerate(self._rows) if row not in rows]
        if not remaining:
            self._batch = None
        elif self._batch is not None and len(remaining) < len(self._rows):
            self._batch.select(remaining)
        self._rows = [self._rows[n] for n in remaining]

    def _fail(self, rows: Sequence[ActiveRow], error: Exception) -> None:
        for row in rows:
            if not row.ended:
                self._deliver(row, error)
                self._end(row)

    def _deliver(self, row: ActiveRow, chunk: TextChunk | Exception) -> None:
        if not row.cancelled:
            try:
                row.deliver(chunk)
            except RuntimeError:  # its event loop has gone
                row.cancelled = True

    def _end(self, row: ActiveRow) -> None:
        if not row.ended:
            row.ended = True
            row.done()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    return frozenset({*end_tokens(tokenizer), *own_ends(model)})
