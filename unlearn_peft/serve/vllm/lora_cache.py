"""Sets on disk, each as one LoRA for vLLM, named by what it is made of: made when first asked for, verified always.

vLLM reads a set's folder again whenever it has dropped the weights from memory, without asking anyone, and its whole
engine dies if the folder is gone (seen with 0.32.0). So a folder is deleted only once no process uses it: whoever uses
it holds a shared lock on it, and `used_by` ties that lock to the life of the object through which vLLM knows the set.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...adapters.bundle import CONFIG, WEIGHTS
from ...adapters.read import read_bundle
from ...adapters.transform.export_vllm import export_nothing, export_vllm
from ...errors import AdapterError, TrustError, refuse
from ...files.atomic import folder_bytes
from ...files.untrusted import list_files
from ..policy.policy import Policy
from .lora_names import set_digest

if TYPE_CHECKING:
    from ...adapters.trust import Trust


logger = logging.getLogger(__name__)


class SetCache:
    """Composed sets below one folder, which only this user may write to.

    Args:
        folder: where they lie; several processes of a machine may share it.
        max_rank: vLLM's --max-lora-rank.
        max_error: refuse a set of which truncation would lose more (see `export_vllm`).
        budget_bytes: delete sets beyond this, the longest unused first, but none that is in use.
        grace: seconds that a set stays after vLLM has let go of it: longer than any request runs.
    """

    def __init__(
        self, folder: Path, *, max_rank: int, max_error: float, budget_bytes: int, grace: float = 3600.0
    ) -> None:
        self.folder, self.max_rank, self.max_error = folder.absolute(), max_rank, max_error
        self.budget_bytes, self.grace = budget_bytes, grace
        self._digests: dict[Path, str] = {}  # of the weights that this process has made or verified
        self._locks: dict[Path, tuple[int, int]] = {}  # of the folders in use here: file descriptor, users
        self._left: list[tuple[float, Path]] = []  # when a user went
        self._guard = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(
        self, forget: Mapping[str, float], policy: Policy, digest: str, base: str, trusts: Sequence[Trust] = ()
    ) -> Path:
        """Return the folder of a set, made now if it is not there or not whole. It is kept for `grace` seconds.

        Raises:
            AdapterError: if an adapter cannot be used, is not the one that the policy pins or is not signed as each of
                `trusts` asks for, if the set is another than `digest` says, or cannot be cut down to the rank limit
                without losing too much.
        """
        wanted = [(content_of(name, policy, trusts).identity, strength) for name, strength in forget.items()]
        if set_digest(wanted) != digest:
            raise AdapterError("the policy or an adapter has changed: this is no longer the set that was asked for")
        path = self.folder / f"{digest}-r{self.max_rank}-{sha256(base.encode()).hexdigest()[:8]}"
        with self._making(path):
            if not self._whole(path, wanted):
                if not forget:
                    export_nothing(path, base)
                else:
                    export_vllm(
                        [policy.adapters[name].path for name in forget], path, list(forget.values()),
                        max_rank=self.max_rank, base=base, max_error=self.max_error,
                    )  # fmt: skip
                if not self._whole(path, wanted):  # its manifest says what was really read
                    shutil.rmtree(path, ignore_errors=True)
                    raise AdapterError("an adapter is not the one that the policy pins")
            self._take(path)
        self._leave(path)
        self._tidy()
        return path

    def used_by(self, path: Path, user: object) -> None:
        """Keep a folder for as long as `user` lives, and `grace` seconds more."""
        self._take(path)
        weakref.finalize(user, self._leave, path)

    def _whole(self, path: Path, wanted: Sequence[tuple[str, float]]) -> bool:
        """Return whether a set's folder is there, undamaged, and made of these contents with these strengths."""
        if not path.is_dir():
            return False
        try:
            bundle = read_bundle(path)
            parts = [(part["identity"], part["strength"]) for part in bundle.manifest["stack_of"]]
            fits = sorted(parts) == sorted(wanted) and WEIGHTS in bundle.manifest["files"]
        except (AdapterError, KeyError, TypeError) as error:
            logger.warning("the cached set %s cannot be used and is made again: %s", path, error)
            return False
        if not fits or self._digests.setdefault(path, bundle.digest) != bundle.digest:
            logger.warning("the cached set %s is not the one that was written, and is made again", path)
            return False
        os.utime(path)
        return True

    @contextmanager
    def _making(self, path: Path) -> Iterator[None]:
        """One at a time makes or deletes a set, of all threads and processes."""
        with (self.folder / f".lock-{path.name[0]}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _take(self, path: Path) -> None:
        with self._guard:
            handle, users = self._locks.get(path, (-1, 0))
            if handle < 0 or os.fstat(handle).st_ino != path.stat().st_ino:  # it may have been made again meanwhile
                old, handle = handle, os.open(path, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_SH)
                if old >= 0:
                    os.close(old)
            self._locks[path] = handle, users + 1

    def _leave(self, path: Path) -> None:
        self._left.append((time.monotonic(), path))  # no lock: this may run inside the garbage collector

    def _tidy(self) -> None:
        """Let go of what nobody has used for a while, and delete what is over the budget."""
        now = time.monotonic()
        with self._guard:
            over = [entry for entry in list(self._left) if now - entry[0] >= self.grace]
            for entry in over:
                self._left.remove(entry)
                handle, users = self._locks[entry[1]]
                if users == 1:
                    os.close(handle)
                    del self._locks[entry[1]]
                else:
                    self._locks[entry[1]] = handle, users - 1
        paths = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: folder_bytes(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime)}
        excess = sum(sizes.values()) - self.budget_bytes
        for path, size in sizes.items():
            if excess <= 0:
                return
            if self._delete(path):
                excess -= size
        if excess > 0:
            logger.warning("the sets in use take %.1f MB more than their budget", excess / 1e6)

    def _delete(self, path: Path) -> bool:
        """Delete a set unless someone uses it."""
        with (self.folder / f".lock-{path.name[0]}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                handle = os.open(path, os.O_RDONLY)
            except OSError:
                return False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            except OSError:
                return False
            finally:
                os.close(handle)
        self._digests.pop(path, None)
        return True


def digest_of(forget: Mapping[str, float], policy: Policy) -> str:
    """Return a set's digest as the policy has it now: of the pinned contents, or else of what lies on the disk.

    Raises:
        AdapterError: if an adapter that is not pinned cannot be read; `adapter` names it.
    """
    return set_digest((content_of(name, policy).identity, strength) for name, strength in forget.items())


class Content(NamedTuple):
    """What an adapter is: its identity, and who signed it, if that was asked for."""

    identity: str
    signed_by: str | None = None


def content_of(name: str, policy: Policy, trusts: Sequence[Trust] = ()) -> Content:
    """Return an adapter's content: what the policy pins, or else the identity of what lies on the disk.

    With `trusts`, what lies on the disk is read in any case: it must be what the policy pins, and signed as each of
    them asks for. The last one that knows who signed gives the name. Whoever applies this identity then applies weights
    and a config that were signed, wherever they are read again.

    Raises:
        AdapterError: if it cannot be read (pinned ones are only read with `trusts`), or is refused; `adapter` names it.
    """
    entry = policy.adapters[name]
    if entry.sha256 is not None and not trusts:
        return Content(entry.sha256)
    try:
        if not trusts:
            return Content(_read(entry.path, _marks(entry.path, (WEIGHTS, CONFIG))).identity)
        read = _read(entry.path, _marks(entry.path, list_files(Path(entry.path))))
        if entry.sha256 not in (None, read.identity):
            raise AdapterError(f"the adapter in {entry.path} is not the one that the policy pins")
        signed_by = None
        for trust in trusts:
            problems, signer = trust.problems(dict(read.files), read.signature)
            if problems:
                refuse(f"the adapter {entry.path} is not to be trusted", problems)
            signed_by = signer or signed_by
        return Content(read.identity, signed_by)
    except OSError as error:
        problem = AdapterError(f"no adapter at {entry.path} ({error.strerror})")
    except AdapterError as error:
        problem = error
    except TrustError as error:  # what verifies is missing, or Sigstore cannot be reached
        problem = AdapterError(f"whether the adapter {entry.path} is to be trusted cannot be told: {error}")
    problem.adapter = name
    raise problem


class _Read(NamedTuple):
    identity: str
    files: tuple[tuple[str, str], ...]  # name, sha256
    signature: bytes | None


def _marks(path: str, names: Iterable[str]) -> tuple[tuple[str | int, ...], ...]:
    """What changes when one of these files does."""
    found = [(name, (Path(path) / name).stat()) for name in names]
    return tuple((name, m.st_ino, m.st_size, m.st_mtime_ns, m.st_ctime_ns) for name, m in found)


@lru_cache(maxsize=10_000)
def _read(path: str, _: tuple[tuple[str | int, ...], ...]) -> _Read:
    bundle = read_bundle(path)
    return _Read(bundle.identity, tuple(sorted(bundle.files.items())), bundle.signature)
