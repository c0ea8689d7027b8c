"""A policy in a database: SQLite in a file of its own, or any database that SQLAlchemy reaches by URL.

Changes come in, each with who and why; policies go out. A change is one transaction: it takes the store's lock, edits
the content, checks the whole as a policy, writes the rows that differ and one row of history, and counts up the
revision, by which readers notice it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from ...errors import PolicyError, safe_repr
from . import edits
from .edits import Content
from .policy import Policy, PolicySource, key_digest, make_policy, new_key
from .tables import (
    PATIENCE,
    SQLAlchemyError,
    begin_change,
    describe,
    note_change,
    open_engine,
    read,
    read_history,
    reason,
    state_of,
    write,
)
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

    A policy is used for at most `grace` seconds after the database last confirmed it: if the database cannot be
    reached for longer, `current` raises, and nobody is served under a policy that may be outdated.

    Args:
        where: path of an SQLite file, or a URL.
        create: make the file and the tables where they are not there.
        grace: seconds.

    Raises:
        PolicyError: when made, if there is no store, or its database cannot be reached.
    """

    def __init__(self, where: str | Path, *, create: bool = False, grace: float = 30.0) -> None:
        self.grace = grace
        self._engine = open_engine(str(where), create)
        self._name = describe(self._engine)
        self._reads, self._writes = self._engine, self._engine.execution_options(write=True)
        self._file: Path | None = None
        if self._engine.dialect.name == "sqlite":
            self._file = Path(self._name)
        else:  # all of a transaction sees one state, as it always does in SQLite
            self._reads = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._inode = 0
        self._lock = threading.Lock()
        self._policy: Policy | None = None
        self._seen: object = None  # the state that was looked at last
        self._unreachable: str | None = None
        self._refused: str | None = None
        self._began = self._reached = -inf
        self._again = -inf

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def current(self) -> Policy:
        """Return the newest policy: one that is as new as the call, or the last one, for `grace` seconds.

        Raises:
            PolicyError: the database has not confirmed a policy for longer, or never held a valid one.
        """
        asked = monotonic()
        if self._lock.acquire(timeout=PATIENCE):
            try:
                if self._began <= asked and monotonic() >= self._again:  # else another thread has looked meanwhile
                    self._began = monotonic()
                    self._look()
            finally:
                self._lock.release()
        else:
            self._lose("it does not answer")
        if self._policy is None or (self._unreachable and monotonic() - self._reached > self.grace):
            raise PolicyError(
                f"the store {self._name} cannot be reached ({self._unreachable}), and confirmed no policy in the last "
                f"{self.grace:g} s: nobody is served until it can be reached again"
            )
        return self._policy

    @property
    def problem(self) -> str | None:
        """Why the newest version is not in use, or cannot be told, or None."""
        if self._unreachable:
            return f"the store {self._name} cannot be reached: {self._unreachable}"
        return self._refused

    def _look(self) -> None:
        content: Content | None = None
        try:
            self._follow_file()
            with self._reads.connect() as connection:
                state = state_of(connection)
                if state != self._seen:
                    content = read(connection)
        except (SQLAlchemyError, OSError) as error:
            self._again = monotonic() + _RETRY
            self._lose(reason(error))
            return
        if self._unreachable:
            logger.info("The store %s is reached again", self._name)
        self._reached, self._unreachable = self._began, None
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
        self._seen = state

    def _lose(self, why: str) -> None:
        if not self._unreachable:
            logger.warning("The store %s cannot be reached: %s", self._name, why)
        self._unreachable = why

    def _follow_file(self) -> None:
        """Open SQLite's file anew where another was put into its place: open connections would go on with the old."""
        if self._file and (inode := self._file.stat().st_ino) != self._inode:
            self._engine.dispose()
            self._inode = inode

    def add(self, tenant: str, *, who: str, why: str = "") -> int:
        """Add a tenant that has nothing forgotten and no key yet; return the revision.

        Raises:
            PolicyError: it is there already, or the name is none. So do all changes, for what does not fit.
        """
        return self._change("add", who, why, edits.add, tenant)

    def remove(self, tenant: str, *, who: str, why: str = "") -> int:
        """Remove a tenant with its keys: nobody is served under its name any more. Return the revision."""
        return self._change("remove", who, why, edits.remove, tenant)

    def forget(self, tenant: str, adapter: str, strength: float = 1.0, *, who: str, why: str = "") -> int:
        """Have an adapter forgotten for a tenant, or change its strength; return the revision."""
        return self._change("forget", who, why, edits.forget, tenant, adapter, strength)

    def unforget(self, tenant: str, adapter: str, *, who: str, why: str = "") -> int:
        """Have an adapter no longer forgotten for a tenant; return the revision."""
        return self._change("unforget", who, why, edits.unforget, tenant, adapter)

    def adapter(self, name: str, path: str | Path, sha256: str | None, *, who: str, why: str = "") -> int:
        """Name the adapter at `path`, or put another one into a name's place; return the revision.

        Args:
            name: the adapter's name in the policy.
            path: its directory, the same on every server; made absolute.
            sha256: what its `Bundle.identity` must be when it is loaded; None: whatever it is.
            who: who does it.
            why: the reason.
        """
        return self._change("adapter", who, why, edits.adapter, name, path, sha256)

    def unadapter(self, name: str, *, who: str, why: str = "") -> int:
        """Take an adapter's name away; return the revision. A tenant that has it forgotten keeps it from going."""
        return self._change("unadapter", who, why, edits.unadapter, name)

    def add_key(self, tenant: str, *, who: str, why: str = "") -> str:
        """Make an API key for a tenant and return it. It is not kept: only its sha256 is."""
        key = new_key()
        self._change("key", who, why, edits.add_key, tenant, key_digest(key))
        return key

    def revoke_key(self, tenant: str, which: str, *, who: str, why: str = "") -> int:
        """Take a key away from a tenant; return the revision.

        Args:
            tenant: its name.
            which: the key, its digest, or the first 8 or more digits of that.
            who: who does it.
            why: the reason.
        """
        return self._change("revoke", who, why, edits.revoke_key, tenant, which)

    def trust(self, tenant: str, keys: Mapping[str, str], *, who: str, why: str = "") -> int:
        """Have a tenant trust public keys, and no adapter that none of its keys has signed; return the revision.

        Args:
            tenant: its name.
            keys: PEM by name, beside those that it trusts already.
            who: who does it.
            why: the reason.
        """
        return self._change("trust", who, why, edits.trust, tenant, keys)

    def untrust(self, tenant: str, name: str | None, *, who: str, why: str = "") -> int:
        """Take a trusted key away from a tenant, by its name; None: all. Return the revision.

        The last one goes only with all: what follows is that no signature is asked for.
        """
        return self._change("untrust", who, why, edits.untrust, tenant, name)

    def replace(self, policy: Policy, *, who: str, why: str = "") -> int:
        """Put a whole policy, from a file say, into the place of all that is there; return the revision."""
        return self._change("import", who, why, edits.replace, policy)

    def history(self, limit: int | None = None) -> list[Change]:
        """Return the changes, the newest first.

        Raises:
            PolicyError: the database cannot be reached.
        """
        try:
            with self._reads.connect() as connection:
                return [Change(**row) for row in read_history(connection, limit)]
        except SQLAlchemyError as error:
            raise PolicyError(f"cannot read the store {self._name}: {reason(error)}") from None

    def _change(self, action: str, who: str, why: str, edit: Callable[..., Content], *arguments: object) -> int:
        who, why = _said("who", who, 200), _said("why", why, 2000)
        if not who:
            raise PolicyError("expected who makes the change")
        try:
            with self._lock:
                self._follow_file()
            with self._writes.begin() as connection:
                revision = begin_change(connection)
                before = read(connection)
                after = deepcopy(before)
                what = edit(after, *arguments)
                write(connection, before, make_policy(after, "the changed policy").model_dump())
                at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
                row = {"revision": revision, "at": at, "who": who, "action": action, "what": what, "why": why}
                note_change(connection, row)
        except (SQLAlchemyError, OSError) as error:
            raise PolicyError(
                f"the store {self._name} did not confirm the change: {reason(error)}. It is made wholly or not at all: "
                "the history tells"
            ) from None
        return revision


def open_policy(where: str, *, grace: float = 30.0) -> PolicySource:
    """Open a policy: a .yaml or .yml file, an SQLite store (.db, .sqlite, .sqlite3), or a database URL.

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


def _said(what: str, text: str, limit: int) -> str:
    text = text.strip()
    if not text.isprintable() or len(text) > limit:
        raise PolicyError(f"'{what}' must be one line of at most {limit} characters")
    return text
