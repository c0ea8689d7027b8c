"""An adapter's files in one tar archive: read as untrusted, written with the same bytes each time.

Only the files that an adapter may have are taken, each within its limit, and of them only names and bytes: no links,
owners, modes or times. That is stricter than `tarfile`'s own `filter="data"`, which early 3.10 and 3.11 releases lack.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

from ...errors import AdapterError, OutputError, safe_repr
from ...files.atomic import atomic_file
from ...files.untrusted import MAX_JSON_BYTES, MAX_WEIGHT_BYTES, list_files
from ..bundle import WEIGHTS
from ..trust import SIGNABLE_ENDINGS, SIGNATURE, signable

ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_BYTES = 1 << 30  # of an adapter, by default
_MAX_PLOT_BYTES = 20_000_000
_MAX_MEMBERS = 100
_MAX_READ_BYTES = 2_000_000  # at once: tarfile reads a pax header as a whole, whatever size it claims
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError)
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
}  # fmt: skip


def allowed(name: str) -> bool:
    """Return whether an adapter may have a file of this name: weights, config, manifest, card, plots, signature."""
    return (name == SIGNATURE or signable(name)) and _NAME.fullmatch(name) is not None


def max_file_bytes(name: str, max_bytes: int = MAX_BYTES) -> int:
    """Return how large a file of this name may be in an adapter of at most `max_bytes`."""
    if name == WEIGHTS:
        return min(max_bytes, MAX_WEIGHT_BYTES)
    return min(max_bytes, _MAX_PLOT_BYTES if name.endswith(SIGNABLE_ENDINGS) else MAX_JSON_BYTES)


def unpack(archive: Path, folder: Path, max_bytes: int = MAX_BYTES) -> list[str]:
    """Write an archive's files, which lie at its top or in one folder, into an empty folder; returns their names.

    An AdapterError names what no adapter has. `max_bytes` is for all files together, unpacked.
    """
    try:
        with archive.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            source = _Bounded(gzip.GzipFile(fileobj=raw) if gzipped else raw, max_bytes + _MAX_MEMBERS * 10_240)
            with tarfile.open(fileobj=source, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]
                names = _unpack(tar, folder, max_bytes)
    except AdapterError as error:
        raise AdapterError(f"the archive {archive.name} is refused: {error}") from None
    except _DAMAGED as error:
        raise AdapterError(
            f"the archive {archive.name} is damaged or no tar file ({type(error).__name__}): get it again"
        ) from None
    if not names:
        raise AdapterError(f"the archive {archive.name} holds no files: expected an adapter's")
    return names


def pack(folder: Path, archive: Path) -> list[str]:
    """Write an adapter's files into an archive, byte for byte the same for the same files; returns their names."""
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


def _unpack(tar: tarfile.TarFile, folder: Path, max_bytes: int) -> list[str]:
    names: list[str] = []
    folders: set[str] = set()
    for count, entry in enumerate(tar, 1):
        if count > _MAX_MEMBERS:
            raise AdapterError(f"it holds more than {_MAX_MEMBERS} entries")
        shown, (*above, name) = safe_repr(entry.name), entry.name.removeprefix("./").rstrip("/").split("/")
        if entry.isdir():
            if entry.name.startswith("/") or name == ".." or above:
                raise AdapterError(f"it holds the folder {shown}, expected files, or one folder of files")
            continue
        if not entry.isreg() or entry.issparse():
            kind = _KINDS.get(entry.type, "something else")
            raise AdapterError(f"it holds {shown}, which is no plain file but {kind}")
        if len(above) > 1 or not all(map(_NAME.fullmatch, above)) or not allowed(name):
            raise AdapterError(f"it holds {shown}, which has no place in an adapter")
        folders.add("".join(above))
        if len(folders) > 1:
            raise AdapterError(f"its files lie in several folders ({shown}), expected one")
        if name in names:
            raise AdapterError(f"it holds {name} twice")
        if entry.size > (limit := max_file_bytes(name, max_bytes)):
            raise AdapterError(f"{name} has {entry.size:,} bytes, expected at most {limit:,} (--max-size)")
        max_bytes -= entry.size  # what is left for the others
        names.append(name)
        stream = tar.extractfile(entry)
        assert stream is not None  # it is a plain file
        with (folder / name).open("xb") as output:
            shutil.copyfileobj(stream, output, 1 << 20)  # raises ReadError if it is cut short
    return names


class _Bounded:
    """A stream for `tarfile` that refuses large single reads, and any beyond a number of bytes."""

    def __init__(self, source: Any, max_bytes: int) -> None:
        self._source, self._max_bytes = source, max_bytes
        self.tell = source.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise AdapterError("it has a header of an absurd size")
        self._check(self.tell())
        return bytes(self._source.read(size))

    def seek(self, offset: int) -> int:
        self._check(offset)
        return int(self._source.seek(offset))

    def seekable(self) -> bool:
        return True

    def _check(self, offset: int) -> None:
        if offset > self._max_bytes:
            raise AdapterError(f"it unpacks to more than {self._max_bytes:,} bytes (--max-size)")
