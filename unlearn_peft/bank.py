"""Adapters on a live base: attach, swap, detach, stack, each with its strength, and leave no trace afterwards.

Deltas are added to the outputs of the base's linear layers by forward hooks. The base's modules and weights are
never replaced or written to, so that removal gives back bit-equal logits, and a tied `lm_head` gets its delta
without the input embeddings seeing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base
from .bundle import Bundle, Delta, read_bundle
from .errors import AdapterError, did_you_mean

_ATTRIBUTE = "_unlearn_peft_bank"


@dataclass(frozen=True)
class Attached:
    """One adapter on a live model."""

    name: str
    bundle: Bundle
    strength: float


class Bank:
    """The adapters of one live model. `Bank.of(model)` is the model's one bank."""

    def __init__(self, model: nn.Module, tokenizer: Any | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.adapters: dict[str, Attached] = {}
        self._hooks: list[Any] = []

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

    def attach(self, bundle: Bundle, name: str, strength: float = 1.0, *, allow_different_base: bool = False) -> None:
        """Check the adapter against the model, then add it; a name that is taken is refused."""
        if name in self.adapters:
            raise AdapterError(
                f"an adapter named '{name}' is attached already: detach or swap it, or give another name"
            )
        bundle.check_fits(self.model, self.tokenizer, allow_different_base=allow_different_base)
        self._set({**self.adapters, name: Attached(name, bundle, float(strength))})

    def detach(self, name: str) -> None:
        """Remove one adapter."""
        if name not in self.adapters:
            near = did_you_mean(name, self.adapters)
            raise AdapterError(
                f"no adapter named '{name}' is attached{near}; attached: {', '.join(self.adapters) or 'none'}"
            )
        self._set({key: value for key, value in self.adapters.items() if key != name})

    def restore(self, adapters: dict[str, Attached]) -> None:
        """Go back to an earlier set of adapters (a former value of `.adapters`)."""
        self._set(adapters)

    def _set(self, adapters: dict[str, Attached]) -> None:
        for hook in self._hooks:
            hook.remove()
        self.adapters, self._hooks = adapters, []
        # by content, not by order of attaching: the sum is then the same to the last bit
        ordered = sorted(adapters.values(), key=lambda a: (a.bundle.digest, a.strength, a.name))
        modules = dict(self.model.named_modules())
        for name in dict.fromkeys(name for adapter in ordered for name in adapter.bundle.deltas):
            parts = [
                (a.bundle.deltas[name], a.strength) for a in ordered if name in a.bundle.deltas and a.strength != 0
            ]
            if parts:
                self._hooks.append(modules[name].register_forward_hook(_adder(parts, modules[name])))


def attach(
    model: Any,
    *adapters: str | Path,
    strength: float | Sequence[float] = 1.0,
    name: str | None = None,
    allow_different_base: bool = False,
) -> list[str]:
    """Attach one adapter or more to a live model; returns the names under which they can be detached.

    Args:
        model: a transformers model or a `Base`.
        adapters: adapter directories; a stack of them is the exact sum of their effects, in any order.
        strength: factor on the effect, one for all or one each; 1 is as trained, 0 is off.
        name: for a single adapter, another name than its folder's.
        allow_different_base: attach even if the base's fingerprint differs (shapes must still fit).

    Raises:
        AdapterError: if any of them is refused; then none is attached.
    """
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(adapters)
    if len(strengths) != len(adapters):
        raise AdapterError(f"{len(strengths)} strengths for {len(adapters)} adapters: expected one, or one each")
    bank = Bank.of(model)
    before, names = bank.adapters, []
    try:
        for path, factor in zip(adapters, strengths, strict=True):
            bundle = read_bundle(path)
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


def swap(model: Any, old: str, new: str | Path, *, strength: float = 1.0, name: str | None = None) -> str:
    """Replace the adapter named `old` by the one in the folder `new`; if that is refused, `old` stays."""
    bank = Bank.of(model)
    before = bank.adapters
    bundle = read_bundle(new)
    try:
        bank.detach(old)
        bank.attach(bundle, name or bundle.name, strength)
    except BaseException:
        bank.restore(before)
        raise
    return name or bundle.name


def attached(model: Any) -> dict[str, float]:
    """Return the names and strengths of what is attached."""
    return {name: adapter.strength for name, adapter in Bank.of(model).adapters.items()}


@contextmanager
def forgetting(model: Any, *adapters: str | Path, strength: float | Sequence[float] = 1.0) -> Iterator[Any]:
    """Attach inside a `with` block, and be as before after it.

    `adapters` are directories, as for `attach`; `with forgetting(model, "a", "b"): ...` stacks two.
    """
    bank = Bank.of(model)
    before = bank.adapters
    try:
        attach(model, *adapters, strength=strength)
        yield model
    finally:
        bank.restore(before)


def _adder(parts: Sequence[tuple[Delta, float]], module: Any) -> Any:
    """Return a forward hook that adds the deltas' effects to a linear layer's output.

    Low-rank deltas are concatenated along the rank, so that any number of them costs one pair of thin products.
    """
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    low = [(delta, strength) for delta, strength in parts if delta.down is not None]
    down = up = None
    if low:
        down = torch.cat([d.down.float() for d, _ in low if d.down is not None]).to(weight.device, dtype)  # (R, in)
        up = torch.cat([d.up.float() * (d.scale * s) for d, s in low], dim=1).to(weight.device, dtype)  # (out, R)
    dense = [(d.up.to(weight.device, dtype), s) for d, s in parts if d.down is None]

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(dtype)
        if down is not None and up is not None:
            output = output + nn.functional.linear(nn.functional.linear(x, down), up).to(output.dtype)
        for delta, strength in dense:
            output = output + (strength * nn.functional.linear(x, delta)).to(output.dtype)
        return output

    return add
