"""Adapters by name: where they lie, which of them are in memory, and the leases that keep them there.

Names come in; adapters on the base's device go out, pinned by whoever uses them. How one is loaded, and what happens
when it is first and last needed, is the bank's.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import NamedTuple

from ..errors import AdapterError, did_you_mean
from .multi_lora import LoadedAdapter, WeightedAdapter


class BankStats(NamedTuple):
    """What a bank has in memory (`resident`), and what it did since it was made."""

    resident: int
    resident_bytes: int
    budget_bytes: int | None
    registered: int
    loads: int
    load_seconds: float
    evictions: int


class Applied(NamedTuple):
    """One adapter of a lease, for an audit log: its name, the sha256 of its files (`Bundle.identity`), its strength.

    `different_base` names the parts of the base's fingerprint that differ from those it was trained on, which only
    `allow_different_base` permits; `signed_by` is the trusted signer.
    """

    name: str
    sha256: str
    strength: float
    different_base: tuple[str, ...] = ()
    signed_by: str | None = None


@dataclass(frozen=True)
class RegisteredAdapter:
    """Where an adapter lies, and what it must be: `sha256` is its `Bundle.identity`, or None for any."""

    path: Path
    sha256: str | None = None
    allow_different_base: bool = False


class AdapterLease:
    """A set of adapters that stay in memory, in the same versions, until it is released; also a context manager.

    `digest` is equal if and only if contents and strengths are; "" for the empty set.
    """

    def __init__(self, cache: AdapterCache, parts: Mapping[str, WeightedAdapter]) -> None:
        self.cache, self.parts, self.released = cache, tuple(parts.values()), False
        self.applied = tuple(
            Applied(n, p.adapter.bundle.identity, p.strength, p.adapter.different_base, p.adapter.bundle.signed_by)
            for n, p in parts.items()
        )
        lines = sorted(f"{a.sha256} {a.strength!r}" for a in self.applied if a.strength)
        self.digest = hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""

    def copy(self) -> AdapterLease:
        """Return another lease on the same adapters, to be released on its own."""
        with self.cache.lock:
            if self.released:
                raise AdapterError("a set of adapters was released: hold it anew")
            for part in self.parts:
                self.cache.pin(part.adapter)
            return copy(self)

    def release(self) -> None:
        """Let go of the adapters; a second call does nothing."""
        with self.cache.lock:
            parts, self.released = () if self.released else self.parts, True
            for part in parts:
                self.cache.unpin(part.adapter)

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterCache:
    """The adapters that are known by name; a bounded number of bytes of them in memory.

    `load` reads an adapter, checks it and puts it on the base's device; `measure` says without reading it how many
    bytes it will take there; `on_first_use` is called when its first pin is set, `on_last_use` when its last pin is
    gone.

    Adapters that requests only ever added (see `check_room`) may take half of the budget, and push out each other
    alone. So whatever requests add, the other half is there for the adapters that somebody must have forgotten.
    """

    def __init__(
        self, load: Callable[[str, RegisteredAdapter], LoadedAdapter], measure: Callable[[RegisteredAdapter], int],
        on_first_use: Callable[[LoadedAdapter], None], on_last_use: Callable[[LoadedAdapter], None],
        budget_bytes: int | None,
    ) -> None:  # fmt: skip
        self.lock, self._budget = RLock(), budget_bytes
        self._load_adapter, self._measure = load, measure
        self._on_first_use, self._on_last_use = on_first_use, on_last_use
        self._entries: dict[str, RegisteredAdapter] = {}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the latest used last; each has one pin of ours
        self._loading: dict[str, Lock] = {}
        self._added: dict[str, bool] = {}  # whether requests only ever added it
        self._sizes: dict[str, int] = {}  # bytes, as measured
        self._loads, self._load_seconds, self._evictions = 0, 0.0, 0

    @property
    def names(self) -> tuple[str, ...]:
        """The registered names."""
        with self.lock:
            return tuple(self._entries)

    @property
    def stats(self) -> BankStats:
        """See `Bank.stats`."""
        with self.lock:
            size = sum(adapter.bytes for adapter in self._loaded.values())
            return BankStats(
                len(self._loaded), size, self._budget, len(self._entries), self._loads, self._load_seconds,
                self._evictions,
            )  # fmt: skip

    def register(self, name: str, entry: RegisteredAdapter) -> None:
        """See `Bank.register`."""
        with self.lock:
            if name in self._entries:
                raise AdapterError(
                    f"an adapter named '{name}' is known already: swap or remove it, or give another name"
                )
            self._entries[name] = entry

    def swap(self, name: str, entry: RegisteredAdapter) -> None:
        """See `Bank.swap`."""
        self._entry(name)
        adapter = self._load(name, entry)
        with self.lock:
            self._entry(name)
            self._drop(name)
            self._sizes.pop(name, None)
            self._entries[name] = entry
            self._insert(name, adapter)

    def remove(self, name: str) -> None:
        """See `Bank.remove`."""
        with self.lock:
            self._entry(name)
            del self._entries[name]
            self._drop(name)
            self._sizes.pop(name, None)
            self._added.pop(name, None)

    def check_room(self, names: Collection[str], added: Collection[str]) -> None:
        """Refuse a set for which there is no room now, or never, before anything is read or evicted for it.

        Args:
            names: all adapters of the set.
            added: those that only the request asks for.

        Raises:
            AdapterError: naming the first that finds no room, in `.adapter`, too.
        """
        if self._budget is None:
            return
        sizes = {name: self._size(name) for name in names if name in self.names}  # others are refused when acquired
        with self.lock:
            self._added |= {name: name in added and self._added.get(name, True) for name in sizes}
            busy = {name: adapter.bytes for name, adapter in self._loaded.items() if adapter.pins > 1}
            own = sum(size for name, size in sizes.items() if name not in self._loaded and not self._added[name])
            needed = busy | sizes
            added_only = {name: size for name, size in needed.items() if self._added.get(name)}
            if added_only.keys() & sizes:
                _check_pool(added_only, sizes, self._added_limit(own), " for what requests add")
            _check_pool(needed, sizes, self._budget)

    def acquire(self, name: str) -> LoadedAdapter:
        """Return an adapter, loaded if need be, with one more pin."""
        while True:
            with self.lock:
                entry = self._entry(name)
                if name in self._loaded:
                    self._loaded.move_to_end(name)
                    return self.pin(self._loaded[name])
                loading = self._loading.setdefault(name, Lock())
            with loading:  # several that wait for the same adapter load it once
                with self.lock:
                    if name in self._loaded or self._entries.get(name) is not entry:
                        continue
                adapter = self._load(name, entry)
                with self.lock:
                    if self._entries.get(name) is entry:  # neither swapped nor removed meanwhile
                        self._insert(name, adapter)
                        return self.pin(adapter)

    def pin(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """Add one pin."""
        with self.lock:
            if not adapter.pins:
                self._on_first_use(adapter)
            adapter.pins += 1
            return adapter

    def unpin(self, adapter: LoadedAdapter) -> None:
        """Take one pin away."""
        with self.lock:
            adapter.pins -= 1
            if not adapter.pins:
                self._on_last_use(adapter)

    def _entry(self, name: str) -> RegisteredAdapter:
        with self.lock:
            if name not in self._entries:
                near = did_you_mean(name, self._entries)
                raise AdapterError(f"no adapter named '{name}' is known{near}: load or register it first")
            return self._entries[name]

    def _size(self, name: str) -> int:
        """Return the bytes that an adapter takes or will take; 0 for one that is refused when it is read."""
        with self.lock:
            if name in self._loaded:
                return self._loaded[name].bytes
            entry, size = self._entries.get(name), self._sizes.get(name)
        if entry is None:
            return 0
        if size is None:
            try:
                size = self._measure(entry)
            except AdapterError:
                return 0
            with self.lock:
                if self._entries.get(name) is entry:
                    self._sizes[name] = size
        return size

    def _added_limit(self, own: int = 0) -> int:
        """Return the bytes for adapters that requests only ever added, if `own` bytes of others are to come."""
        assert self._budget is not None
        own += sum(adapter.bytes for name, adapter in self._loaded.items() if not self._added.get(name))
        return min(self._budget // 2, self._budget - own)

    def _load(self, name: str, entry: RegisteredAdapter) -> LoadedAdapter:
        began = time.monotonic()
        adapter = self._load_adapter(name, entry)
        with self.lock:
            self._loads += 1
            self._load_seconds += time.monotonic() - began
        return adapter

    def _insert(self, name: str, adapter: LoadedAdapter) -> None:
        """Keep an adapter in memory; where the budget asks for it, those go that nobody else has pinned."""
        if self._budget is not None:
            added = self._added.get(name, False)
            pool = {n: a for n, a in self._loaded.items() if self._added.get(n) or not added}
            limit = self._added_limit() if added else self._budget
            free = limit - sum(other.bytes for other in pool.values())
            # what requests only added goes first
            for other in sorted((n for n, a in pool.items() if a.pins == 1), key=lambda n: not self._added.get(n)):
                if free >= adapter.bytes:
                    break
                free += self._loaded[other].bytes
                self._drop(other)
                self._evictions += 1
            if free < adapter.bytes:
                raise _no_room(name, adapter.bytes, free, limit, " for what requests add" * added)
        self._loaded[name] = self.pin(adapter)

    def _drop(self, name: str) -> None:
        if (adapter := self._loaded.pop(name, None)) is not None:
            self.unpin(adapter)


def _check_pool(needed: Mapping[str, int], sizes: Mapping[str, int], limit: int, what_for: str = "") -> None:
    """Refuse a set (`sizes` in bytes) if what must be in memory then takes more than the limit."""
    if sum(needed.values()) > limit:
        coming = {name: size for name, size in needed.items() if name in sizes}
        others = sum(needed.values()) - sum(coming.values())
        raise _no_room(next(iter(coming)), sum(coming.values()), limit - others, limit, what_for)


def _no_room(name: str, size: int, free: int, limit: int, what_for: str) -> AdapterError:
    error = AdapterError(
        f"no room for the adapter '{name}' ({size / 1e6:.1f} MB with what comes with it): of the budget of "
        f"{limit / 1e6:.1f} MB{what_for}, running requests hold all but {max(free, 0) / 1e6:.1f} MB. Try again when "
        "they are done, ask for fewer adapters, or raise the budget"
    )
    error.adapter = name
    return error
