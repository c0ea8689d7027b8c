"""The audit log: JSON lines with the exact adapters of each request; no prompts and answers by default.

An answered request has two lines with one id. `admitted` is written before the first token is generated, so that even
`kill -9` in the middle of an answer leaves no answer without a record; `finished` has the outcome. A refused request
has a `finished` line alone. No line is ever changed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, printable

try:
    import fcntl
except ImportError:  # not on Windows: a second writer is then not noticed
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ..inference.adapter_cache import Applied

logger = logging.getLogger(__name__)
_BLOCK = 4096  # bytes that must be free
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # of a pipe whose reader is not there, or does not read: an error


@dataclass(eq=False)
class AuditLog:
    """Appends lines to a file, and rotates it when it is full (`audit.jsonl.1` is the newest full one).

    The operating system has each line whole before `write` returns, so it outlives this process; with `fsync` it is on
    the disk and outlives the machine. Each server needs its own file: it is locked while it is open. If another program
    moves or deletes it, the next line begins a new one. Files are made for their owner alone (0600).

    Raises:
        OutputError: the file cannot be written, or another process writes it.
    """

    path: Path  # its folder is created
    _: KW_ONLY
    max_bytes: int = 100_000_000  # size at which the file is rotated
    keep: int | None = None  # number of full files; None: all
    fsync: bool = False  # wait for the disk at each line (about a millisecond on an SSD)
    prompts: bool = False  # also record prompts and answers. They may hold what is to be forgotten
    required: bool = True  # refuse a request whose line cannot be written; else only log the problem
    name: str = "audit"  # what messages call it: this log, or the `access` log

    def __post_init__(self) -> None:
        self.path = Path(self.path)  # a string will do
        self._lock = threading.Lock()
        self._reopen = self._failed = False  # asked to; the last line could not be written
        self._file: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            message = f"cannot write the {self.name} log {self.path}: {error.strerror}. Choose another file"
            raise OutputError(message) from None

    def write(self, event: str, **fields: Any) -> None:
        """Append one line, whatever ends of lines the fields hold; see the class for errors."""
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = printable(json.dumps({"time": time, "event": event, **fields}, ensure_ascii=False)) + "\n"
        try:
            with self._lock:
                self._failed = True
                self._append(line.encode())
                self._failed = False
        except OSError as error:
            raise OutputError(f"cannot write to the {self.name} log {self.path}: {error.strerror}") from None

    def write_or_log(self, event: str, **fields: Any) -> None:
        """Append one line; where that fails, the first of such errors in a row is logged."""
        failed = self._failed
        try:
            self.write(event, **fields)
        except OutputError as error:
            if not failed:
                logger.error("%s", error)

    def problem(self) -> str | None:
        """Return why no line can be written now, without the file's path, or None; for /readyz.

        After a line that failed, it tries with blank ones, which it takes back: nobody may send a request meanwhile.
        """
        try:
            with self._lock:
                file = self._open_file(0)
                if self._failed:
                    regular = stat.S_ISREG(os.fstat(file).st_mode)
                    self._put(file, b"\n" * (_BLOCK if regular else 1))
                    if regular:
                        os.ftruncate(file, self._size)
                    self._failed = False
                elif _is_full(self.path.parent):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return f"the {self.name} log cannot be written ({error.strerror})"
        return None

    def reopen(self) -> None:
        """Close the file before the next line and open what is then at its path. Safe in a signal handler."""
        self._reopen = True

    def close(self) -> None:
        """Flush the file to the disk and close it; an error is logged."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            _flush_and_close(file)

    def _append(self, line: bytes) -> None:
        file = self._open_file(len(line))
        self._put(file, line)
        self._size += len(line)
        if self.fsync:
            _flush(file)

    def _put(self, file: int, data: bytes) -> None:
        if os.write(file, data) != len(data):  # the disk is full: remove the torn line
            os.ftruncate(file, self._size)
            raise OSError(errno.ENOSPC, "no space left for a whole line")

    def _open_file(self, room: int) -> int:
        """Return the file that the next `room` bytes belong to."""
        if self._file is not None and not self._is_there(self._file):
            logger.warning("the %s log %s was moved or deleted: a new one begins", self.name, self.path)
            self._reopen = True
        if self._reopen:
            self._reopen = False
            self._close()
        if self._file is not None and self._size and self._size + room > self.max_bytes:
            self._rotate()
        if self._file is None:
            self._open()
        assert self._file is not None
        return self._file

    def _open(self) -> None:
        while self._file is None:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_WAIT, 0o600)
            try:
                if fcntl is not None and stat.S_ISREG(os.fstat(file).st_mode):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_there(file):  # else it was moved before it was locked
                    self._file = file
            except BlockingIOError:
                raise OSError(errno.EBUSY, "another process writes it, and each server needs its own file") from None
            finally:
                if self._file is None:
                    os.close(file)
        self._size = os.fstat(self._file).st_size
        if self._size and not _ends_a_line(self.path):  # the machine went down in the middle of a line
            self._size += os.write(self._file, b"\n")

    def _is_there(self, file: int) -> bool:
        """Return whether this open file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _rotate(self) -> None:
        full, self._file = self._file, None
        assert full is not None
        threading.Thread(target=_flush_and_close, args=(full,), name="unlearn-peft log").start()  # a disk may be slow
        start = f"{self.path.name}."
        suffixes = [path.name.removeprefix(start) for path in self.path.parent.glob(f"{start}*")]
        for number in sorted((int(suffix) for suffix in suffixes if suffix.isdigit()), reverse=True):
            if self.keep is not None and number >= self.keep:
                self._rotated(number).unlink()
            else:
                os.replace(self._rotated(number), self._rotated(number + 1))
        if self.keep != 0:
            os.replace(self.path, self._rotated(1))
        else:
            self.path.unlink()

    def _rotated(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def _flush(file: int) -> None:
    if stat.S_ISREG(os.fstat(file).st_mode):  # a pipe or a device has no disk behind it
        os.fsync(file)


def _flush_and_close(file: int) -> None:
    try:
        _flush(file)
    except OSError as error:
        logger.error("a log file could not be flushed to the disk: %s", error.strerror)
    finally:
        os.close(file)


def _is_full(folder: Path) -> bool:
    if not hasattr(os, "statvfs"):
        return False
    free = os.statvfs(folder)
    blocks = free.f_bavail if os.geteuid() else free.f_bfree
    return free.f_blocks > 0 and blocks * free.f_frsize < _BLOCK


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def describe(applied: Iterable[Applied]) -> list[Mapping[str, Any]]:
    """Return the adapters of a lease for a line; also how the base differs from the adapter's, and who signed it."""
    return [
        {"name": adapter.name, "sha256": adapter.sha256, "strength": adapter.strength}
        | ({"different_base": list(adapter.different_base)} if adapter.different_base else {})
        | ({"signed_by": adapter.signed_by} if adapter.signed_by else {})
        for adapter in applied
    ]
