"""The policy of a store as one request sees it, and the bounded cache of tenants behind it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from .entries import AdapterEntry, TenantEntry
from .policy import Policy, key_digest
from .schema import State
from .tables import Changed


class Revision(NamedTuple):
    """A state of the store with all its adapters."""

    state: State
    adapters: Mapping[str, AdapterEntry]

    @property
    def version(self) -> str:
        """The revision, as the history counts, and its random token."""
        return f"{self.state.revision}-{self.state.token}"


class Found(NamedTuple):
    """A tenant as it is at a revision."""

    revision: Revision
    tenant: str
    entry: TenantEntry


class TenantCache:
    """The tenants that were asked for last, all as they are at one revision. Safe for many threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._revision: Revision | None = None
        self._entries: OrderedDict[str, TenantEntry] = OrderedDict()
        self._owners: dict[str, str] = {}  # sha256 of a key -> its tenant, of all in `_entries`

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def revision(self) -> Revision | None:
        """The one that the entries are of; None before the first."""
        return self._revision

    def find(self, tenant: str | None, digest: str | None) -> Found | None:
        """Return a tenant by its name or by the sha256 of a key of it; None: it is not in here."""
        with self._lock:
            name = tenant if digest is None else self._owners.get(digest)
            if self._revision is None or name is None or name not in self._entries:
                return None
            self._entries.move_to_end(name)
            return Found(self._revision, name, self._entries[name])

    def put(self, found: Found) -> None:
        """Keep a tenant of the current revision."""
        with self._lock:
            self._drop(found.tenant)
            self._entries[found.tenant] = found.entry
            self._owners.update(dict.fromkeys(found.entry.keys, found.tenant))
            while len(self._entries) > self._size:
                self._drop(next(iter(self._entries)))

    def advance(self, revision: Revision, changed: Changed | None) -> None:
        """Go on to a revision; what changed is dropped (None: everything)."""
        with self._lock:
            self._revision = revision
            for name in list(self._entries) if changed is None else changed.tenants:
                self._drop(name)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        for digest in entry.keys if entry is not None else ():
            self._owners.pop(digest, None)


class StoredPolicy(Policy):
    """A store's policy, for one request: a tenant is read when it is first asked for, and then stays as it is.

    What it asks the store for may wait for the database and raise `PolicyError`; what it has read does not.

    Args:
        revision: the newest that is known.
        find: a tenant by its name, or by the sha256 of a key.
        names: all tenants' names.
        count: how many they are.
    """

    def __init__(
        self, revision: Revision, find: Callable[[str | None, str | None], Found | None],
        names: Callable[[], list[str]], count: Callable[[], int],
    ) -> None:  # fmt: skip
        self._find, self._names, self._count = find, names, count
        self._read: dict[str, TenantEntry] = {}
        super().__init__(revision.adapters, _Tenants(self), revision.version, {})

    def tenant_of(self, api_key: str) -> str | None:
        """See `Policy.tenant_of`."""
        return self._take(self._find(None, key_digest(api_key)))

    def _take(self, found: Found | None) -> str | None:
        if found is None:
            return None
        self.adapters, self.version = found.revision.adapters, found.revision.version  # those that it was read with
        self._read[found.tenant] = found.entry
        return found.tenant


class _Tenants(Mapping[str, TenantEntry]):
    def __init__(self, policy: StoredPolicy) -> None:
        self._policy = policy

    def __getitem__(self, name: str) -> TenantEntry:
        policy = self._policy
        if name not in policy._read and policy._take(policy._find(name, None)) is None:
            raise KeyError(name)
        return policy._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._policy._names())

    def __len__(self) -> int:
        return self._policy._count()
