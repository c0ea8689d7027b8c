"""A policy in a database: SQLite in a file of its own, or any database that SQLAlchemy reaches by URL.

Changes come in, each with who and why; policies go out. A change is one transaction: it takes the store's lock, edits
the content, checks the whole as a policy, writes the rows that differ and one row of history, and counts up the
revision, by which readers notice it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

from ..errors import PolicyError, did_you_mean
from .policy import Policy, PolicySource, check_name, key_digest, make_policy, new_key, shown
from .policy_file import PolicyFile
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
    revision_of,
    write,
)

logger = logging.getLogger(__name__)
Content = dict[str, Any]
_RETRY = 1.0  # seconds between attempts to reach a database that could not be reached
_PREFIX = 12  # hexadecimal digits of a key's digest that tell it from others


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
        PolicyError: the database cannot be reached, or does not hold a valid policy.
    """

    def __init__(self, where: str | Path, *, create: bool = False, grace: float = 30.0) -> None:
        self.grace = grace
        self._engine = open_engine(str(where), create)
        self._name = describe(self._engine)
        self._reads, self._writes = self._engine, self._engine.execution_options(write=True)
        self._file: Path | None = None
        if self._engine.dialect.name == "sqlite":
            self._file = Path(self._name)
        else:  # SQLite's transactions always see one state
            self._reads = self._engine.execution_options(isolation_level="SERIALIZABLE")
        self._lock = threading.Lock()
        self._inode = self._file.stat().st_ino if self._file else 0
        self._unreachable: str | None = None
        self._refused: str | None = None
        self._began = self._reached = monotonic()
        self._again = 0.0
        try:
            with self._reads.connect() as connection:
                self._revision: int | None = revision_of(connection)
                content = read(connection)
        except SQLAlchemyError as error:
            raise PolicyError(f"cannot read the store {self._name}: {reason(error)}") from None
        self._policy = make_policy(content, f"the store {self._name}")

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def current(self) -> Policy:
        """Return the newest policy: one that is as new as the call, or the last one, for `grace` seconds.

        Raises:
            PolicyError: the database has not confirmed a policy for longer.
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
            self._unreachable = "it does not answer"
        if self._unreachable and monotonic() - self._reached > self.grace:
            raise PolicyError(
                f"the store {self._name} cannot be reached ({self._unreachable}), and its last policy was confirmed "
                f"more than {self.grace:g} s ago: nobody is served until it can be reached again"
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
            if self._file and self._file.stat().st_ino != self._inode:  # put back from a backup, say
                self._inode, self._revision = self._file.stat().st_ino, None
                self._engine.dispose()
            with self._reads.connect() as connection:
                revision = revision_of(connection)
                if revision != self._revision:
                    content = read(connection)
        except (SQLAlchemyError, OSError) as error:
            self._again = monotonic() + _RETRY
            if not self._unreachable:
                logger.warning("The store %s cannot be reached: %s", self._name, reason(error))
            self._unreachable = reason(error)
            return
        if self._unreachable:
            logger.info("The store %s is reached again", self._name)
        self._reached, self._unreachable = self._began, None
        if content is None:
            return
        self._revision, self._refused = revision, None
        try:
            self._policy = make_policy(content, f"revision {revision} of the store {self._name}")
        except PolicyError as error:
            self._refused = str(error)
            logger.warning("The policy stays as it was (%.12s): %s", self._policy.version, error)

    def add(self, tenant: str, *, who: str, why: str = "") -> int:
        """Add a tenant that has nothing forgotten and no key yet; return the revision.

        Raises:
            PolicyError: it is there already, or the name is none. So do all changes, for what does not fit.
        """

        def edit(content: Content) -> Content:
            if tenant in content["tenants"]:
                raise PolicyError(f"tenant '{tenant}' is there already")
            content["tenants"][_checked(tenant)] = {"forget": {}, "keys": []}
            return {"tenant": tenant}

        return self._change("add", edit, who, why)

    def remove(self, tenant: str, *, who: str, why: str = "") -> int:
        """Remove a tenant with its keys: nobody is served under its name any more. Return the revision."""

        def edit(content: Content) -> Content:
            entry = _known(content, "tenant", tenant)
            del content["tenants"][tenant]
            return {"tenant": tenant, "forget": entry["forget"], "keys": _prefixes(entry["keys"])}

        return self._change("remove", edit, who, why)

    def forget(self, tenant: str, adapter: str, strength: float = 1.0, *, who: str, why: str = "") -> int:
        """Have an adapter forgotten for a tenant, or change its strength; return the revision."""

        def edit(content: Content) -> Content:
            forget = _known(content, "tenant", tenant)["forget"]
            _known(content, "adapter", adapter)
            before, forget[adapter] = forget.get(adapter), strength
            return {"tenant": tenant, "adapter": adapter, "strength": strength, "before": before}

        return self._change("forget", edit, who, why)

    def unforget(self, tenant: str, adapter: str, *, who: str, why: str = "") -> int:
        """Have an adapter no longer forgotten for a tenant; return the revision."""

        def edit(content: Content) -> Content:
            forget = _known(content, "tenant", tenant)["forget"]
            if adapter not in forget:
                near = did_you_mean(adapter, forget)
                raise PolicyError(f"tenant '{tenant}' does not have {shown(adapter)} forgotten{near}")
            return {"tenant": tenant, "adapter": adapter, "before": forget.pop(adapter)}

        return self._change("unforget", edit, who, why)

    def adapter(self, name: str, path: str | Path, sha256: str | None, *, who: str, why: str = "") -> int:
        """Name the adapter at `path`, or put another one into a name's place; return the revision.

        Args:
            name: the adapter's name in the policy.
            path: its directory, the same on every server; made absolute.
            sha256: of its weights file (`Bundle.digest`); another file is refused later. None: any.
            who: who does it.
            why: the reason.
        """

        def edit(content: Content) -> Content:
            before = content["adapters"].get(_checked(name))
            content["adapters"][name] = {"path": str(Path(path).absolute()), "sha256": sha256}
            return {"adapter": name, **content["adapters"][name], "before": before}

        return self._change("adapter", edit, who, why)

    def unadapter(self, name: str, *, who: str, why: str = "") -> int:
        """Take an adapter's name away; return the revision. A tenant that has it forgotten keeps it from going."""

        def edit(content: Content) -> Content:
            before = _known(content, "adapter", name)
            if users := [tenant for tenant, entry in content["tenants"].items() if name in entry["forget"]]:
                told = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
                raise PolicyError(f"adapter '{name}' is forgotten for {told}: take it away there first (unforget)")
            del content["adapters"][name]
            return {"adapter": name, "before": before}

        return self._change("unadapter", edit, who, why)

    def add_key(self, tenant: str, *, who: str, why: str = "") -> str:
        """Make an API key for a tenant and return it. It is not kept: only its sha256 is."""
        key = new_key()

        def edit(content: Content) -> Content:
            _known(content, "tenant", tenant)["keys"].append(key_digest(key))
            return {"tenant": tenant, "key": key_digest(key)[:_PREFIX]}

        self._change("key", edit, who, why)
        return key

    def revoke_key(self, tenant: str, which: str, *, who: str, why: str = "") -> int:
        """Take a key away from a tenant; return the revision.

        Args:
            tenant: its name.
            which: the key, its digest, or the first 8 or more digits of that.
            who: who does it.
            why: the reason.
        """
        digest = key_digest(which) if which.startswith("uf-") else which.lower()

        def edit(content: Content) -> Content:
            keys = _known(content, "tenant", tenant)["keys"]
            found = [key for key in keys if len(digest) >= 8 and key.startswith(digest)]
            if len(found) != 1:
                held = ", ".join(_prefixes(keys)) or "none"
                raise PolicyError(
                    f"{len(found)} keys of tenant '{tenant}' fit, expected one: give the key, or 8 or more digits of "
                    f"its sha256; it has {held}"
                )
            keys.remove(found[0])
            return {"tenant": tenant, "key": found[0][:_PREFIX]}

        return self._change("revoke", edit, who, why)

    def replace(self, policy: Policy, *, who: str, why: str = "") -> int:
        """Put a whole policy, from a file say, into the place of all that is there; return the revision."""

        def edit(content: Content) -> Content:
            content |= policy.model_dump()
            tenants = {
                name: {"forget": entry.forget, "keys": _prefixes(entry.keys)} for name, entry in policy.tenants.items()
            }
            return {"adapters": content["adapters"], "tenants": tenants}

        return self._change("import", edit, who, why)

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

    def _change(self, action: str, edit: Callable[[Content], Content], who: str, why: str) -> int:
        who, why = _said("who", who, 200), _said("why", why, 2000)
        if not who:
            raise PolicyError("expected who makes the change")
        try:
            with self._writes.begin() as connection:
                revision = begin_change(connection)
                before = read(connection)
                after = deepcopy(before)
                what = edit(after)
                write(connection, before, make_policy(after, "the changed policy").model_dump())
                at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
                row = {"revision": revision, "at": at, "who": who, "action": action, "what": what, "why": why}
                note_change(connection, row)
        except SQLAlchemyError as error:
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
        return PolicyStore(where, grace=grace)
    raise PolicyError(
        f"{shown(where)} is no policy: expected a .yaml file, a .db file, or a URL such as postgresql://..."
    )


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _known(content: Content, kind: str, name: str) -> Content:
    entries: dict[str, Content] = content[f"{kind}s"]
    if name not in entries:
        raise PolicyError(f"no {kind} {shown(name)}{did_you_mean(name, entries)}")
    return entries[name]


def _prefixes(digests: Any) -> list[str]:
    return [digest[:_PREFIX] for digest in digests]


def _said(what: str, text: str, limit: int) -> str:
    text = text.strip()
    if not text.isprintable() or len(text) > limit:
        raise PolicyError(f"'{what}' must be one line of at most {limit} characters")
    return text
