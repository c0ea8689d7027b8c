"""Adapters by name: where they lie, which of them are in memory, and the leases that keep them there.

Names come in; adapters on the base's device go out, pinned by whoever uses them. How one is loaded, and what happens
when it is first and last needed, is the bank's.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
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

    `load` reads an adapter, checks it and puts it on the base's device; `on_first_use` is called when its first pin is
    set, `on_last_use` when its last pin is gone.
    """

    def __init__(
        self, load: Callable[[str, RegisteredAdapter], LoadedAdapter], on_first_use: Callable[[LoadedAdapter], None],
        on_last_use: Callable[[LoadedAdapter], None], budget_bytes: int | None,
    ) -> None:  # fmt: skip
        self.lock, self._budget = RLock(), budget_bytes
        self._load_adapter, self._on_first_use, self._on_last_use = load, on_first_use, on_last_use
        self._entries: dict[str, RegisteredAdapter] = {}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the latest used last; each has one pin of ours
        self._loading: dict[str, Lock] = {}
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
            self._entries[name] = entry
            self._insert(name, adapter)

    def remove(self, name: str) -> None:
        """See `Bank.remove`."""
        with self.lock:
            self._entry(name)
            del self._entries[name]
            self._drop(name)

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
            free = self._budget - sum(other.bytes for other in self._loaded.values())
            for other in [n for n, a in self._loaded.items() if a.pins == 1]:
                if free >= adapter.bytes:
                    break
                free += self._loaded[other].bytes
                self._drop(other)
                self._evictions += 1
            if free < adapter.bytes:
                raise AdapterError(
                    f"no room for the adapter '{name}' ({adapter.bytes / 1e6:.1f} MB): of the budget of "
                    f"{self._budget / 1e6:.1f} MB, running requests hold all but {max(free, 0) / 1e6:.1f} MB. Try "
                    "again when they are done, or raise the budget"
                )
        self._loaded[name] = self.pin(adapter)

    def _drop(self, name: str) -> None:
        if (adapter := self._loaded.pop(name, None)) is not None:
            self.unpin(adapter)
