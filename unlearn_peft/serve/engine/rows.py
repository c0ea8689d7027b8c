"""One answer in the scheduler's hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...inference.model_runner import KVBatch
from .base import Generation, TextChunk
from .detokenize import TextStream
from .prefix_cache import Owner
from .sampling import Sampler


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
    batch: KVBatch | None = None  # of its prompt, as far as it is read, until it joins the others
    read: int = 0  # tokens whose keys and values are in there
    text: TextStream = field(init=False)  # set when it is submitted

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request)
        salt = self.request.cache_salt
        self.owner = None if salt is None else Owner.of(self.lease, salt)  # of what the prefix cache may keep of it

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read; with a batch, its last one is run by a step."""
        return len(self.request.ids) - self.read - (self.batch is not None)
