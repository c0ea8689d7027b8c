"""Sets of adapters on disk, each as one LoRA for vLLM, named by its contents: made on first use, verified on every use.

vLLM applies one LoRA to a request: in 0.32.0, the newest on PyPI in November 2026, `LoRARequest` (vllm/lora/request.py)
still has one name, one path and no strength, and several in one request are a proposal
(https://github.com/vllm-project/vllm/issues/51940). So a set is composed here.

vLLM reads a set's folder again whenever it has dropped the weights from memory, and its whole engine dies if the folder
is gone (seen with 0.32.0). So a folder is deleted only once no process uses it: whoever uses it holds a shared lock on
it, and `used_by` ties that lock to the life of the object through which vLLM knows the set.
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
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters.bundle import CONFIG, WEIGHTS, Bundle
from ...adapters.read import read_bundle
from ...adapters.transform.export_vllm import export_nothing, export_vllm
from ...errors import AdapterError, TrustError
from ...files.atomic import folder_bytes
from ...files.untrusted import list_files
from ...inference.adapter_cache import Applied
from ..policy.policy import Policy
from .lora_names import set_digest

if TYPE_CHECKING:
    from ...adapters.trust import Trust

logger = logging.getLogger(__name__)


class SetCache:
    """Composed sets below one folder, which only this user may write to; processes of a machine may share it.

    Beyond `budget_bytes`, sets are deleted, the least recently used first, but none that is in use: one stays for
    `grace` seconds after its last use, longer than any request runs. `max_rank` is vLLM's --max-lora-rank; `max_error`:
    see `export_vllm`.
    """

    def __init__(
        self, folder: Path, *, max_rank: int, max_error: float, budget_bytes: int, grace: float = 3600.0
    ) -> None:
        self.folder, self.max_rank, self.max_error = folder.absolute(), max_rank, max_error
        self.budget_bytes, self.grace = budget_bytes, grace
        self._digests: dict[Path, str] = {}  # of the weights that this process has made or verified
        self._locks: dict[Path, tuple[int, int]] = {}  # of the folders in use here: file descriptor, users
        self._ended: list[tuple[float, Path]] = []  # uses, and when they ended
        self._guard = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(
        self, forget: Mapping[str, float], policy: Policy, digest: str, base: str, trusts: Sequence[Trust] = ()
    ) -> Path:
        """Return the folder of a set, made now if it is missing or damaged; it is kept for `grace` seconds.

        Raises an AdapterError as `contents_of` does, and if the set has another digest, or if cutting it to `max_rank`
        would lose more than `max_error`.
        """
        contents = [(part.sha256, part.strength) for part in contents_of(forget, policy, trusts)]
        if set_digest(contents) != digest:
            raise AdapterError("the policy or an adapter has changed: this is no longer the set that was asked for")
        path = self.folder / f"{digest}-r{self.max_rank}-{sha256(base.encode()).hexdigest()[:8]}"
        with self._exclusive(path):
            if not self._is_intact(path, contents):
                if not forget:
                    export_nothing(path, base)
                else:
                    export_vllm(
                        [policy.adapters[name].path for name in forget], path, list(forget.values()),
                        max_rank=self.max_rank, base=base, max_error=self.max_error,
                    )  # fmt: skip
                if not self._is_intact(path, contents):  # its manifest says what was really read
                    shutil.rmtree(path, ignore_errors=True)
                    raise AdapterError("an adapter is not the one that the policy pins")
            self._lock(path)
        self._end_use(path)
        self._clean_up()
        return path

    def used_by(self, path: Path, user: object) -> None:
        """Keep a folder for as long as `user` lives, and `grace` seconds more."""
        self._lock(path)
        weakref.finalize(user, self._end_use, path)

    def _is_intact(self, path: Path, contents: Sequence[tuple[str, float]]) -> bool:
        """Return whether a set's folder exists, undamaged, made of these contents with these strengths."""
        if not path.is_dir():
            return False
        try:
            bundle = read_bundle(path)
            parts = [(part["identity"], part["strength"]) for part in bundle.manifest["stack_of"]]
            fits = sorted(parts) == sorted(contents) and WEIGHTS in bundle.manifest["files"]
        except (AdapterError, KeyError, TypeError) as error:
            logger.warning("the cached set %s cannot be used and is made again: %s", path, error)
            return False
        if not fits or self._digests.setdefault(path, bundle.digest) != bundle.digest:
            logger.warning("the cached set %s is not the one that was written, and is made again", path)
            return False
        os.utime(path)
        return True

    @contextmanager
    def _exclusive(self, path: Path, flags: int = 0) -> Iterator[None]:
        """Only one thread of all processes makes or deletes a set at a time."""
        with (self.folder / f".lock-{path.name[0]}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | flags)
            yield

    def _lock(self, path: Path) -> None:
        with self._guard:
            handle, users = self._locks.get(path, (-1, 0))
            if handle < 0 or os.fstat(handle).st_ino != path.stat().st_ino:  # it may have been made again meanwhile
                old, handle = handle, os.open(path, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_SH)
                if old >= 0:
                    os.close(old)
            self._locks[path] = handle, users + 1

    def _end_use(self, path: Path) -> None:
        self._ended.append((time.monotonic(), path))  # no lock: this may run inside the garbage collector

    def _clean_up(self) -> None:
        """Unlock the sets whose use ended `grace` seconds ago, and delete those beyond the budget."""
        now = time.monotonic()
        with self._guard:
            for ended, path in list(self._ended):
                if now - ended < self.grace:
                    continue
                self._ended.remove((ended, path))
                handle, users = self._locks.pop(path)
                if users == 1:
                    os.close(handle)
                else:
                    self._locks[path] = handle, users - 1
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
        """Delete a set unless it is in use; returns whether it was."""
        try:
            with self._exclusive(path, fcntl.LOCK_NB):
                handle = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(handle)
        except OSError:
            return False
        self._digests.pop(path, None)
        return True


def digest_of(forget: Mapping[str, float], policy: Policy) -> str:
    """Return a set's digest under a policy (see `contents_of`)."""
    return set_digest((part.sha256, part.strength) for part in contents_of(forget, policy))


def contents_of(forget: Mapping[str, float], policy: Policy, trusts: Sequence[Trust] = ()) -> tuple[Applied, ...]:
    """Return the contents that the policy pins, or else those of the files on disk.

    With `trusts`, the files are read in any case: they must be what the policy pins, and signed as each of `trusts`
    requires; the last one that knows the signer gives the name. Whoever applies this identity then applies weights and
    a config that were signed, wherever they are read again.

    Raises:
        AdapterError: one cannot be read (a pinned one is only read with `trusts`), or is refused; `adapter` names it.
    """
    return tuple(_content_of(name, strength, policy, trusts) for name, strength in forget.items())


def _content_of(name: str, strength: float, policy: Policy, trusts: Sequence[Trust]) -> Applied:
    entry = policy.adapters[name]
    if entry.sha256 is not None and not trusts:
        return Applied(name, entry.sha256, strength)
    try:
        names = list_files(Path(entry.path)) if trusts else (WEIGHTS, CONFIG)
        bundle = _read(entry.path, _file_stats(entry.path, names))
        if entry.sha256 not in (None, bundle.identity):
            raise AdapterError(f"the adapter in {entry.path} is not the one that the policy pins")
        applied = Applied(name, bundle.identity, strength)
        for trust in trusts:
            applied = applied._replace(signed_by=trust.check(bundle) or applied.signed_by)
        return applied
    except OSError as error:
        problem = AdapterError(f"no adapter at {entry.path} ({error.strerror})")
    except AdapterError as error:
        problem = error
    except TrustError as error:  # what verifies is missing, or Sigstore cannot be reached
        problem = AdapterError(f"the signature of the adapter {entry.path} cannot be checked: {error}")
    problem.adapter = name
    raise problem


def _file_stats(path: str, names: Iterable[str]) -> tuple[tuple[str | int, ...], ...]:
    """Return what changes when one of these files does."""
    stats = [(name, (Path(path) / name).stat()) for name in names]
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


@lru_cache(maxsize=10_000)
def _read(path: str, _: tuple[tuple[str | int, ...], ...]) -> Bundle:
    return replace(read_bundle(path), config={}, deltas={}, manifest={})
