"""Many adapters on one live base: a set for all rows (`attach`), or a set for each row of a batch (`Bank.rows`).

Deltas are added to the outputs of the base's linear layers by forward hooks (see multi_lora.py). The base's modules and
weights are never replaced or written to, so that a row without adapters, and the model after removal, give bit-equal
logits, and a tied `lm_head` gets its delta without the input embeddings seeing it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.bundle import Bundle
from ..adapters.read import count_numbers, read_bundle
from ..adapters.trust import Trust
from ..adapters.validate import check_strengths
from ..errors import AdapterError, did_you_mean
from ..models.base import Base
from ..models.fingerprint import fingerprint
from ..models.layers import parameters
from .adapter_cache import AdapterCache, AdapterLease, BankStats, RegisteredAdapter
from .multi_lora import AdapterBatch, LoadedAdapter, WeightedAdapter, note_batch_size

_ATTRIBUTE = "_unlearn_peft_bank"
_MAX_BATCHES = 4  # whose stacked factors are kept for the next step
_ROWS: ContextVar[Mapping[int, AdapterBatch]] = ContextVar("unlearn_peft_rows", default=MappingProxyType({}))  # by bank
Forget = Iterable[str] | Mapping[str, float]  # adapters' names, or names and strengths


class Bank:
    """The adapters of one live model. `Bank.of(model)` is the model's one bank.

    All methods may be called from many threads. Which rows forget what is a context variable: it holds for the thread
    or task that entered `rows`, and mixes with no other.

    Args:
        tokenizer: the model's, for the base's fingerprint.
        budget_bytes: memory for adapters that were loaded by name; of those that no request holds, the one that was
            used longest ago goes first. None: no limit. The stacked factors of running batches come on top.
        trust: who must have signed, or may sign, adapters that are loaded by name. None: signatures are not looked at.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any | None = None, *, budget_bytes: int | None = None,
        trust: Trust | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.trust = model, tokenizer, trust
        self.cache = AdapterCache(self._load, self._measure, self._on_first_use, self._on_last_use, budget_bytes)
        self.adapters: dict[str, WeightedAdapter] = {}  # attached to all rows, by name
        self._default: AdapterBatch | None = None  # of these
        self._batches: OrderedDict[tuple[tuple[WeightedAdapter, ...], ...], AdapterBatch] = OrderedDict()
        self._hooks: dict[str | None, tuple[Any, int]] = {}  # by module: a handle, and how many adapters need it
        self._fingerprint: tuple[Any, dict[str, str | None]] | None = None

    @classmethod
    def of(cls, model: Any) -> Bank:
        """Return the bank of a model or `Base`, made on first use."""
        tokenizer = model.tokenizer if isinstance(model, Base) else None
        live = model.model if isinstance(model, Base) else model
        bank = cls.found_on(live)
        if bank is None:
            bank = cls(live, tokenizer)
            object.__setattr__(live, _ATTRIBUTE, bank)
        bank.tokenizer = bank.tokenizer or tokenizer
        return bank

    @staticmethod
    def found_on(model: Any) -> Bank | None:
        """Return the bank of a model or `Base`, if it has one."""
        live = model.model if isinstance(model, Base) else model
        return live.__dict__.get(_ATTRIBUTE)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or a pickled one, has no bank: it gets one of its own when it first needs it."""
        return type(None), ()

    # ---- a set for each row ----

    def register(
        self, name: str, path: str | Path, *, sha256: str | None = None, allow_different_base: bool = False
    ) -> None:
        """Make the adapter in the directory `path` known by name; it is read when it is first needed.

        `sha256` is what its `Bundle.identity` must be; None: any. `allow_different_base`: see `attach`.

        Raises:
            AdapterError: if the name is taken.
        """
        self.cache.register(name, RegisteredAdapter(Path(path), sha256, allow_different_base))

    def load(
        self, name: str, path: str | Path, *, sha256: str | None = None, allow_different_base: bool = False
    ) -> None:
        """Make an adapter known by name, as `register` does, and read and check it now.

        Raises:
            AdapterError: if the name is taken, or the adapter is refused; then the name stays unknown.
        """
        self.register(name, path, sha256=sha256, allow_different_base=allow_different_base)
        try:
            self.hold([name]).release()
        except BaseException:
            self.cache.remove(name)
            raise

    def swap(
        self, name: str, path: str | Path, *, sha256: str | None = None, allow_different_base: bool = False
    ) -> None:
        """Replace a known adapter; leases on the old one keep it to their end. Arguments: see `register`.

        Raises:
            AdapterError: if the name is unknown, or the new adapter is refused; then the old one stays.
        """
        self.cache.swap(name, RegisteredAdapter(Path(path), sha256, allow_different_base))

    def remove(self, name: str) -> None:
        """Forget a known adapter's name; its memory is free when the last lease on it ends.

        Raises:
            AdapterError: if the name is unknown.
        """
        self.cache.remove(name)

    def hold(self, forget: Forget, added: Collection[str] = ()) -> AdapterLease:
        """Lease a set of adapters for one request; what is not in memory is loaded.

        Args:
            forget: names of known (or attached) adapters, or names and strengths; 1 is as trained.
            added: those that the request itself adds: they may take half of the budget, and push no others out.

        Raises:
            AdapterError: naming (in `.adapter`, too) the one that is unknown or refused, or finds no room in the
                budget; then none is held. What cannot find room, by the headers of the files, is not read.
        """
        if isinstance(forget, str):
            raise AdapterError(f"expected a list of adapters' names, found the text '{forget}': write ['{forget}']")
        strengths = forget if isinstance(forget, Mapping) else dict.fromkeys(forget, 1.0)
        parts: dict[str, WeightedAdapter] = {}
        self.cache.check_room(strengths, added)
        try:
            for name, strength in strengths.items():
                try:
                    parts[name] = WeightedAdapter(self._acquire(name), *check_strengths(strength, 1))
                except AdapterError as error:
                    error.adapter = name
                    raise
        except BaseException:
            AdapterLease(self.cache, parts).release()
            raise
        return AdapterLease(self.cache, parts)

    @contextmanager
    def rows(self, sets: Sequence[AdapterLease | Forget]) -> Iterator[nn.Module]:
        """Let row i of the batches inside the block forget exactly `sets[i]`, whatever is attached.

        A batch may hold k rows for each set, one after the other, as beams and `num_return_sequences` do. A single set
        is for all rows.

        Raises:
            AdapterError: see `hold`; and when a batch is run whose rows the sets cannot be shared out to.
        """
        if not sets:
            raise AdapterError("no sets of adapters given: expected one for each row; [] is the empty set")
        if any(isinstance(row, AdapterLease) and row.cache is not self.cache for row in sets):
            raise AdapterError("a set of adapters is another model's: hold it anew")
        with ExitStack() as stack:  # leases of our own: a caller may release its lease inside the block
            leases = (row.copy() if isinstance(row, AdapterLease) else self.hold(row) for row in sets)
            key = tuple(stack.enter_context(lease).parts for lease in leases)
            with self.cache.lock:
                self._batches[key] = batch = self._batches.pop(key, None) or AdapterBatch(key)
                while len(self._batches) > _MAX_BATCHES:
                    self._batches.popitem(last=False)
            token = _ROWS.set({**_ROWS.get(), id(self): batch})
            try:
                yield self.model
            finally:
                _ROWS.reset(token)

    def generate(self, *args: Any, forget: Sequence[AdapterLease | Forget], **kwargs: Any) -> Any:
        """Call the model's `generate`, where row i of the inputs forgets exactly `forget[i]`; see `rows`."""
        with self.rows(forget):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def known(self) -> tuple[str, ...]:
        """The names that rows can ask for."""
        return tuple(dict.fromkeys((*self.cache.names, *self.adapters)))

    @property
    def stats(self) -> BankStats:
        """What is in memory, and what was loaded and evicted so far."""
        return self.cache.stats

    # ---- one set for all rows ----

    def read(self, adapter: str | Path | Bundle, trust: Trust | None, allow_different_base: bool = False) -> Bundle:
        """Read an adapter (or check a `Bundle`'s signature); a refusal also names what does not fit the model."""
        if isinstance(adapter, Bundle):
            return adapter if trust is None else replace(adapter, signed_by=trust.check(adapter))
        return read_bundle(
            adapter,
            trust=trust,
            also=lambda bundle: bundle.misfits(**self._base(bundle, allow_different_base))[0],
            model=self.model,
        )

    def attach(
        self, bundle: Bundle, name: str, strength: float = 1.0, *, allow_different_base: bool = False,
        instead_of: str | None = None,
    ) -> None:  # fmt: skip
        """Check the adapter against the model, then add it for all rows (in place of `instead_of`), or do nothing."""
        with self.cache.lock:
            others = self.adapters if instead_of is None else self._without(instead_of)
            if name in others:
                raise AdapterError(f"an adapter named '{name}' is attached already: swap it, or give another name")
            adapter = self._fit(bundle, allow_different_base)
            self.restore({**others, name: WeightedAdapter(adapter, *check_strengths(strength, 1))})

    def detach(self, name: str) -> None:
        """Remove one adapter from all rows."""
        with self.cache.lock:
            self.restore(self._without(name))

    def restore(self, adapters: dict[str, WeightedAdapter]) -> None:
        """Go back to an earlier set of adapters for all rows (a former value of `.adapters`)."""
        with self.cache.lock:
            for part in adapters.values():
                self.cache.pin(part.adapter)
            before, self.adapters = self.adapters, adapters
            self._default = AdapterBatch([list(adapters.values())]) if adapters else None
            for part in before.values():
                self.cache.unpin(part.adapter)

    def _without(self, name: str) -> dict[str, WeightedAdapter]:
        if name not in self.adapters:
            near, attached = did_you_mean(name, self.adapters), ", ".join(self.adapters) or "none"
            raise AdapterError(f"no adapter named '{name}' is attached{near}; attached: {attached}")
        return {key: value for key, value in self.adapters.items() if key != name}

    # ---- inside ----

    def _acquire(self, name: str) -> LoadedAdapter:
        with self.cache.lock:
            if name not in self.cache.names and name in self.adapters:
                return self.cache.pin(self.adapters[name].adapter)
        return self.cache.acquire(name)

    def _load(self, name: str, entry: RegisteredAdapter) -> LoadedAdapter:
        bundle = self.read(entry.path, self.trust, entry.allow_different_base)
        if entry.sha256 is not None and bundle.identity != entry.sha256:
            raise AdapterError(
                f"the adapter '{name}' in {entry.path} has the digest {bundle.identity}, expected {entry.sha256}: it "
                "is not the one that was registered. Copy that one again, or register this one anew"
            )
        return self._fit(bundle, entry.allow_different_base)

    def _measure(self, entry: RegisteredAdapter) -> int:
        """Return the bytes that an adapter takes in memory, or somewhat fewer, by the header of its file."""
        widths = [p.element_size() for p in self.model.parameters() if p.is_floating_point()]
        return count_numbers(entry.path) * min(widths, default=4)

    def _fit(self, bundle: Bundle, allow_different_base: bool) -> LoadedAdapter:
        with torch.inference_mode(False), torch.no_grad():
            return LoadedAdapter.on(self.model, bundle, bundle.check_fits(**self._base(bundle, allow_different_base)))

    def _base(self, bundle: Bundle, allow: bool) -> dict[str, Any]:
        known = self._base_fingerprint() if bundle.manifest.get("base") else None
        return {"model": self.model, "tokenizer": self.tokenizer, "allow_different_base": allow, "known": known}

    def _base_fingerprint(self) -> dict[str, str | None]:
        """Return the base's fingerprint; taken anew when a weight was replaced or written to."""
        weights = [(p.data_ptr(), p._version) for p in parameters(self.model) if not p.is_inference()]
        state = weights, id(self.tokenizer)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = state, fingerprint(self.model, self.tokenizer)
        return self._fingerprint[1]

    def _on_first_use(self, adapter: LoadedAdapter) -> None:
        """Hook the layers that an adapter changes, and the model (None)."""
        for name in (None, *adapter.deltas):
            handle, users = self._hooks.get(name) or (self._hook_batch_size() if name is None else self._hook(name), 0)
            self._hooks[name] = handle, users + 1

    def _on_last_use(self, adapter: LoadedAdapter) -> None:
        """Remove the hooks that only this adapter needed, and the batches that have it."""
        for key in [key for key in self._batches if any(p.adapter is adapter for row in key for p in row)]:
            del self._batches[key]
        for name in (None, *adapter.deltas):
            handle, users = self._hooks.pop(name)
            if users > 1:
                self._hooks[name] = handle, users - 1
            else:
                handle.remove()

    # hooks are functions, not methods: they are copied along with a model, and a bank is not

    def _hook_batch_size(self) -> Any:
        def note(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
            note_batch_size(_ROWS.get().get(id(self)), args, named)

        return self.model.register_forward_pre_hook(note, with_kwargs=True)

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            batch = _ROWS.get().get(id(self)) or self._default
            return None if batch is None else batch.add(name, inputs[0], output)

        return self.model.get_submodule(name).register_forward_hook(add)
