"""Reading prompts: token ids -> keys and values, in passes so short that running rows can go on in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor

from ...inference.model_runner import KVBatch, ModelRunner
from .prefix_cache import PrefixCache
from .rows import ActiveRow


class Prefill:
    """The rows whose prompts are not wholly read, in turn. For the thread that owns the model.

    Args:
        runner: reads them.
        prefixes: what prompts begin with, as far as it is known.
        most: tokens in one pass, padding included; see `Scheduler`.
    """

    def __init__(self, runner: ModelRunner, prefixes: PrefixCache, most: int) -> None:
        self._runner, self._prefixes, self._most = runner, prefixes, most
        self.rows: deque[ActiveRow] = deque()
        self.reused = 0  # tokens that were not read again

    def remove(self, rows: Collection[ActiveRow]) -> None:
        """Read no more of these, and forget what was read."""
        for row in rows:
            row.batch = None
        for row in [row for row in self.rows if row in rows]:
            self.rows.remove(row)

    def use_prefix(self, rows: Sequence[ActiveRow]) -> None:
        """Go on behind what is known of the beginning of prompts, if that is more than was read of them.

        Copying it is charged to them, as reading is.
        """
        for row in rows:
            began = time.monotonic()
            if row.owner is not None and self._runner.splits:
                found = self._prefixes.find(row.owner, row.request.ids[:-1], row.read)
                if found is not None:
                    self.reused += found.places - row.read
                    row.batch, row.read = found, found.places
                    row.request.prefilled(time.monotonic() - began)

    def next_rows(self) -> list[ActiveRow]:
        """Return the rows of the next pass: the one whose turn it is, and others that fit beside it."""
        rows: list[ActiveRow] = []
        for row in self.rows:
            width = max([row.unread, *(other.unread for other in rows)])
            alike = not rows or (row.batch is None) == (rows[0].batch is None)
            if not rows or alike and width * (len(rows) + 1) <= self._most:
                rows.append(row)
        return rows

    def read(self, rows: Sequence[ActiveRow]) -> tuple[KVBatch, Tensor | None] | None:
        """Run one pass over `next_rows`, which is charged to them.

        Returns:
            What was read of all of them, with logits (B, V) behind their last tokens, or with their last tokens still
            to be run; None if the only one is not wholly read. It has its turn again after the others.
        """
        batch, ids, logits = rows[0].batch, list[Sequence[int]](), None
        most = self._most if self._runner.splits else max(row.unread for row in rows)
        leases, began = [row.lease for row in rows], time.monotonic()
        for row in rows:
            ids.append(row.request.ids[row.read : row.read + min(row.unread, most) + (batch is not None)])
        try:
            if batch is None:
                batch, logits = self._runner.prefill(ids, leases)
            else:
                for row in rows[1:]:
                    assert row.batch is not None
                    batch.extend(row.batch)
                if len(set(map(len, ids))) == 1 and all(row.unread < most for row in rows):
                    logits = self._runner.append(batch, ids, leases)
                else:
                    self._runner.read(batch, ids, leases)
        finally:
            for row in rows:
                row.request.prefilled((time.monotonic() - began) / len(rows))
        for n, row in enumerate(rows):
            row.read += len(ids[n]) - (logits is None)
            if row.owner is not None and self._runner.splits:
                self._prefixes.put(row.owner, row.request.ids[: row.read], batch, n)
        self.remove(rows)
        if rows[0].read + (logits is None) == len(rows[0].request.ids):
            return batch, logits
        rows[0].batch = batch
        self.rows.append(rows[0])
        return None
