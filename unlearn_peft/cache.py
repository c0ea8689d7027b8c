"""What the frozen base gives for each row, computed once: in memory up to a budget, beyond it in mapped files.

Rows and named tensors come in; the same tensors come back for the same tokens. A file holds the key of the base and
adapter that it was made for and names rows by the digest of their tokens, so what a change of base, adapted layers,
data or template makes stale is never found again.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .data.tokenize import Example
from .files.atomic import whole_file

logger = logging.getLogger(__name__)
_SHARD_BYTES = 64_000_000
_SEPARATOR = "/"


class Cache:
    """Tensors by row.

    Args:
        key: what else the tensors depend on; files with another key are deleted.
        memory_bytes: how much is held in memory.
        folder: where the rest goes; None: what does not fit is not kept, and is computed again when needed.
        part: this process's number, so that several can write beside each other.
    """

    def __init__(self, key: str, memory_bytes: int, folder: Path | None = None, part: int = 0) -> None:
        self.key, self.memory_bytes, self.folder, self.part = key, memory_bytes, folder, part
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._used = 0
        self._waiting: dict[str, dict[str, Tensor]] = {}  # for the next file
        self._files: list[Path] = []
        self._mapped: dict[str, tuple[object, list[str]]] = {}  # row -> open file, names of its tensors
        self.look()

    def get(self, example: Example) -> Mapping[str, Tensor] | None:
        """Return what was kept for a row, or None."""
        row = row_digest(example)
        if row in self._memory:
            return self._memory[row]
        if row in self._waiting:
            return self._waiting[row]
        if row in self._mapped:
            file, names = self._mapped[row]
            return {name: file.get_tensor(f"{row}{_SEPARATOR}{name}") for name in names}  # type: ignore[attr-defined]
        return None

    def put(self, example: Example, tensors: Mapping[str, Tensor]) -> None:
        """Keep a row's tensors, in memory while the budget lasts."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.has_room(size):
            self._memory[row_digest(example)] = dict(tensors)
            self._used += size
        elif self.folder is not None:
            self._waiting[row_digest(example)] = {name: t.to("cpu").contiguous() for name, t in tensors.items()}
            if sum(t.nbytes for kept in self._waiting.values() for t in kept.values()) >= _SHARD_BYTES:
                self.flush()

    def has_room(self, size: int) -> bool:
        """Return whether so many more bytes fit into memory."""
        return self._used + size <= self.memory_bytes

    def flush(self) -> None:
        """Write what waits for a file, whole or not at all, and map it."""
        if not self._waiting or self.folder is None:
            return
        numbers = [int(path.stem[-5:]) for path in self.folder.glob(f"{self.part:04d}-*.safetensors")]
        path = self.folder / f"{self.part:04d}-{max(numbers, default=-1) + 1:05d}.safetensors"
        tensors = {f"{row}{_SEPARATOR}{name}": t for row, kept in self._waiting.items() for name, t in kept.items()}
        if not self.folder.exists():
            with suppress(OSError):  # whole_file tells why
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(path, mode=0o600) as temporary:  # the rows' words can be read back from their states
            save_file(tensors, temporary, metadata={"key": self.key})
        self._waiting = {}
        self.look()

    def look(self) -> None:
        """Take in the files that are there, other processes' too; those of another key or damaged are deleted."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._files:
                continue
            try:
                file = safe_open(path, framework="pt")
                stale = file.metadata().get("key") != self.key  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, AttributeError):
                stale = True
            if stale:
                logger.info("Deleted %s: it was made for another base, adapter or setting", path.name)
                path.unlink(missing_ok=True)
                continue
            self._files.append(path)
            names: dict[str, list[str]] = {}
            for full in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  (safe_open is no mapping)
                row, _, name = full.partition(_SEPARATOR)
                names.setdefault(row, []).append(name)
            self._mapped |= {row: (file, found) for row, found in names.items()}


def row_digest(example: Example) -> str:
    """Return a digest of a row's tokens and of which of them are targets."""
    shape = array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.is_target)
    return hashlib.blake2b(shape, digest_size=16).hexdigest()


def states_key(fingerprint: object, *more: object) -> str:
    """Return the key of a cache: a digest of all that the kept tensors depend on besides their rows."""
    return hashlib.sha256(repr((fingerprint, more, torch.__version__)).encode()).hexdigest()
