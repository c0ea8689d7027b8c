"""Continuous batching over one model, a set of adapters for each row: requests join and leave between two steps.

One worker thread owns the model. Before each step of the running rows there is one pass over prompts, of at most
`prefill_tokens`: short prompts together, padded on the left, or a part of a long one, in turn. So nobody's next token
waits for more than that. Where another tenant's rows run, steps then go on for twice as long before the next pass over
prompts: however many one tenant sends, others' answers take at most half as long again for it. The keys and values of a
prompt that is read are joined with those of the running batch, rows that end are dropped from it, and padding that all
rows share is cut. No pass runs outside `bank.rows`.

What prompts begin with is kept (`prefix_cache.py`) for prompts of the same tenant under the same set of adapters, in
the memory for keys and values that no row may need.

Why not transformers' own continuous batching (5.23, generation/continuous_batching)? It packs all rows into one of
shape (1, T): the model's arguments say where each sequence ends, but not whose it is, and that changes from pass to
pass, so a row cannot have its own adapters. It shares prefixes between requests by a digest of 64 bits of their tokens
alone, which would cross sets and tenants. It samples all rows or none, from the process's one source of random numbers:
no seed of a request's own. It has the log-probability of the chosen token alone, and after temperature and the like.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...data.prompt import end_tokens
from ...errors import AdapterError
from ...inference.bank import Bank
from ...inference.generate import own_ends
from ...inference.model_runner import KVBatch, ModelRunner
from .base import FormatError, GenerationError, TextChunk, TokenLogprobs, Unavailable
from .detokenize import TextStream, TokenBytes
from .memory import default_kv_bytes
from .prefill import Prefill
from .prefix_cache import PrefixCache
from .rows import ActiveRow
from .step_times import StepTimes

logger = logging.getLogger(__name__)
_STEPS = 2.0  # times as long as a pass over a tenant's prompts, where others' rows run


class Scheduler:
    """Runs rows in one batch of at most `max_batch` until they end; raises what `ModelRunner` raises.

    The tokenizer is the worker's own, since tokenizers don't like to be shared by threads.

    Args:
        prefill_tokens: of prompts in one pass, padding included; by default 256 on a CPU, else 1024. Where a model's
            prompts cannot be read in parts (see `ModelRunner.splits`), a longer one is read alone, and nothing is kept.
        kv_bytes: for keys and values. It is for the caller to submit no more than has room: all rows under way, each as
            long as the longest may become (`Generation.size`). None: see `default_kv_bytes`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank, *, max_batch: int = 8, prefill_tokens: int | None = None,
        kv_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.max_batch = max_batch
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        self._runner = ModelRunner(model, bank.rows)
        self.kv_bytes = default_kv_bytes(self._runner, max_batch) if kv_bytes is None else kv_bytes
        self.prefixes = PrefixCache(self._runner.token_bytes)
        most = prefill_tokens or (256 if self._runner.model.device.type == "cpu" else 1024)
        self._prefill = Prefill(self._runner, self.prefixes, most)
        self.ends = _end_tokens(model, tokenizer)
        self.step_times = StepTimes()
        self._waiting: deque[ActiveRow] = deque()
        self._rows: list[ActiveRow] = []  # row n of _batch
        self._batch: KVBatch | None = None
        self._owed = 0.0  # seconds of steps before the next pass over prompts
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
    def kv_tokens(self) -> int:
        """Tokens whose keys and values have room, padding included."""
        return self.kv_bytes // self._runner.token_bytes

    @property
    def reused(self) -> int:
        """Tokens of prompts that were not read again, thanks to the prefix cache."""
        return self._prefill.reused

    @property
    def kv_used_bytes(self) -> int:
        """Memory of keys and values: of rows, padding included, and of the prefix cache."""
        batches = (self._batch, *(row.batch for row in list(self._prefill.rows)))
        places = sum(batch.places for batch in batches if batch is not None)
        return places * self._runner.token_bytes + self.prefixes.bytes

    @property
    def running(self) -> int:
        """Rows in the batch, or about to join it."""
        return len(self._rows) + len(self._prefill.rows)

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
                self._wake.wait_for(lambda: self._waiting or self._prefill.rows or self._rows or self._closed)
                if self._closed:
                    break
                self._give_places()
            self._guarded(self._rows, self._drop_cancelled)
            self.prefixes.set_limit(self.kv_bytes - self._reserved_bytes())
            for row in list(self._prefill.rows):
                self._guarded([row], self._prefill.use_prefix)
            if (self._owed <= 0 or not self._rows) and (rows := self._prefill.next_rows()):
                self._guarded(rows, self._read)
            if self._rows:
                self._guarded(self._rows, self._step)
        with self._wake:
            unfinished = [*self._rows, *self._prefill.rows, *self._waiting]
            self._waiting.clear()
        self._fail(unfinished, GenerationError("the server is shutting down"))
        self._prefill.remove(unfinished)
        self._rows, self._batch = [], None

    def _give_places(self) -> None:
        """Let waiting rows begin to be read, in their order; cancelled ones of either kind end."""
        cancelled = [row for row in self._prefill.rows if row.cancelled]
        self._prefill.remove(cancelled)
        while self._waiting and self.running < self.max_batch:
            row = self._waiting.popleft()
            (cancelled if row.cancelled else self._prefill.rows).append(row)
        for row in cancelled:
            self._end(row)

    def _reserved_bytes(self) -> int:
        """Return what the rows under way may need: each row of a batch takes as much as its longest."""
        sizes = [row.request.size for row in (*self._rows, *self._prefill.rows)]
        return len(sizes) * max(sizes, default=0) * self._runner.token_bytes

    def _guarded(self, rows: Sequence[ActiveRow], run: Callable[[Sequence[ActiveRow]], None]) -> None:
        """A failure ends these rows, never the worker; rows that were not part of it go on."""
        try:
            run(rows)
        except Exception as error:
            logger.exception("a pass over %d rows failed; they are refused", len(rows))
            self._prefill.remove(rows)
            self._remove(rows)
            if isinstance(error, AdapterError):
                self._fail(rows, Unavailable(str(error), error.adapter))
            else:
                message = f"a pass over the model failed ({type(error).__name__}); see the server's log"
                self._fail(rows, GenerationError(message))

    def _read(self, rows: Sequence[ActiveRow]) -> None:
        """Read prompts, or a part of one; those that are wholly read join the running rows."""
        readers, began = {row.request.tenant for row in rows}, time.perf_counter()
        others = any(row.request.tenant not in readers for row in self._rows)
        read = self._prefill.read(rows)
        self._owed = _STEPS * (time.perf_counter() - began) if others else 0.0
        if read is None:
            return
        batch, logits = read
        if remaining := rows if logits is None else self._advance(rows, batch, logits):
            if self._batch is None:
                self._batch = batch
            else:
                self._batch.extend(batch)
            self._rows = [*self._rows, *remaining]

    def _step(self, rows: Sequence[ActiveRow]) -> None:
        assert self._batch is not None
        began = time.perf_counter()
        logits = self._runner.step(self._batch, [row.lease for row in rows])
        self._rows = self._advance(rows, self._batch, logits)
        took = time.perf_counter() - began
        self.step_times.add(len(rows), took)
        self._owed -= took
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
