"""The audit log: JSON lines that say who had what forgotten, by exact digests. No prompts, no answers by default.

A request that is answered leaves two lines with one id. `admitted` is written before the first token is generated, so
that a crash or `kill -9` in the middle of an answer leaves no answer without a record; `finished` tells how it ended.
A request that is refused leaves a `finished` line alone. No line is ever changed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import OutputError


class AuditLog:
    """Appends lines to a file, and moves it aside when it is full (`audit.jsonl.1` is the newest that is full).

    Each line is handed to the operating system whole before `write` returns, so it outlives this process; with `fsync`
    it is on the disk, and outlives the machine. One server a file.

    Args:
        path: the file; its folder is made.
        max_bytes: size at which the file is moved aside.
        keep: how many full files are kept; None: all.
        fsync: wait for the disk at each line (about a millisecond on an SSD).
        prompts: also write the requests' prompts and answers down. They may hold what is to be forgotten.
        required: a line that cannot be written refuses the request; else it is only counted and logged.

    Raises:
        OutputError: if the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_bytes: int = 100_000_000,
        keep: int | None = None,
        fsync: bool = False,
        prompts: bool = False,
        required: bool = True,
    ) -> None:
        self.path, self.max_bytes, self.keep = Path(path), max_bytes, keep
        self.fsync, self.prompts, self.required = fsync, prompts, required
        self._lock = threading.Lock()
        self._file: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise OutputError(f"cannot write the audit log {path}: {error.strerror}. Choose another --audit") from None

    def write(self, event: str, **fields: Any) -> None:
        """Append one line.

        Raises:
            OutputError: if it cannot be written.
        """
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **fields}, ensure_ascii=False) + "\n"
        try:
            with self._lock:
                self._append(line.encode())
        except OSError as error:
            raise OutputError(f"cannot write to the audit log {self.path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; what was written is flushed to the disk first."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)
                os.close(self._file)
                self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is not None and self._size and self._size + len(line) > self.max_bytes:
            self._rotate()
        if self._file is None:
            self._open()
        assert self._file is not None
        written = os.write(self._file, line)
        if written != len(line):  # the disk is full: take the torn line back
            os.ftruncate(self._file, self._size)
            raise OSError(28, "no space left for a whole line")
        self._size += written
        if self.fsync:
            os.fsync(self._file)

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._size = os.fstat(self._file).st_size
        if self._size and not _ends_a_line(self.path):  # the machine went down in the middle of a line
            self._size += os.write(self._file, b"\n")

    def _rotate(self) -> None:
        assert self._file is not None
        os.fsync(self._file)
        os.close(self._file)
        self._file = None
        numbers = sorted(self._numbers(), reverse=True)
        for number in numbers:
            here = self._aside(number)
            if self.keep is not None and number >= self.keep:
                here.unlink()
            else:
                os.replace(here, self._aside(number + 1))
        if self.keep != 0:
            os.replace(self.path, self._aside(1))
        else:
            self.path.unlink()

    def _numbers(self) -> list[int]:
        found = (path.name.removeprefix(f"{self.path.name}.") for path in self.path.parent.glob(f"{self.path.name}.*"))
        return [int(number) for number in found if number.isdigit()]

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def describe(applied: Any) -> list[Mapping[str, Any]]:
    """Return what a holding applies, for a line; a base that is not the adapter's, and who signed it, if it is so."""
    return [
        {"name": one.name, "sha256": one.sha256, "strength": one.strength}
        | ({"different_base": list(one.different_base)} if one.different_base else {})
        | ({"signed_by": one.signed_by} if one.signed_by else {})
        for one in applied
    ]
