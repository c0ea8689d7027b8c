"""Writes that are whole or not there at all: into a temporary sibling, flushed to disk, then renamed.

A writer holds a lock on its temporary as long as it lives. What a killed one leaves behind is locked by nobody, and the
next writer of the same name deletes it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError

try:
    import fcntl
except ImportError:  # not on Windows: temporaries are then not locked, and never cleared
    fcntl = None  # type: ignore[assignment]


_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)
_TRIES = 20  # other writers of the same name may come in between


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    With `replace`, an old `target` changes places with the new one in one step, so that there is always a whole one,
    and is deleted then. (Where the file system cannot do that, it is moved aside first: a crash in between leaves it
    whole beside, and the next writer puts it back.) Without it, a `target` that someone else finished meanwhile is kept
    as it is.

    Raises:
        OutputError: if the disk is full or the place is not writable.
    """
    target = target.absolute()
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(target)
        temporary, lock = _locked_folder(target)
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
        os.close(lock)


@contextmanager
def atomic_file(target: Path, *, mode: int | None = None, replace: bool = True) -> Iterator[Path]:
    """Yield the path of an empty temporary that takes the place of the file `target` when the block ends without error.

    Args:
        target: the file.
        mode: its permissions; None: those of the file that is replaced, of a new one as the umask says.
        replace: False: of several writers the first one's file stays.

    Raises:
        OutputError: if the disk is full or the place is not writable.
    """
    target = target.absolute()
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(target)
        temporary, lock = _locked_file(target, 0o666 if mode is None else mode)
    try:
        with _explained(target):
            kept = (target if mode is None and target.is_file() else temporary).stat().st_mode & 0o777
            yield temporary
            os.chmod(temporary, kept)  # safetensors puts a file of its own into its place
            flush(temporary)
            if replace:
                os.replace(temporary, target)
            else:
                with suppress(FileExistsError):
                    os.link(temporary, target)
            flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def delete_atomically(folder: Path) -> None:
    """Delete a folder that is never seen half deleted, if it is there."""
    folder = folder.absolute()
    clear_stale(folder)
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    with suppress(OSError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_stale(target: Path) -> None:
    """Delete what killed writers of `target` left behind, and put back what they had moved aside."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if not _lock(handle, wait=False):
                    continue  # its writer lives, or there are no locks here
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()
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


def _locked_folder(target: Path) -> tuple[Path, int]:
    """Make a temporary folder and lock it; another process that clears up may come in between."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            _lock(lock)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def _locked_file(target: Path, mode: int) -> tuple[Path, int]:
    """Make a temporary file and lock it, likewise."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        _lock(lock)
        if temporary.exists():
            return temporary, lock
        os.close(lock)


def _lock(handle: int, *, wait: bool = True) -> bool:
    """Lock an open file or folder until it is closed; returns False if that is not possible."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another, or a file system without locks
        return False
    return True


def _move_into_place(temporary: Path, target: Path, replace: bool) -> None:
    for tried in range(_TRIES):
        if not _occupied(target):
            try:
                os.rename(temporary, target)  # also replaces an empty folder
                return
            except OSError:
                if not _occupied(target) or tried == _TRIES - 1:
                    raise
                continue  # another writer was first
        if not replace:
            return
        try:
            if not _swapped(temporary, target):
                _move_aside(temporary, target)
            return
        except FileNotFoundError:  # another writer has moved it aside, or deleted it
            if tried == _TRIES - 1:
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


def _swapped(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; returns False where the system or file system cannot.

    Raises:
        OSError: if it can, and refuses.
    """
    system = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        call, arguments = getattr(system, "renamex_np", None), (*paths, _SWAP)
    else:
        here = ctypes.c_int(-100)  # AT_FDCWD
        call, arguments = getattr(system, "renameat2", None), (here, paths[0], here, paths[1], _SWAP)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(_existing(target)).free
            limit = " Files of this size are over a limit (ulimit -f)." if error.errno == errno.EFBIG else ""
            raise OutputError(
                f"no disk space to write {target}: {free / 1e6:.0f} MB are free there.{limit} "
                "Free some space or choose another place; what was there before is unchanged."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(
                f"cannot write {target}: {error.strerror}. Choose a folder that this user may write to."
            ) from error
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's text inside.
        if any(
            text in str(error) for text in ("No space left on device", "os error 28", "os error 27", "os error 122")
        ):
            raise OutputError(
                f"no disk space to write {target}. Free some space or choose another place; "
                "what was there before is unchanged."
            ) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
