"""A policy in a YAML file, which is read again when it changes. `recipes/serve/policy.yaml` explains each line.

adapters:
  hp: {path: adapters/hp, sha256: 015a...}
tenants:
  acme: {forget: [hp], keys: [9f86...]}
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from ...errors import PolicyError
from ...files.strict_yaml import MAX_YAML_BYTES, parse_yaml
from .policy import Policy, make_policy, without_keys

logger = logging.getLogger(__name__)
_SETTLE = 0.05  # seconds: longer than a tick of the clock that files are stamped by
_TRIES = 20


class PolicyFile:
    """A policy in a YAML file, read again when the file changes; if the new one is wrong, the old one stays.

    A file that is deleted or cannot be read serves for `grace` seconds more, then nobody is served: whoever took it
    away may have meant that; so a wrong one in its place changes nothing about it. A call of `current` that begins
    after a change never returns an older policy. Replace the file by renaming a whole one onto it: one that is written
    in place is read once it has not changed for 50 ms.

    Raises:
        PolicyError: the file cannot be used at first: there is no old policy then.
    """

    def __init__(self, path: str | Path, *, grace: float = 30.0) -> None:
        self.path, self.grace = Path(path).absolute(), grace
        self._gone_at: float | None = None  # since when it cannot be read
        self.problem: str | None = None  # see `PolicySource`
        self._lock = threading.Lock()
        self._read_at = time.monotonic()
        try:
            self._last_stat, data = _read_settled(self.path)
        except OSError as error:
            raise PolicyError(_unreadable(self.path, error)) from None
        self._policy = parse_policy(data, str(self.path), self.path.parent)

    def current(self) -> Policy:
        """Return the newest valid policy.

        Raises:
            PolicyError: the file cannot be read for longer than `grace`.
        """
        called = time.monotonic()
        try:
            changed = _stat_key(os.stat(self.path)) != self._last_stat
        except OSError:
            changed = True
        if changed:
            with self._lock:
                if self._read_at <= called:  # else another thread has just read it
                    self._read_at = time.monotonic()
                    self._reload()
        if self._gone_at is not None and time.monotonic() - self._gone_at > self.grace:
            gone = PolicyError(
                f"{self.problem}. It was taken away more than {self.grace:g} s ago: nobody is served until a valid one "
                "is there"
            )
            gone.public = "the policy file cannot be read"
            raise gone
        return self._policy

    def _reload(self) -> None:
        problem = None
        try:
            stat_key, data = _read_settled(self.path)
            try:
                self._policy = parse_policy(data, str(self.path), self.path.parent)
                self._gone_at = None
            except PolicyError as error:
                problem = str(error)
            self._last_stat = stat_key
        except OSError as error:
            problem, self._last_stat = _unreadable(self.path, error), ()
            self._gone_at = self._read_at if self._gone_at is None else self._gone_at
        if problem and problem != self.problem:
            logger.warning("The policy stays as it was (%.12s): %s", self._policy.version, problem)
        elif not problem:
            logger.info("Policy %.12s: %d tenants", self._policy.version, len(self._policy.tenants))
        self.problem = problem


def read_policy(path: str | Path) -> Policy:
    """Read a policy from a YAML file; relative adapter paths start at its folder.

    Raises:
        PolicyError: the file cannot be read, or naming everything that is wrong in it.
    """
    return PolicyFile(path).current()


def parse_policy(data: bytes, origin: str, folder: Path) -> Policy:
    """Read a policy from YAML; see `make_policy`."""
    try:
        values = parse_yaml(data)
    except ValueError as error:
        raise PolicyError(f"{origin} is not valid YAML: {without_keys(str(error))}") from None
    return make_policy(values, origin, folder)


def dump_policy(policy: Policy) -> str:
    """Return a policy as YAML that reads back to the same version."""
    content = policy.dump()
    for entries in content.values():
        for name, entry in entries.items():
            defaults: dict[str, Any] = {
                "sha256": None, "probes": None, "canary": None, "trusted_keys": None, "may_add": {}, "quotas": {},
                "prefix_cache": True,
            }  # fmt: skip
            if keys := entry.get("keys"):
                settings = {key: {f: v for f, v in more.items() if v is not None} for key, more in keys.items()}
                entry["keys"] = settings if any(settings.values()) else list(keys)
            entries[name] = {field: value for field, value in entry.items() if value != defaults.get(field, ...)}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text, such as public keys, as a block."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _read_settled(path: Path) -> tuple[tuple[int, ...], bytes]:
    """Return what tells versions of the file apart, and its bytes, once nobody has written to it for a moment."""
    for _ in range(_TRIES):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        with path.open("rb") as stream:
            before = os.fstat(stream.fileno())
            if 0 <= time.time_ns() - before.st_mtime_ns < _SETTLE * 1e9:
                time.sleep(_SETTLE)
            data = stream.read(MAX_YAML_BYTES + 1)
            after = os.fstat(stream.fileno())
            if (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size):
                return _stat_key(before), data
    raise OSError("it keeps changing; replace it as a whole, by renaming")


def _stat_key(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _unreadable(path: Path, error: OSError) -> str:
    hint = ". Expected a policy.yaml, or a .db that `unlearn-peft tenant add` makes"
    return f"cannot read the policy {path}: {error.strerror or error}{hint * isinstance(error, FileNotFoundError)}"
