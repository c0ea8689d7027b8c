"""A policy in a YAML file, watched: read again when it changes, refused as a whole when anything in it is wrong.

    adapters:
      hp: {path: adapters/hp, sha256: 015a...}  # as `unlearn-peft inspect` tells it; may be left out
    tenants:
      acme: {forget: [hp], keys: [9f86...]}     # or forget: {hp: 0.5}; keys: the sha256 of each API key
                                                # and perhaps trusted_keys: {alice: -----BEGIN PUBLIC KEY-----...}

`recipes/serve/policy.yaml` explains each line.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ...errors import PolicyError, safe_repr
from .policy import Policy, make_policy

logger = logging.getLogger(__name__)
_MAX_BYTES = 16_000_000  # some 100,000 tenants
_SETTLE = 0.05  # seconds: longer than a tick of the clock that files are stamped by
_TRIES = 20


class PolicyFile:
    """A policy in a YAML file, read again when the file changes. A bad new one is refused, and the old one stays.

    A call of `current` that begins after a change never returns an older policy. Replace the file by renaming a
    whole one onto it: one that is written in place is read as soon as it has been still for 50 ms.

    Raises:
        PolicyError: when made, if the file cannot be used: there is no old policy then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._began = time.monotonic()
        try:
            self._seen, data = _settled(self.path)
        except OSError as error:
            raise PolicyError(_unreadable(self.path, error)) from None
        self._policy = parse_policy(data, str(self.path), self.path.parent)

    def current(self) -> Policy:
        """Return the newest good policy."""
        asked = time.monotonic()
        try:
            changed = _signature(os.stat(self.path)) != self._seen
        except OSError:
            changed = True
        if changed:
            with self._lock:
                if self._began <= asked:  # else another thread has looked meanwhile
                    self._began = time.monotonic()
                    self._reload()
        return self._policy

    @property
    def problem(self) -> str | None:
        """Why the newest file is not in use, or None."""
        return self._problem

    def _reload(self) -> None:
        problem = None
        try:
            seen, data = _settled(self.path)
            try:
                self._policy = parse_policy(data, str(self.path), self.path.parent)
            except PolicyError as error:
                problem = str(error)
            self._seen = seen
        except OSError as error:
            problem, self._seen = _unreadable(self.path, error), ()
        if problem and problem != self._problem:
            logger.warning("The policy stays as it was (%.12s): %s", self._policy.version, problem)
        elif not problem:
            logger.info("Policy %.12s: %d tenants", self._policy.version, len(self._policy.tenants))
        self._problem = problem


def read_policy(path: str | Path) -> Policy:
    """Read a policy from a YAML file; relative adapter paths start at its folder.

    Raises:
        PolicyError: if the file cannot be read or anything in it is wrong; all is told at once.
    """
    return PolicyFile(path).current()


def parse_policy(data: bytes, origin: str, folder: Path) -> Policy:
    """Read a policy from YAML; relative adapter paths start at `folder`.

    Raises:
        PolicyError: naming `origin` and all that is wrong, but no key.
    """
    if len(data) > _MAX_BYTES:
        raise PolicyError(f"{origin} is larger than {_MAX_BYTES / 1e6:.0f} MB: expected a policy")
    try:
        values = yaml.load(data, _Loader)  # noqa: S506  (a SafeLoader that refuses more)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise PolicyError(f"{origin} is not valid YAML{where}: {getattr(error, 'problem', 'unreadable')}") from None
    except (ValueError, RecursionError) as error:  # numbers, dates or nesting that Python refuses
        raise PolicyError(f"{origin} is not valid YAML ({type(error).__name__})") from None
    return make_policy(values, origin, folder)


def dump_policy(policy: Policy) -> str:
    """Return a policy as YAML; it reads back to the same version."""
    return yaml.dump(policy.model_dump(mode="json", exclude_none=True), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines, as public keys are, as such."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    """PyYAML's own in Python (the one in C crashes on deep nesting), without keys given twice or merged in."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            problem = None
            if key_node.tag == "tag:yaml.org,2002:merge":
                problem = "'<<' is not taken here: write the entries out"
            elif key is not None and key in seen:
                problem = f"{safe_repr(key)} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _settled(path: Path) -> tuple[tuple[int, ...], bytes]:
    """Return the file's signature and bytes, once nobody has written to it for a moment."""
    for _ in range(_TRIES):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        with path.open("rb") as stream:
            before = os.fstat(stream.fileno())
            if 0 <= time.time_ns() - before.st_mtime_ns < _SETTLE * 1e9:
                time.sleep(_SETTLE)
            data = stream.read(_MAX_BYTES + 1)
            after = os.fstat(stream.fileno())
            if (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size):
                return _signature(before), data
    raise OSError("it keeps changing; replace it as a whole, by renaming")


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unreadable(path: Path, error: OSError) -> str:
    told = f"cannot read the policy {path}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
        told += ". Expected a policy.yaml, or a .db that `unlearn-peft tenant add` begins"
    return told
