"""Adapters by name: where they lie, which of them are in memory, and who still needs them.

Names and directories come in; checked adapters on the base's device go out, each pinned by those that use it. What puts
one on the base, and what is to be done when it is first and last needed, are functions of the bank's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import NamedTuple

from ..adapters.bundle import Bundle
from ..adapters.read import read_bundle
from ..adapters.trust import Trust
from ..errors import AdapterError, did_you_mean
from .multi_lora import LoadedAdapter


class BankStats(NamedTuple):
    """What a bank holds, and what it did since it was made."""

    resident: int
    resident_bytes: int
    budget_bytes: int | None
    registered: int
    loads: int
    load_seconds: float
    evictions: int


class Applied(NamedTuple):
    """One adapter of a held set: what it is called, the digest of its files, and how strong it is.

    For an audit log: `different_base` names the parts of the base's fingerprint that are not those that it was trained
    on (`allow_different_base` lets it be), `signed_by` the trusted signer.
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
    trust: Trust | None = None


class AdapterCache:
    """The adapters that are known by name; a bounded number of them in memory.

    Args:
        fit: puts a bundle on the base's device, or refuses it.
        misfits: what of a bundle does not fit the base; for telling it beside what else is wrong.
        first: what to do when an adapter is needed that was not before.
        last: what to do when it is needed no more.
        budget_bytes: memory for all; of those that only wait here, the one that was used longest ago goes first.
    """

    def __init__(
        self,
        fit: Callable[[Bundle, bool], LoadedAdapter],
        misfits: Callable[[Bundle, bool], list[str]],
        first: Callable[[LoadedAdapter], None],
        last: Callable[[LoadedAdapter], None],
        budget_bytes: int | None,
    ) -> None:
        self.lock = RLock()
        self._fit, self._misfits, self._first, self._last, self._budget = fit, misfits, first, last, budget_bytes
        self._entries: dict[str, RegisteredAdapter] = {}
        self._waiting: OrderedDict[str, LoadedAdapter] = OrderedDict()  # in memory; the latest used last
        self._reading: dict[str, Lock] = {}
        self._loads, self._load_seconds, self._evictions = 0, 0.0, 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names that can be asked for."""
        with self.lock:
            return tuple(self._entries)

    @property
    def stats(self) -> BankStats:
        """What is in memory, and what was loaded and evicted so far."""
        with self.lock:
            size = sum(adapter.bytes for adapter in self._waiting.values())
            return BankStats(
                len(self._waiting), size, self._budget, len(self._entries), self._loads, self._load_seconds,
                self._evictions,
            )  # fmt: skip

    def register(self, name: str, entry: RegisteredAdapter) -> None:
        """Make an adapter known; it is read when it is first needed.

        Raises:
            AdapterError: if the name is taken.
        """
        with self.lock:
            if name in self._entries:
                raise AdapterError(
                    f"an adapter named '{name}' is known already: swap or remove it, or give another name"
                )
            self._entries[name] = entry

    def swap(self, name: str, entry: RegisteredAdapter) -> None:
        """Read an adapter and let it take a known one's place.

        Raises:
            AdapterError: if the name is unknown, or the new adapter is refused; then the old one stays.
        """
        self._entry(name)
        adapter = self._read(name, entry)
        with self.lock:
            self._entry(name)
            self._retire(name)
            self._entries[name] = entry
            self._keep(name, adapter)

    def remove(self, name: str) -> None:
        """Let a name be unknown.

        Raises:
            AdapterError: if it is.
        """
        with self.lock:
            self._entry(name)
            del self._entries[name]
            self._retire(name)

    def pinned(self, name: str) -> LoadedAdapter:
        """Return an adapter, read if need be, with one pin more.

        Raises:
            AdapterError: if the name is unknown, the adapter is refused, or the budget has no room for it.
        """
        while True:
            with self.lock:
                entry = self._entry(name)
                if name in self._waiting:
                    self._waiting.move_to_end(name)
                    return self.pin(self._waiting[name])
                one = self._reading.setdefault(name, Lock())
            with one:  # several that wait for the same adapter read it once
                with self.lock:
                    if name in self._waiting or self._entries.get(name) is not entry:
                        continue
                adapter = self._read(name, entry)
                with self.lock:
                    if self._entries.get(name) is entry:  # neither swapped nor removed meanwhile
                        self._keep(name, adapter)
                        return self.pin(adapter)

    def pin(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """Count one more that needs an adapter."""
        with self.lock:
            if not adapter.pins:
                self._first(adapter)
            adapter.pins += 1
            return adapter

    def unpin(self, adapter: LoadedAdapter) -> None:
        """Count one less that needs it."""
        with self.lock:
            adapter.pins -= 1
            if not adapter.pins:
                self._last(adapter)

    def _entry(self, name: str) -> RegisteredAdapter:
        with self.lock:
            if name not in self._entries:
                near = did_you_mean(name, self._entries)
                raise AdapterError(f"no adapter named '{name}' is known{near}: load or register it first")
            return self._entries[name]

    def _read(self, name: str, entry: RegisteredAdapter) -> LoadedAdapter:
        began = time.monotonic()
        bundle = read_bundle(
            entry.path, trust=entry.trust, also=lambda read: self._misfits(read, entry.allow_different_base)
        )
        if entry.sha256 is not None and bundle.identity != entry.sha256:
            raise AdapterError(
                f"the adapter '{name}' in {entry.path} has the digest {bundle.identity}, expected {entry.sha256}: it "
                "is not the one that was registered. Copy that one again, or register this one anew"
            )
        adapter = self._fit(bundle, entry.allow_different_base)
        with self.lock:
            self._loads += 1
            self._load_seconds += time.monotonic() - began
        return adapter

    def _keep(self, name: str, adapter: LoadedAdapter) -> None:
        """Let an adapter wait in memory, in the place of others if the budget asks for it."""
        if self._budget is not None:
            free = self._budget - sum(other.bytes for other in self._waiting.values())
            for other in [n for n, a in self._waiting.items() if a.pins == 1]:
                if free >= adapter.bytes:
                    break
                free += self._waiting[other].bytes
                self._retire(other)
                self._evictions += 1
            if free < adapter.bytes:
                raise AdapterError(
                    f"no room for the adapter '{name}' ({adapter.bytes / 1e6:.1f} MB): of the budget of "
                    f"{self._budget / 1e6:.1f} MB, running requests hold all but {max(free, 0) / 1e6:.1f} MB. Try "
                    "again when they are done, or raise the budget"
                )
        self._waiting[name] = self.pin(adapter)

    def _retire(self, name: str) -> None:
        if (adapter := self._waiting.pop(name, None)) is not None:
            self.unpin(adapter)
