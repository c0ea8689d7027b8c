"""Many adapters on one live base: a set for all rows (`attach`), or a set for each row of a batch (`Bank.rows`).

Deltas are added to the outputs of the base's linear layers by forward hooks (see inference/multi_lora.py). The base's
modules and weights are never replaced or written to, so that a row without adapters, and the model after removal, give
bit-equal logits, and a tied `lm_head` gets its delta without the input embeddings seeing it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.bundle import Bundle
from ..adapters.trust import Trust
from ..errors import AdapterError, did_you_mean
from ..models.base import Base
from ..models.fingerprint import fingerprint
from ..models.layers import parameters
from .adapter_cache import AdapterCache, BankStats, RegisteredAdapter
from .adapter_cache import Applied as Applied
from .multi_lora import AdapterBatch, LoadedAdapter, WeightedAdapter, note_batch_size

_ATTRIBUTE = "_unlearn_peft_bank"
_MIXES_KEPT = 4  # batches whose factors stay laid side by side, for the next step
_ROWS: ContextVar[Mapping[int, AdapterBatch]] = ContextVar("unlearn_peft_rows", default=MappingProxyType({}))  # by bank
Forget = Iterable[str] | Mapping[str, float]  # adapters' names, or names and strengths


@dataclass(frozen=True)
class Attached:
    """One adapter that is attached to all rows."""

    name: str
    adapter: LoadedAdapter
    strength: float


class HeldSet:
    """A set of adapters, the same versions of them until it is released (it is a context manager, too)."""

    def __init__(self, bank: Bank, parts: Mapping[str, WeightedAdapter]) -> None:
        self.bank, self.parts = bank, tuple(parts.values())
        self.applied = tuple(
            Applied(n, p.adapter.bundle.identity, p.strength, p.adapter.different_base, p.adapter.bundle.signed_by)
            for n, p in parts.items()
        )
        lines = sorted(f"{a.sha256} {a.strength!r}" for a in self.applied if a.strength)
        self.digest = hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""
        self.released = False

    def release(self) -> None:
        """Let go of the adapters; a second time does nothing."""
        with self.bank.residents.lock:
            parts, self.released = () if self.released else self.parts, True
            for part in parts:
                self.bank.residents.unpin(part.adapter)

    def __enter__(self) -> HeldSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Bank:
    """The adapters of one live model. `Bank.of(model)` is the model's one bank.

    All methods may be called from many threads. Which rows forget what is a context variable: it holds for the thread
    or task that entered `rows`, and mixes with no other.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, for the base's fingerprint.
        budget_bytes: memory for adapters that were loaded by name; of those that no request holds, the one that was
            used longest ago goes first. None: no limit. What running batches lay side by side comes on top.
        trust: who must have signed, or may sign, adapters that are loaded by name. None: signatures are not looked at.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any | None = None, *, budget_bytes: int | None = None,
        trust: Trust | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.trust = model, tokenizer, trust
        self.residents = AdapterCache(self._fitted, self.misfits, self._first, self._last, budget_bytes)
        self.adapters: dict[str, Attached] = {}  # on all rows
        self._default: AdapterBatch | None = None  # of these
        self._mixes: OrderedDict[tuple[tuple[WeightedAdapter, ...], ...], AdapterBatch] = OrderedDict()
        self._hooks: dict[str, tuple[Any, int]] = {}  # by module name: a handle, and how many adapters need it
        self._batch_hook: Any = None
        self._fingerprint: tuple[Any, dict[str, str | None]] | None = None

    @classmethod
    def of(cls, model: Any) -> Bank:
        """Return the bank of a model or `Base`, made on first use."""
        tokenizer = model.tokenizer if isinstance(model, Base) else None
        live = model.model if isinstance(model, Base) else model
        bank = live.__dict__.get(_ATTRIBUTE)
        if bank is None:
            bank = cls(live, tokenizer)
            object.__setattr__(live, _ATTRIBUTE, bank)
        bank.tokenizer = bank.tokenizer or tokenizer
        return bank  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or a pickled one, has no bank: it gets one of its own when it first needs it."""
        return type(None), ()

    # ---- a set for each row ----

    def register(
        self, name: str, path: str | Path, *, sha256: str | None = None, allow_different_base: bool = False
    ) -> None:
        """Make an adapter known by name; it is read when it is first needed.

        Args:
            name: what rows ask for.
            path: its directory.
            sha256: what its `Bundle.identity` must be; None: whatever it is.
            allow_different_base: take it even if the base's fingerprint differs (shapes must still fit).

        Raises:
            AdapterError: if the name is taken.
        """
        self.residents.register(name, RegisteredAdapter(Path(path), sha256, allow_different_base, self.trust))

    def load(
        self, name: str, path: str | Path, *, sha256: str | None = None, allow_different_base: bool = False
    ) -> None:
        """Make an adapter known by name, and read and check it now. Arguments: see `register`.

        Raises:
            AdapterError: if the name is taken, or the adapter is refused; then the name stays unknown.
        """
        self.register(name, path, sha256=sha256, allow_different_base=allow_different_base)
        try:
            self.hold([name]).release()
        except BaseException:
            self.residents.remove(name)
            raise

    def swap(
        self, name: str, path: str | Path, *, sha256: str | None = None, allow_different_base: bool = False
    ) -> None:
        """Replace a known adapter; what holds the old one keeps it to its end. Arguments: see `register`.

        Raises:
            AdapterError: if the name is unknown, or the new adapter is refused; then the old one stays.
        """
        self.residents.swap(name, RegisteredAdapter(Path(path), sha256, allow_different_base, self.trust))

    def remove(self, name: str) -> None:
        """Forget a known adapter's name; its memory is free when the last request that holds it ends.

        Raises:
            AdapterError: if the name is unknown.
        """
        self.residents.remove(name)

    def hold(self, forget: Forget) -> HeldSet:
        """Load what is not resident, and keep a set of adapters for one request, these versions until it is released.

        Args:
            forget: names of known (or attached) adapters, or names and strengths; 1 is as trained.

        Raises:
            AdapterError: naming (in `.adapter`, too) the one that is unknown or refused, or finds no room in the
                budget; then none is held.
        """
        if isinstance(forget, str):
            raise AdapterError(f"expected a list of adapters' names, found the text '{forget}': write ['{forget}']")
        wanted = forget if isinstance(forget, Mapping) else dict.fromkeys(forget, 1.0)
        parts: dict[str, WeightedAdapter] = {}
        try:
            for name, strength in wanted.items():
                try:
                    parts[name] = WeightedAdapter(self._pinned(name), float(strength))
                except AdapterError as error:
                    error.adapter = name
                    raise
        except BaseException:
            HeldSet(self, parts).release()
            raise
        return HeldSet(self, parts)

    @contextmanager
    def rows(self, sets: Sequence[HeldSet | Forget]) -> Iterator[nn.Module]:
        """Let row i of the batches inside the block forget exactly `sets[i]`, whatever is attached.

        A batch may hold k rows for each set, one after the other, as beams and `num_return_sequences` do. A single set
        is for all rows.

        Raises:
            AdapterError: see `hold`; and when a batch is run whose rows the sets cannot be shared out to.
        """
        with ExitStack() as stack:
            held = [s if isinstance(s, HeldSet) else stack.enter_context(self.hold(s)) for s in sets]
            mix = stack.enter_context(self._mixed(held))
            token = _ROWS.set({**_ROWS.get(), id(self): mix})
            try:
                yield self.model
            finally:
                _ROWS.reset(token)

    def generate(self, *args: Any, forget: Sequence[HeldSet | Forget], **kwargs: Any) -> Any:
        """Call the model's `generate`, where row i of the inputs forgets exactly `forget[i]`; see `rows`."""
        with self.rows(forget):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def known(self) -> tuple[str, ...]:
        """The names that rows can ask for."""
        return tuple(dict.fromkeys((*self.residents.names, *self.adapters)))

    @property
    def stats(self) -> BankStats:
        """What is resident, and what was loaded and evicted so far."""
        return self.residents.stats

    # ---- one set for all rows ----

    def attach(
        self, bundle: Bundle, name: str, strength: float = 1.0, *, allow_different_base: bool = False,
        instead_of: str | None = None,
    ) -> None:  # fmt: skip
        """Check the adapter against the model, then add it for all rows (in place of `instead_of`), or do nothing."""
        with self.residents.lock:
            others = self.adapters if instead_of is None else self._without(instead_of)
            if name in others:
                raise AdapterError(f"an adapter named '{name}' is attached already: swap it, or give another name")
            adapter = self._fitted(bundle, allow_different_base)
            self.restore({**others, name: Attached(name, adapter, float(strength))})

    def detach(self, name: str) -> None:
        """Remove one adapter from all rows."""
        with self.residents.lock:
            self.restore(self._without(name))

    def _without(self, name: str) -> dict[str, Attached]:
        if name not in self.adapters:
            near, there = did_you_mean(name, self.adapters), ", ".join(self.adapters) or "none"
            raise AdapterError(f"no adapter named '{name}' is attached{near}; attached: {there}")
        return {key: value for key, value in self.adapters.items() if key != name}

    def restore(self, adapters: dict[str, Attached]) -> None:
        """Go back to an earlier set of adapters for all rows (a former value of `.adapters`)."""
        with self.residents.lock:
            for attached_ in adapters.values():
                self.residents.pin(attached_.adapter)
            before, self.adapters = self.adapters, adapters
            parts = [WeightedAdapter(a.adapter, a.strength) for a in adapters.values()]
            self._default = AdapterBatch([parts]) if parts else None
            for attached_ in before.values():
                self.residents.unpin(attached_.adapter)

    def misfits(self, bundle: Bundle, allow_different_base: bool = False) -> list[str]:
        """Return what of an adapter does not fit the model."""
        return bundle.misfits(**self._base(bundle, allow_different_base))[0]

    # ---- inside ----

    def _pinned(self, name: str) -> LoadedAdapter:
        with self.residents.lock:
            if name not in self.residents.names and name in self.adapters:
                return self.residents.pin(self.adapters[name].adapter)
        return self.residents.pinned(name)

    def _fitted(self, bundle: Bundle, allow_different_base: bool) -> LoadedAdapter:
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

    def _first(self, adapter: LoadedAdapter) -> None:
        """Hook the layers that an adapter changes."""
        for name in adapter.deltas:
            handle, users = self._hooks.get(name) or (self._hook(name), 0)
            self._hooks[name] = handle, users + 1
        if self._batch_hook is None:
            self._batch_hook = self._batch_hooked()

    def _last(self, adapter: LoadedAdapter) -> None:
        """Take away the hooks that only this adapter needed, and what was laid side by side of it."""
        for key in [key for key in self._mixes if any(p.adapter is adapter for row in key for p in row)]:
            del self._mixes[key]
        for name in adapter.deltas:
            handle, users = self._hooks.pop(name)
            if users > 1:
                self._hooks[name] = handle, users - 1
            else:
                handle.remove()
        if not self._hooks:
            self._batch_hook.remove()
            self._batch_hook = None

    @contextmanager
    def _mixed(self, held: Sequence[HeldSet]) -> Iterator[AdapterBatch]:
        """Lay sets side by side, and see to it that none of their adapters goes before the block ends."""
        if not held:
            raise AdapterError("no sets of adapters given: expected one for each row; [] is the empty set")
        key = tuple(one.parts for one in held)
        with self.residents.lock:
            if any(one.bank is not self or one.released for one in held):
                raise AdapterError("a set of adapters was released, or is another model's: hold it anew")
            mix = self._mixes.pop(key, None) or AdapterBatch(key)
            adapters = [self.residents.pin(part.adapter) for row in key for part in row]
            self._mixes[key] = mix
            while len(self._mixes) > _MIXES_KEPT:
                self._mixes.popitem(last=False)
        try:
            yield mix
        finally:
            with self.residents.lock:
                for adapter in adapters:
                    self.residents.unpin(adapter)

    # functions and not methods: these are copied along with a model, and a bank is not

    def _batch_hooked(self) -> Any:
        def look(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
            note_batch_size(_ROWS.get().get(id(self)), args, named)

        return self.model.register_forward_pre_hook(look, with_kwargs=True)

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            mix = _ROWS.get().get(id(self)) or self._default
            return None if mix is None else mix.add(name, inputs[0], output)

        return self.model.get_submodule(name).register_forward_hook(add)
