"""Continuous batching over one model, a set of adapters for each row: requests join and leave between two steps.

One worker thread owns the model. Waiting requests are prefilled together, padded on the left; their KV caches are
joined with those of the running batch, rows that end are dropped from it, and padding that all rows share is cut.
Every pass runs inside `bank.rows`, so that each row has its own set, and no pass runs without one.

There is no prefix cache: keys and values live and die with their request, so they cannot reach another set.

Why not transformers' own continuous batching (5.23, generation/continuous_batching): it does run on a CPU (SmolLM2,
8 answers of 24 tokens: 2.6 s, `generate` 2.7 s, the same tokens), but packs all rows into one of shape (1, T) and
tells nobody in public which of the T tokens is whose: that is in private objects (`requests_in_batch`,
`cumulative_seqlens_q`), and so a token's gate cannot be carried. It also samples all rows or none (`do_sample` of the
whole manager), from one global source of random numbers, has no likeliest tokens' logprobs, and shares prefixes
between requests by token ids alone, which would cross sets.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...errors import AdapterError
from .base import Generation, GenerationError, TextChunk, TokenLogprobs, Unavailable
from .detokenize import TextStream, TokenBytes
from .kv_batch import KVBatch, ModelRunner, PerRowAdapters
from .sampling import Sampler

logger = logging.getLogger(__name__)


class ActiveRow:
    """One answer: what was asked, what it must have forgotten, and where its text goes.

    `deliver` gets the pieces, or the error that ended the answer; it is called from the worker's thread, and so is
    `done`, once, when no pass will use `held` any more.
    """

    def __init__(
        self, request: Generation, held: Any, deliver: Callable[[TextChunk | Exception], None], done: Callable[[], None]
    ) -> None:
        self.request, self.held, self.deliver, self.done = request, held, deliver, done
        self.sampler = Sampler(request)
        self.generated = self.untold = 0  # tokens; those that no piece has counted yet
        self.cancelled = self.ended = False
        self.text: TextStream | None = None  # set when it is submitted


class Scheduler:
    """Runs rows in one batch of at most `max_batch` until they end.

    Args:
        model: a transformers model in evaluation mode.
        tokenizer: its tokenizer; the worker's own, since tokenizers don't like to be shared by threads.
        bank: gives each row its set.
        max_batch: rows in one pass.
        prefill_tokens: tokens (padding included) that may join at once; a longer prompt joins alone.

    Raises:
        BaseModelError: if the model's rows cannot be joined.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: PerRowAdapters, *, max_batch: int = 8, prefill_tokens: int = 2048
    ) -> None:
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        self._passes = ModelRunner(model, bank)
        self._ends = _end_tokens(model, tokenizer)
        self._waiting: deque[ActiveRow] = deque()
        self._rows: list[ActiveRow] = []  # row n of _batch
        self._batch: KVBatch | None = None
        self._wake, self._closed = threading.Condition(), False
        self._worker = threading.Thread(target=self._run, name="unlearn-peft scheduler", daemon=True)
        self._worker.start()

    def submit(self, row: ActiveRow) -> None:
        """Queue a row.

        Raises:
            GenerationError: if the scheduler is closed; the row's `done` is called all the same.
        """
        row.text = TextStream(self._tokenizer, row.request.ids, row.request.stop)
        with self._wake:
            if not self._closed:
                self._waiting.append(row)
                self._wake.notify()
                return
        row.done()
        raise GenerationError("the server is shutting down")

    def cancel(self, row: ActiveRow) -> None:
        """Drop a row before the next step; it gets no more pieces."""
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
            left = [*self._rows, *self._waiting]
            self._waiting.clear()
        self._fail(left, GenerationError("the server is shutting down"))
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
            if isinstance(error, AdapterError):
                shown: Exception = Unavailable(str(error), getattr(error, "adapter", None))
            else:
                shown = GenerationError(f"a pass over the model failed ({type(error).__name__}); see the server's log")
            logger.exception("a pass over %d rows failed; they are refused", len(rows))
            self._take_out(rows)
            self._fail(rows, shown)

    def _join(self, rows: Sequence[ActiveRow]) -> None:
        batch, logits = self._passes.prefill([row.request.ids for row in rows], [row.held for row in rows])
        going = self._advance(rows, batch, logits)
        if not going:
            return
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)
        self._rows = [*self._rows, *going]

    def _step(self, rows: Sequence[ActiveRow]) -> None:
        assert self._batch is not None
        logits = self._passes.step(self._batch, [row.held for row in rows])
        self._rows = self._advance(rows, self._batch, logits)
        if not self._rows:
            self._batch = None

    def _advance(self, rows: Sequence[ActiveRow], batch: KVBatch, logits: Tensor) -> list[ActiveRow]:
        """Give each row its next token; returns those that go on, which the batch then holds alone."""
        broken = logits.isnan().any(-1).tolist()  # overflow in one row's adapters is that row's alone
        likeliest = logits.argmax(-1).tolist()
        tokens, going = [], []
        for n, row in enumerate(rows):
            if broken[n]:
                tokens.append(0)
                self._fail([row], GenerationError("the model gave NaN"))
                continue
            token, logprobs = likeliest[n], None
            if not row.sampler.plain:
                token, logprobs = row.sampler.choose(logits[n].cpu(), self._bytes)
            tokens.append(token)
            if not self._push(row, token, logprobs):
                going.append(n)
        batch.newest = batch.newest.new_tensor(tokens)[:, None]
        if going and len(going) < len(rows):
            batch.keep(going)
        return [rows[n] for n in going]

    def _push(self, row: ActiveRow, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Add a token to an answer; returns whether it has ended."""
        assert row.text is not None
        row.generated, row.untold = row.generated + 1, row.untold + 1
        reason = None
        if (token in self._ends and not row.request.ignore_eos) or row.text.push(token, logprobs):
            reason = "stop"
        elif row.generated >= row.request.max_tokens:
            reason = "length"
        text, told = row.text.take(last=reason is not None)
        if text or told or reason:
            self._deliver(row, TextChunk(text, row.untold, told, reason))
            row.untold = 0
        if reason:
            self._end(row)
        return reason is not None

    def _drop_cancelled(self, rows: Sequence[ActiveRow]) -> None:
        gone = [row for row in rows if row.cancelled]
        self._take_out(gone)
        for row in gone:
            self._end(row)

    def _take_out(self, rows: Sequence[ActiveRow]) -> None:
        stay = [n for n, row in enumerate(self._rows) if row not in rows]
        if len(stay) == len(self._rows):
            return
        if stay and self._batch is not None:
            self._batch.keep(stay)
        else:
            self._batch = None
        self._rows = [self._rows[n] for n in stay]

    def _fail(self, rows: Sequence[ActiveRow], error: Exception) -> None:
        for row in rows:
            if not row.ended:
                self._deliver(row, error)
                self._end(row)

    def _deliver(self, row: ActiveRow, piece: TextChunk | Exception) -> None:
        if not row.cancelled:
            try:
                row.deliver(piece)
            except RuntimeError:  # its event loop has gone
                row.cancelled = True

    def _end(self, row: ActiveRow) -> None:
        if not row.ended:
            row.ended = True
            row.done()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)
