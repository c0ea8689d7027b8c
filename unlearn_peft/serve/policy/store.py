"""A policy in a database: SQLite in its own file, or any database that SQLAlchemy reaches by URL.

An edit is one transaction: it takes the store's lock, reads what the edit names, edits and validates that, writes the
rows that differ, one row of history and what readers must read anew, and increases the revision, by which they notice.
A reader keeps all adapters and the tenants that were asked for last; at each look it asks for the revision alone.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from datetime import datetime, timezone
from functools import partial, partialmethod
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from ...errors import PolicyError, safe_repr
from . import edits, engines, schema, tables
from .edits import Content
from .engines import PATIENCE
from .entries import AdapterEntry
from .policy import Policy, PolicySource, key_digest, make_policy, new_key
from .schema import Connection, SQLAlchemyError, State
from .stored import Found, Revision, StoredPolicy, TenantCache
from .yaml_file import PolicyFile

logger = logging.getLogger(__name__)
T = TypeVar("T")
_RETRY = 1.0  # seconds between attempts to reach a database that could not be reached


class _Unreachable(PolicyError):
    """The database did not answer."""


class PolicyStore:
    """A policy in a database. Safe for many threads, processes and servers. To serve, reading the database is enough.

    If the database cannot be reached for longer than `grace` seconds, `current` raises, so that nobody is served under
    a policy that may be outdated. Until then the tenants in the cache are served; others are refused.

    Args:
        where: path of an SQLite file, or a URL.
        create: create the file and the tables if they do not exist.
        grace: seconds.
        cache_size: tenants in memory, those that were asked for last.

    Raises:
        PolicyError: there is no store, or its database cannot be reached.
    """

    def __init__(
        self, where: str | Path, *, create: bool = False, grace: float = 30.0, cache_size: int = 10_000
    ) -> None:
        self.grace = grace
        self._engine = engine = engines.open_engine(str(where), create)
        self.close = weakref.finalize(self, engines.close, self._engine)  # closes its connections; also at exit
        self._name = engines.describe(self._engine)
        self._looks, self._reads, self._writes = engine, engine, engine.execution_options(write=True)
        self._file: Path | None = None
        if self._engine.dialect.name == "sqlite":
            self._file = Path(self._name)
        else:  # all of a transaction sees one state, as it always does in SQLite; one statement does so by itself
            self._reads = self._engine.execution_options(isolation_level="REPEATABLE READ")
            self._looks = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._inode = 0
        self._lock = threading.Lock()  # of reading the database
        self._cache = TenantCache(cache_size)
        self._refused_state: State | None = None
        self._unreachable: str | None = None
        self._refused: str | None = None
        self._looked_at = self._confirmed_at = self._retry_at = -inf

    def current(self) -> Policy:
        """Return the policy as the database has it now, or the last one, for `grace` seconds.

        Its tenants are read when they are asked for; see `StoredPolicy`.

        Raises:
            PolicyError: the database has confirmed no policy for longer, or never held a valid one.
        """
        called = monotonic()
        if self._lock.acquire(timeout=PATIENCE):
            try:
                if self._looked_at <= called and monotonic() >= self._retry_at:  # else another thread has just read
                    with suppress(_Unreachable):
                        self._look(lambda connection, known: (schema.read_state(connection), None))
            finally:
                self._lock.release()
        else:
            self._set_unreachable("it does not answer")
        revision = self._cache.revision
        if self._unreachable and (revision is None or monotonic() - self._confirmed_at > self.grace):
            unreachable = PolicyError(
                f"the store {self._name} cannot be reached ({self._unreachable}), and confirmed no policy in the last "
                f"{self.grace:g} s: nobody is served until it can be reached again"
            )
            unreachable.public = "the policy store cannot be reached"
            raise unreachable
        if revision is None:
            raise PolicyError(self._refused or "")
        return StoredPolicy(revision, self._find, self.tenant_names, self._count_tenants)

    def read_all(self) -> Policy:
        """Read and validate the whole policy: seconds and much memory, where there are many tenants.

        Raises:
            PolicyError: the database cannot be reached, or holds no valid policy.
        """
        state, content = self._query(lambda connection, state: (state, tables.read(connection, state)))
        return make_policy(content, f"revision {state.revision} of the store {self._name}")

    def tenant(self, name: str) -> Content:
        """Return a tenant's entry as a plain mapping.

        Raises:
            PolicyError: there is none of that name, or the database cannot be reached.
        """
        content = self._query(lambda connection, state: tables.read_part(connection, state, name, None))
        return edits.get_entry(content, "tenant", name)

    def tenant_names(self, after: str = "", limit: int | None = None) -> list[str]:
        """Return names of tenants, sorted: those behind `after`, at most `limit`; see `tenant` for errors."""
        return self._query(lambda connection, _: tables.tenant_names(connection, after, limit))

    @property
    def problem(self) -> str | None:
        """Why the newest version is not in use, or is unknown; or None."""
        if self._unreachable:
            return f"the store {self._name} cannot be reached: {self._unreachable}"
        return self._refused

    def history(self, limit: int | None = None) -> list[tables.Change]:
        """Return the changes, the newest first.

        Raises:
            PolicyError: the database cannot be reached.
        """
        return self._query(lambda connection, _: tables.read_history(connection, limit))

    def edit(
        self, action: str, edit: Callable[..., Content], *arguments: Any, who: str, why: str = "",
        names: tuple[str, ...] = (),
    ) -> int:  # fmt: skip
        """Apply one of `edits` in a transaction, record it in the history as `action`, and return the revision.

        Args:
            action: a word for the history.
            edit: takes the content and `arguments`, changes the content, and returns what the history records.
            arguments: of `edit`.
            who: makes the change.
            why: the reason.
            names: what the first arguments name, "tenant" or "adapter": `edit` gets these alone (`tables.read_part`)
                and may change no others. Empty: it gets the whole content.

        Raises:
            PolicyError: the edit or what it leads to is refused, or the database did not confirm it.
        """
        who, why = _one_line("who", who, 200), _one_line("why", why, 2000)
        if not who:
            raise PolicyError("expected who makes the change")
        named = dict(zip(names, arguments, strict=False))
        tenant, adapter = named.get("tenant"), named.get("adapter")
        try:
            with self._lock:
                self._follow_file()
            with self._writes.begin() as connection:
                state = schema.begin_change(connection)
                before = (
                    tables.read_part(connection, state, tenant, adapter) if named else tables.read(connection, state)
                )
                after = deepcopy(before)
                what = edit(after, *arguments)
                after.pop("near", None)
                tables.write(connection, before, make_policy(after, "the changed policy").dump())
                at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
                row = {"at": at, "who": who, "action": action, "what": what, "why": why}
                adapter = adapter if tenant is None else None  # `forget` and `allow` change their tenant alone
                tables.note_change(connection, state, tenant, adapter, row)
        except (SQLAlchemyError, OSError) as error:
            raise PolicyError(
                f"the store {self._name} did not confirm the change: {engines.reason(error)}. It is made wholly or not "
                "at all: see the history"
            ) from None
        return state.revision

    # each takes the arguments of its edit, `who` and `why`, and returns the revision
    add = partialmethod(edit, "add", edits.add, names=("tenant",))
    remove = partialmethod(edit, "remove", edits.remove, names=("tenant",))
    forget = partialmethod(edit, "forget", edits.forget, names=("tenant", "adapter"))
    unforget = partialmethod(edit, "unforget", edits.unforget, names=("tenant",))
    allow = partialmethod(edit, "allow", edits.allow, names=("tenant", "adapter"))
    disallow = partialmethod(edit, "disallow", edits.disallow, names=("tenant",))
    adapter = partialmethod(edit, "adapter", edits.adapter, names=("adapter",))
    unadapter = partialmethod(edit, "unadapter", edits.unadapter, names=("adapter",))
    revoke_key = partialmethod(edit, "revoke", edits.revoke_key, names=("tenant",))
    quota = partialmethod(edit, "quota", edits.quota, names=("tenant",))
    prefix_cache = partialmethod(edit, "prefix_cache", edits.prefix_cache, names=("tenant",))
    trust = partialmethod(edit, "trust", edits.trust, names=("tenant",))
    untrust = partialmethod(edit, "untrust", edits.untrust, names=("tenant",))
    replace = partialmethod(edit, "import", edits.replace)

    def add_key(self, tenant: str, settings: Content | None = None, *, who: str, why: str = "") -> str:
        """Make an API key for a tenant (`settings` as in `KeyEntry`) and return it; the store keeps its sha256 only."""
        key = new_key()
        self.edit("key", edits.add_key, tenant, key_digest(key), settings, who=who, why=why, names=("tenant",))
        return key

    def note_uses(self, uses: Mapping[str, str]) -> None:
        """See `KeyUses`. No change of the policy: neither a revision nor a row of the history."""
        try:
            with self._writes.begin() as connection:
                tables.write_uses(connection, uses)
        except (SQLAlchemyError, OSError) as error:
            raise PolicyError(f"cannot write to the store {self._name}: {engines.reason(error)}") from None

    def key_uses(self, tenant: str) -> dict[str, str]:
        """Return when a tenant's keys were last used (UTC, ISO 8601), by their sha256, where that is known."""
        return self._query(lambda connection, state: tables.read_uses(connection, state, tenant))

    def _find(self, tenant: str | None, digest: str | None) -> Found | None:
        """Return a tenant by its name or by the sha256 of a key, from the cache or the database; None: there is none.

        Raises:
            PolicyError: it is not in the cache and the database cannot be reached, or its rows are no valid tenant.
        """
        if found := self._cache.find(tenant, digest):
            return found
        if self._lock.acquire(timeout=PATIENCE):
            try:
                if monotonic() >= self._retry_at:
                    return self._load(*self._look(partial(tables.find_tenant, tenant=tenant, digest=digest)))
            finally:
                self._lock.release()
        raise self._set_unreachable(self._unreachable or "it does not answer")

    def _load(self, state: State, rows: Content) -> Found | None:
        revision = self._cache.revision
        if revision is None or revision.state != state:
            raise PolicyError(f"the policy stays as it was, and this tenant is not known of that: {self._refused}")
        if not rows:
            return None
        (name,) = rows
        named = tables.adapters_of(rows[name])
        adapters = {each: revision.adapters[each] for each in named if each in revision.adapters}
        content = {"adapters": {each: entry.model_dump() for each, entry in adapters.items()}, "tenants": rows}
        policy = make_policy(content, f"revision {state.revision} of the store {self._name}")
        found = Found(revision, name, policy.tenants[name])
        self._cache.put(found)
        return found

    def _look(self, look: Callable[[Connection, State], tuple[State, T]]) -> tuple[State, T]:
        """Return the store's state and what else `look` reads in the same statement, given the state that is expected.

        If it is another, go on to it and look again. With the lock; raises `_Unreachable`.
        """
        looked_at, newest = monotonic(), self._cache.revision
        known = newest.state if newest else State(0, 0, "")
        try:
            self._follow_file()
            with self._looks.connect() as connection:
                state, found = look(connection, known)
            if state not in (known, self._refused_state):
                with self._reads.begin() as connection:
                    state = schema.read_state(connection)
                    self._go_on(connection, state)
                    _, found = look(connection, state)
            self._looked_at = self._confirmed_at = looked_at
        except (SQLAlchemyError, OSError) as error:
            self._looked_at, self._retry_at = looked_at, monotonic() + _RETRY
            raise self._set_unreachable(engines.reason(error)) from None
        if self._unreachable:
            logger.info("The store %s is reached again", self._name)
        self._unreachable = None
        return state, found

    def _go_on(self, connection: Connection, state: State) -> None:
        """Read what has changed into the cache; adapters that are not valid leave it as it is."""
        known = self._cache.revision
        changed = tables.changes_between(connection, known.state, state) if known else None
        adapters: Mapping[str, AdapterEntry] = known.adapters if known else {}
        try:
            if changed is None or changed.adapters:
                rows = tables.read_adapters(connection, state, changed and changed.adapters)
                read = make_policy({"adapters": rows, "tenants": {}}, f"revision {state.revision} of {self._name}")
                kept = {} if changed is None else {n: a for n, a in adapters.items() if n not in changed.adapters}
                adapters = {**kept, **read.adapters}
            self._refused = self._refused_state = None
        except PolicyError as error:
            self._refused, self._refused_state = str(error), state
            if known:  # else `current` raises it
                logger.warning("The policy stays as it was (%.12s): %s", known.version, error)
            return
        self._cache.advance(Revision(state, adapters), changed)

    def _query(self, then: Callable[[Connection, State], T]) -> T:
        """Read something of one state of the database, beside the cache."""
        try:
            with self._lock:
                self._follow_file()
            with self._reads.begin() as connection:
                return then(connection, schema.read_state(connection))
        except (SQLAlchemyError, OSError) as error:
            raise PolicyError(f"cannot read the store {self._name}: {engines.reason(error)}") from None

    def _count_tenants(self) -> int:
        return self._query(lambda connection, _: tables.count_tenants(connection))

    def _set_unreachable(self, why: str) -> _Unreachable:
        if not self._unreachable:
            logger.warning("The store %s cannot be reached: %s", self._name, why)
        self._unreachable = why
        return _Unreachable(f"the store {self._name} cannot be reached ({why}), and nothing else tells whose key it is")

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
        return PolicyFile(where, grace=grace)
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
