"""Writes that are whole or not there at all: into a temporary sibling, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    With `replace`, an old `target` is moved aside first and deleted last, so that a crash in between leaves it
    whole beside; without it, a `target` that someone else finished meanwhile is kept as it is.

    Raises:
        OutputError: if the disk is full or the place is not writable.
    """
    target = target.absolute()
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with _explained(target):
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                flush(file)
            flush(temporary)
            _move_into_place(temporary, target, replace)
            flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file `target` when the block ends without an error.

    Raises:
        OutputError: if the disk is full or the place is not writable.
    """
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, target)
            flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, from the operating system onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_bytes(folder: Path) -> int:
    """Return the sum of the sizes of all files below `folder`, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _move_into_place(temporary: Path, target: Path, replace: bool) -> None:
    aside = temporary.with_suffix(".old")
    if target.is_dir() and any(target.iterdir()):
        if not replace:
            return
        os.rename(target, aside)
    try:
        os.rename(temporary, target)  # also replaces an empty folder
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        if not (target.is_dir() and any(target.iterdir())):
            raise
        if replace:
            raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(target)).free
            raise OutputError(
                f"no disk space to write {target}: {free / 1e6:.0f} MB are free there. "
                "Free some space or choose another place; what was there before is unchanged."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(
                f"cannot write {target}: {error.strerror}. Choose a folder that this user may write to."
            ) from error
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's text inside.
        if "No space left on device" in str(error) or "os error 28" in str(error):
            raise OutputError(
                f"no disk space to write {target}. Free some space or choose another place; "
                "what was there before is unchanged."
            ) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
