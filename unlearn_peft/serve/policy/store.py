"""A policy in a database: SQLite in its own file, or any database that SQLAlchemy reaches by URL.

An edit is one transaction: it takes the store's lock, edits the content, validates the whole policy, writes the rows
that differ and one row of history, and increases the revision, by which readers notice it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partialmethod
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from ...errors import PolicyError, safe_repr
from . import edits, tables
from .edits import Content
from .policy import Policy, PolicySource, key_digest, make_policy, new_key
from .tables import PATIENCE, SQLAlchemyError
from .yaml_file import PolicyFile

logger = logging.getLogger(__name__)
_RETRY = 1.0  # seconds between attempts to reach a database that could not be reached


@dataclass(frozen=True)
class Change:
    """One row of the history."""

    revision: int
    at: str  # UTC, ISO 8601
    who: str
    action: str
    what: dict[str, Any]
    why: str


class PolicyStore:
    """A policy in a database. Safe for many threads, processes and servers.

    If the database cannot be reached for longer than `grace` seconds, `current` raises, so that nobody is served under
    a policy that may be outdated.

    Args:
        where: path of an SQLite file, or a URL.
        create: create the file and the tables if they do not exist.
        grace: seconds.

    Raises:
        PolicyError: there is no store, or its database cannot be reached.
    """

    def __init__(self, where: str | Path, *, create: bool = False, grace: float = 30.0) -> None:
        self.grace = grace
        self._engine = tables.open_engine(str(where), create)
        self._name = tables.describe(self._engine)
        self._reads, self._writes = self._engine, self._engine.execution_options(write=True)
        self._file: Path | None = None
        if self._engine.dialect.name == "sqlite":
            self._file = Path(self._name)
        else:  # all of a transaction sees one state, as it always does in SQLite
            self._reads = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._inode = 0
        self._lock = threading.Lock()
        self._policy: Policy | None = None
        self._last_state: object = None
        self._unreachable: str | None = None
        self._refused: str | None = None
        self._read_at = self._confirmed_at = self._retry_at = -inf

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def current(self) -> Policy:
        """Return the policy as the database has it now, or the last one, for `grace` seconds.

        Raises:
            PolicyError: the database has confirmed no policy for longer, or never held a valid one.
        """
        called = monotonic()
        if self._lock.acquire(timeout=PATIENCE):
            try:
                if self._read_at <= called and monotonic() >= self._retry_at:  # else another thread has just read
                    self._read_at = monotonic()
                    self._refresh()
            finally:
                self._lock.release()
        else:
            self._set_unreachable("it does not answer")
        if self._policy is None or (self._unreachable and monotonic() - self._confirmed_at > self.grace):
            raise PolicyError(
                f"the store {self._name} cannot be reached ({self._unreachable}), and confirmed no policy in the last "
                f"{self.grace:g} s: nobody is served until it can be reached again"
            )
        return self._policy

    @property
    def problem(self) -> str | None:
        """Why the newest version is not in use, or is unknown; or None."""
        if self._unreachable:
            return f"the store {self._name} cannot be reached: {self._unreachable}"
        return self._refused

    def history(self, limit: int | None = None) -> list[Change]:
        """Return the changes, the newest first.

        Raises:
            PolicyError: the database cannot be reached.
        """
        try:
            with self._reads.connect() as connection:
                return [Change(**row) for row in tables.read_history(connection, limit)]
        except SQLAlchemyError as error:
            raise PolicyError(f"cannot read the store {self._name}: {tables.reason(error)}") from None

    def edit(self, action: str, edit: Callable[..., Content], *arguments: object, who: str, why: str = "") -> int:
        """Apply one of `edits` in a transaction, record it in the history as `action`, and return the revision.

        Raises:
            PolicyError: the edit or what it leads to is refused, or the database did not confirm it.
        """
        who, why = _one_line("who", who, 200), _one_line("why", why, 2000)
        if not who:
            raise PolicyError("expected who makes the change")
        try:
            with self._lock:
                self._follow_file()
            with self._writes.begin() as connection:
                revision = tables.begin_change(connection)
                before = tables.read(connection)
                after = deepcopy(before)
                what = edit(after, *arguments)
                tables.write(connection, before, make_policy(after, "the changed policy").model_dump())
                at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
                row = {"revision": revision, "at": at, "who": who, "action": action, "what": what, "why": why}
                tables.note_change(connection, row)
        except (SQLAlchemyError, OSError) as error:
            raise PolicyError(
                f"the store {self._name} did not confirm the change: {tables.reason(error)}. It is made wholly or not "
                "at all: see the history"
            ) from None
        return revision

    # each takes the arguments of its edit, `who` and `why`, and returns the revision
    add = partialmethod(edit, "add", edits.add)
    remove = partialmethod(edit, "remove", edits.remove)
    forget = partialmethod(edit, "forget", edits.forget)
    unforget = partialmethod(edit, "unforget", edits.unforget)
    adapter = partialmethod(edit, "adapter", edits.adapter)
    unadapter = partialmethod(edit, "unadapter", edits.unadapter)
    revoke_key = partialmethod(edit, "revoke", edits.revoke_key)
    trust = partialmethod(edit, "trust", edits.trust)
    untrust = partialmethod(edit, "untrust", edits.untrust)
    replace = partialmethod(edit, "import", edits.replace)

    def add_key(self, tenant: str, *, who: str, why: str = "") -> str:
        """Make an API key for a tenant and return it; the store keeps its sha256 only."""
        key = new_key()
        self.edit("key", edits.add_key, tenant, key_digest(key), who=who, why=why)
        return key

    def _refresh(self) -> None:
        content: Content | None = None
        try:
            self._follow_file()
            with self._reads.connect() as connection:
                state = tables.state_of(connection)
                if state != self._last_state:
                    content = tables.read(connection)
        except (SQLAlchemyError, OSError) as error:
            self._retry_at = monotonic() + _RETRY
            self._set_unreachable(tables.reason(error))
            return
        if self._unreachable:
            logger.info("The store %s is reached again", self._name)
        self._confirmed_at, self._unreachable = self._read_at, None
        if content is None:
            return
        try:
            self._policy = make_policy(content, f"revision {state[0]} of the store {self._name}")
            self._refused = None
        except PolicyError as error:
            if self._policy is None:
                raise
            self._refused = str(error)
            logger.warning("The policy stays as it was (%.12s): %s", self._policy.version, error)
        self._last_state = state

    def _set_unreachable(self, why: str) -> None:
        if not self._unreachable:
            logger.warning("The store %s cannot be reached: %s", self._name, why)
        self._unreachable = why

    def _follow_file(self) -> None:
        """Reopen SQLite's file if another has replaced it: open connections would go on with the old one."""
        if self._file and (inode := self._file.stat().st_ino) != self._inode:
            self._engine.dispose()
            self._inode = inode


def open_policy(where: str, *, grace: float = 30.0) -> PolicySource:
    """Open a policy: a .yaml or .yml file, an SQLite store (.db, .sqlite, .sqlite3), or a database's URL.

    Raises:
        PolicyError: it is none of these, or cannot be used.
    """
    if "://" not in where and where.endswith((".yaml", ".yml")):
        return PolicyFile(where)
    if "://" in where or where.endswith((".db", ".sqlite", ".sqlite3")):
        store = PolicyStore(where, grace=grace)
        store.current()
        return store
    raise PolicyError(
        f"{safe_repr(where)} is no policy: expected a .yaml file, a .db file, or a URL such as postgresql://..."
    )


def _one_line(field: str, text: str, limit: int) -> str:
    text = text.strip()
    if not text.isprintable() or len(text) > limit:
        raise PolicyError(f"'{field}' must be one line of at most {limit} characters")
    return text
