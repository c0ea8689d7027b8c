"""Files that others made: read once, within limits; no name, path or pattern that they hold is followed.

Paths come in; bytes and strict JSON go out. Weights files are read by `weights.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from ..errors import AdapterError, safe_repr

MAX_JSON_BYTES = 4_000_000
MAX_WEIGHT_BYTES = 4 << 30
MAX_FILES = 1_000  # in an adapter's directory
_MAX_VALUES = 1_000_000  # in one JSON file
_MAX_DEPTH = 32
_LONG_NUMBER = re.compile(rb"\d{70}")  # longer than a sha256 that happens to have no letters
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def list_files(folder: Path) -> list[str]:
    """Return the names of an adapter directory's entries, sorted.

    Raises:
        AdapterError: if it is no folder, cannot be read, or holds too many files.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > MAX_FILES:
                    raise AdapterError(f"{folder} holds more than {MAX_FILES} files: this is no adapter's folder")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        why = getattr(error, "strerror", None) or "its path cannot be used"
        raise AdapterError(f"no adapter at {folder} ({why}): expected a folder as PEFT writes it") from None
    return sorted(names)


@contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[tuple[IO[bytes], int]]:
    """Open a plain file and yield it with its size; pipes, devices, links to elsewhere and larger files are refused.

    Raises:
        AdapterError: saying what it is instead.
    """
    try:
        with _open(path) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{path} is no plain file")
            if status.st_size > max_bytes:
                raise AdapterError(
                    f"{path} has {status.st_size:,} bytes, more than the {max_bytes:,} that such a file may have: this "
                    "is no adapter's file"
                )
            yield stream, status.st_size
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror})") from None
    except MemoryError:
        raise AdapterError(f"{path} does not fit into this machine's memory") from None


def read_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return a plain file's bytes.

    Raises:
        AdapterError: see `opened`; or if it changed meanwhile.
    """
    with opened(path, max_bytes) as (stream, size):
        return read_all(path, stream, size)


def read_all(path: Path, stream: IO[bytes], size: int) -> bytes:
    """Return all bytes of a file that `opened` yields.

    Raises:
        AdapterError: if it is no longer of that size.
    """
    data = stream.read(size + 1)
    if len(data) != size:
        raise AdapterError(f"{path} changed while it was read: try again when nobody writes to it")
    return data


def sha256_of(path: Path, max_bytes: int = MAX_WEIGHT_BYTES) -> str:
    """Return the sha256 of a plain file, in hex, without holding it in memory.

    Raises:
        AdapterError: see `opened`.
    """
    with opened(path, max_bytes) as (stream, _):
        return sha256_of_stream(stream)


def sha256_of_stream(stream: IO[bytes]) -> str:
    """Return the sha256 of the rest of an open file, in hex, without holding it in memory."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def strict_json(data: bytes, *, values: bool = True) -> dict[str, Any]:
    """Return a JSON object, in UTF-8, in which no key stands twice and every number is finite.

    Args:
        data: the file's bytes.
        values: also bound the depth, and check that texts can be encoded; False where each value is checked anyway.

    Raises:
        ValueError: saying what is wrong.
    """
    if data.count(b",") + data.count(b"{") + data.count(b"[") > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values")
    if _LONG_NUMBER.search(data):
        raise ValueError("a number of more than 70 digits")
    try:
        content = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, expected a JSON object")
    if values:
        _check_values(content)
    return content


def _open(path: Path) -> IO[bytes]:
    try:
        real = _resolve_link(path)
        status = os.lstat(real)  # before it is opened: opening some devices does something
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
            raise AdapterError(f"{path} is {kind}, expected a plain file")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(real, flags), "rb")
    except FileNotFoundError:
        raise AdapterError(f"no {path.name} in {path.parent}: expected an adapter as PEFT writes it") from None
    except ValueError as error:  # a null byte
        raise AdapterError(f"{safe_repr(str(path))} is no path ({error})") from None


def _resolve_link(path: Path) -> Path:
    """Return where a file is; a link may lead to elsewhere in its directory, or within the Hub's cache."""
    if not path.is_symlink():
        return path
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    allowed = [folder]
    if folder.parent.name == "snapshots":  # of huggingface_hub's cache: REPO/snapshots/COMMIT/FILE -> REPO/blobs/...
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise AdapterError(f"{path} is a link to a file outside of its folder: expected the file itself")
    return real


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {safe_repr(twice)} stands twice")
    return table


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is no number in JSON")


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("it holds a number that is too large")
    return number


def _check_values(values: Mapping[str, Any]) -> None:
    level: list[Any] = [values]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and not value.isascii():
                value.encode()  # half a surrogate pair cannot be written; UnicodeEncodeError is a ValueError
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
