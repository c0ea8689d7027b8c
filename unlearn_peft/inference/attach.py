"""One set of adapters for all rows: attach, detach, swap, and leave no trace. A set for each row: see bank.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..adapters.bundle import Bundle
from ..adapters.trust import Trust
from ..adapters.validate import check_strengths
from .bank import Bank


def attach(
    model: Any,
    *adapters: str | Path | Bundle,
    strength: float | Sequence[float] = 1.0,
    name: str | None = None,
    allow_different_base: bool = False,
    trust: Trust | None = None,
) -> list[str]:
    """Attach adapters to a live model; returns the names under which they can be detached.

    Args:
        model: a transformers model or a `Base`.
        adapters: adapter directories, or bundles that `read_bundle` returned. The effect of several is the exact sum
            of theirs, in any order.
        strength: factor on the effect, one for all or one each; 1 is as trained, 0 is off.
        name: of a single adapter; by default its folder's.
        allow_different_base: attach even if the base's fingerprint differs (shapes must still fit). This is logged.
        trust: see `read_bundle`.

    Raises:
        AdapterError: if any of them is refused; then none is attached.
    """
    strengths = check_strengths(strength, len(adapters))
    bank = Bank.of(model)
    before, names = bank.adapters, []
    try:
        for adapter, factor in zip(adapters, strengths, strict=True):
            bundle = bank.read(adapter, trust, allow_different_base)
            names.append(name if name and len(adapters) == 1 else bundle.name)
            bank.attach(bundle, names[-1], factor, allow_different_base=allow_different_base)
    except BaseException:
        bank.restore(before)
        raise
    return names


def detach(model: Any, *names: str) -> None:
    """Remove adapters by name; without a name, all of them. The model is then bit-equal to the base again."""
    bank = Bank.of(model)
    for name in names or tuple(bank.adapters):
        bank.detach(name)


def swap(
    model: Any,
    old: str,
    new: str | Path | Bundle,
    *,
    strength: float = 1.0,
    name: str | None = None,
    trust: Trust | None = None,
) -> str:
    """Replace the adapter named `old` by `new`; if that is refused, `old` stays. Returns the new name.

    Reading and checking files takes most of the time: a bundle that was read before is attached at once.
    """
    bank = Bank.of(model)
    bundle = bank.read(new, trust)
    bank.attach(bundle, name or bundle.name, strength, instead_of=old)
    return name or bundle.name


def attached(model: Any) -> dict[str, float]:
    """Return the names and strengths of the attached adapters."""
    bank = Bank.found_on(model)
    return {name: adapter.strength for name, adapter in bank.adapters.items()} if bank else {}


@contextmanager
def forgetting(
    model: Any, *adapters: str | Path | Bundle, strength: float | Sequence[float] = 1.0, trust: Trust | None = None
) -> Iterator[Any]:
    """Attach inside a `with` block, and restore what was attached before. Arguments: see `attach`.

    `with forgetting(model, "a", "b"): ...` adds two.
    """
    bank = Bank.of(model)
    before = bank.adapters
    try:
        attach(model, *adapters, strength=strength, trust=trust)
        yield model
    finally:
        bank.restore(before)
