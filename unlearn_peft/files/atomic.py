"""Atomic writes: into a temporary sibling that is flushed to disk, then renamed.

A writer locks its temporary as long as it lives. What a killed writer leaves is locked by nobody, and the next writer
of the same name deletes it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError

try:
    import fcntl
except ImportError:  # not on Windows: temporaries are then not locked, and never cleared
    fcntl = None  # type: ignore[assignment]


_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
_MAX_TRIES = 20  # other writers of the same name may come in between


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    With `replace`, an old `target` is exchanged for the new one in one step, so that there is always a complete one,
    and then deleted. (Where the file system cannot do that, the old one is moved aside first; after a crash in between
    the next writer puts it back.) Without `replace`, a `target` that another writer finished meanwhile stays.

    Raises:
        OutputError: if the disk is full or the place is not writable.
    """
    target = target.absolute()
    with _temporary(target) as temporary:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
            flush(file)
        flush(temporary)
        _move_into_place(temporary, target, replace)
        flush(target.parent)


@contextmanager
def atomic_file(target: Path, *, mode: int | None = None, replace: bool = True) -> Iterator[Path]:
    """Yield the path of an empty temporary file that becomes `target` when the block ends without an error.

    Args:
        target: the file.
        mode: its permissions; None: those of the file that is replaced, for a new one as the umask says.
        replace: False: of several writers the first one's file stays.

    Raises:
        OutputError: see `atomic_folder`.
    """
    target = target.absolute()
    with _temporary(target, 0o666 if mode is None else mode) as temporary:
        permissions = (target if mode is None and target.is_file() else temporary).stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, permissions)  # safetensors puts a file of its own into its place
        flush(temporary)
        if replace:
            os.replace(temporary, target)
        else:
            with suppress(FileExistsError):
                os.link(temporary, target)
        flush(target.parent)


def check_target(target: Path) -> None:
    """Raise an OutputError if a path has no name of its own, beside which a temporary could stand."""
    if target.name in ("", ".."):
        raise OutputError(f"cannot write to '{target}': give a new name, such as {target / 'new'}")


def delete_atomically(folder: Path) -> None:
    """Delete a folder, if it is there; it is never seen half deleted."""
    folder = folder.absolute()
    clear_stale(folder)
    temporary = _temporary_name(folder)
    with suppress(OSError):
        os.rename(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def clear_stale(target: Path) -> None:
    """Delete what killed writers of `target` left, and put back what they had moved aside."""
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError):
            handle = os.open(temporary, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if not _lock(handle, wait=False):
                    continue  # its writer lives, or there are no locks here
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink()
            finally:
                os.close(handle)
    for aside in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        with suppress(OSError):
            if target.exists():
                shutil.rmtree(aside)
            else:
                os.rename(aside, target)


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


@contextmanager
def _temporary(target: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a locked temporary folder, or with `mode` a file, beside `target`; what is left of it is deleted."""
    check_target(target)
    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(target)
        temporary, lock = _locked_temporary(target, mode)
        try:
            yield temporary
        finally:
            if mode is None:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
            os.close(lock)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def _locked_temporary(target: Path, mode: int | None = None) -> tuple[Path, int]:
    """Make and lock a temporary folder, or with `mode` a file; again if another process has cleared it up before."""
    while True:
        temporary = _temporary_name(target)
        if mode is None:
            temporary.mkdir(0o700)
        else:
            temporary.touch(mode, exist_ok=False)
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            _lock(lock)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def _lock(handle: int, *, wait: bool = True) -> bool:
    """Lock an open file or folder until it is closed; returns whether that was possible."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another, or a file system without locks
        return False
    return True


def _move_into_place(temporary: Path, target: Path, replace: bool) -> None:
    for tried in range(_MAX_TRIES):
        if not _occupied(target):
            try:
                os.rename(temporary, target)  # also replaces an empty folder
                return
            except OSError:
                if not _occupied(target) or tried == _MAX_TRIES - 1:
                    raise
                continue  # another writer was first
        if not replace:
            return
        try:
            if not _exchange(temporary, target):
                _move_aside(temporary, target)
            return
        except FileNotFoundError:  # another writer has moved it aside, or deleted it
            if tried == _MAX_TRIES - 1:
                raise


def _move_aside(temporary: Path, target: Path) -> None:
    """Replace a folder in two steps."""
    aside = temporary.with_suffix(".old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if not _occupied(target):
            os.rename(aside, target)
        raise
    finally:
        if _occupied(target):
            shutil.rmtree(aside, ignore_errors=True)


def _occupied(target: Path) -> bool:
    try:
        return target.is_dir() and any(target.iterdir())
    except FileNotFoundError:
        return False


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; returns False where the system or file system cannot.

    Raises:
        OSError: if it can, and refuses.
    """
    system = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        call, arguments = getattr(system, "renamex_np", None), (*paths, _EXCHANGE)
    else:
        here = ctypes.c_int(-100)  # AT_FDCWD
        call, arguments = getattr(system, "renameat2", None), (here, paths[0], here, paths[1], _EXCHANGE)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _wrapped_errno(str(error))
        if code in _NO_SPACE:
            free = shutil.disk_usage(_existing(target)).free
            limit = " Files of this size are over a limit (ulimit -f)." if code == errno.EFBIG else ""
            raise OutputError(
                f"no disk space to write {target}: {free / 1e6:.0f} MB are free there.{limit} "
                "Free some space or choose another place; what was there before is unchanged."
            ) from error
        if isinstance(error, OSError) and code in _NOT_WRITABLE:
            raise OutputError(
                f"cannot write {target}: {error.strerror}. Choose a folder that this user may write to."
            ) from error
        raise


def _wrapped_errno(message: str) -> int | None:
    """Return the operating system's error number in the message of a SafetensorError."""
    if code := re.search(r"os error (\d+)", message):
        return int(code[1])
    return errno.ENOSPC if "No space left on device" in message else None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
