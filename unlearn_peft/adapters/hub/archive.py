"""An adapter's files in one tar archive: read as untrusted, written the same way each time.

A path and an empty folder come in; only the files that an adapter may have go out, each within its limit. Nothing is
taken from an archive but names and bytes: no links, owners, modes, times.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any

from ...errors import AdapterError, OutputError, safe_repr
from ...files.atomic import atomic_file
from ...files.untrusted import MAX_JSON_BYTES, MAX_WEIGHT_BYTES, list_files
from ..trust import SIGNABLE, SIGNABLE_ENDINGS, SIGNATURE

ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_BYTES = 1 << 30  # of an adapter, unless another limit is given
_WEIGHTS = SIGNABLE[0]
_MAX_PLOT_BYTES = 20_000_000
_MAX_MEMBERS = 100
_MAX_NAME_BYTES = 2_000_000  # of one read of a tar header: pax headers are read as a whole
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
_BLOCK = 1 << 20
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError)


def allowed(name: str) -> bool:
    """Return whether an adapter may have a file of this name: weights, config, manifest, card, plots, signature."""
    known = name in (*SIGNABLE, SIGNATURE) or name.endswith(SIGNABLE_ENDINGS)
    return known and _NAME.fullmatch(name) is not None


def max_file_bytes(name: str, most: int = MAX_BYTES) -> int:
    """Return how large a file of this name may be, in bytes."""
    if name == _WEIGHTS:
        return min(most, MAX_WEIGHT_BYTES)
    return min(most, _MAX_PLOT_BYTES if name.endswith(SIGNABLE_ENDINGS) else MAX_JSON_BYTES)


def unpack(archive: Path, folder: Path, most: int = MAX_BYTES) -> list[str]:
    """Write an archive's files into a folder, and return their names.

    Args:
        archive: a tar file, plain or in gzip, with an adapter's files at the top or in one folder.
        folder: an empty folder; nothing is written outside of it.
        most: for all files together, in bytes, unpacked.

    Raises:
        AdapterError: if it holds anything else than an adapter's files, or too much of them.
    """
    names: list[str] = []
    try:
        with archive.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            source: Any = gzip.GzipFile(fileobj=raw, mode="rb") if packed else raw
            bounded: Any = _Bounded(source, most + _MAX_MEMBERS * 10_240)
            with tarfile.open(fileobj=bounded, mode="r:", errorlevel=2) as tar:
                _unpack(tar, folder, most, names)
    except AdapterError as error:
        raise AdapterError(f"the archive {archive.name} is refused: {error}") from None
    except (
        tarfile.TarError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise AdapterError(
            f"the archive {archive.name} is damaged or no tar file ({type(error).__name__}): get it again"
        ) from None
    if not names:
        raise AdapterError(f"the archive {archive.name} holds no files: expected an adapter's")
    return names


def pack(folder: Path, archive: Path) -> list[str]:
    """Write an adapter's files into an archive, equal to the byte for equal files; returns their names.

    Raises:
        OutputError: if the name has another ending than `ENDINGS`, or the place cannot be written.
    """
    if not archive.name.endswith(ENDINGS):
        raise OutputError(f"the archive {archive} has another ending than {', '.join(ENDINGS)}: choose one of these")
    names = [name for name in list_files(folder) if allowed(name)]
    with atomic_file(archive) as temporary, temporary.open("wb") as raw:
        plain = archive.suffix == ".tar"
        packed: Any = raw if plain else gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=6)
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = (folder / name).stat().st_size, 0o644
                with (folder / name).open("rb") as stream:
                    tar.addfile(entry, stream)
        if not plain:
            packed.close()
    return names


def _unpack(tar: tarfile.TarFile, folder: Path, most: int, names: list[str]) -> None:
    top: str | None = None
    left = most
    for count, entry in enumerate(tar, 1):
        if count > _MAX_MEMBERS:
            raise AdapterError(f"it holds more than {_MAX_MEMBERS} entries")
        parts = entry.name.removeprefix("./").rstrip("/").split("/")
        if entry.isdir():
            if entry.name.startswith("/") or ".." in parts or len(parts) > 1:
                raise AdapterError(
                    f"it holds the folder {safe_repr(entry.name)}, expected files, or one folder of files"
                )
            continue
        if not entry.isreg() or entry.issparse():
            raise AdapterError(f"it holds {safe_repr(entry.name)}, which is no plain file but {_kind(entry)}")
        above, name = "/".join(parts[:-1]), parts[-1]
        if len(parts) > 2 or (len(parts) == 2 and not _NAME.fullmatch(above)) or not allowed(name):
            raise AdapterError(f"it holds {safe_repr(entry.name)}, which has no place in an adapter")
        if top not in (None, above):
            raise AdapterError(f"its files lie in several folders ({safe_repr(entry.name)}), expected one")
        top = above
        if name in names:
            raise AdapterError(f"it holds {name} twice")
        if entry.size > (limit := min(left, max_file_bytes(name, most))):
            raise AdapterError(f"{name} has {entry.size:,} bytes, expected at most {limit:,} (--max-size)")
        left -= entry.size
        names.append(name)
        stream = tar.extractfile(entry)
        assert stream is not None  # it is a plain file
        with (folder / name).open("xb") as output:
            written = _copy(stream, output)
        if written != entry.size:
            raise AdapterError(f"{name} is cut short: it has {written:,} of {entry.size:,} bytes")


def _copy(source: IO[bytes], target: IO[bytes]) -> int:
    written = 0
    while block := source.read(_BLOCK):
        target.write(block)
        written += len(block)
    return written


def _kind(entry: tarfile.TarInfo) -> str:
    kinds = ((entry.issym(), "a symbolic link"), (entry.islnk(), "a hard link"), (entry.isfifo(), "a pipe"))
    return next((name for true, name in kinds if true), "a device" if entry.isdev() else "something else")


class _Bounded(io.RawIOBase):
    """What may be read of an archive: no far seeks, no huge single reads (tarfile reads pax headers as a whole)."""

    def __init__(self, source: Any, most: int) -> None:
        self._source, self._most = source, most

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_NAME_BYTES:
            raise AdapterError("it has a header of an absurd size")
        if self._source.tell() > self._most:
            raise AdapterError(f"it unpacks to more than {self._most:,} bytes (--max-size)")
        return bytes(self._source.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset > self._most:
            raise AdapterError(f"it unpacks to more than {self._most:,} bytes (--max-size)")
        return int(self._source.seek(offset, whence))

    def tell(self) -> int:
        return int(self._source.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
