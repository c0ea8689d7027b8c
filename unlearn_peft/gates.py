"""Row gates: what the rows of a batch get added to a linear layer's output, each row its own set of adapters.

Sets of adapters, one a row, come in as a `Mix`; hooks on the base's linear layers ask it for their part. For adapters k
of ranks r_k, a layer's output becomes y = Wx + sum over k of s_k B_k A_k x, exactly, in one pass for all rows. Of two
ways to it, the one that reads fewer numbers is taken:

- gated: all factors side by side, A (R, in) and B (out, R) with R the sum of all ranks in the batch, and
  y = Wx + ((x A^T) * g) B^T, where the gate g (rows, R) holds a row's strength at each rank, or 0;
- by row: each row's own factors side by side, A (rows, in, r) and B (rows, r, out), in batched products.

A row with the empty set gets 0 added, and so stays bit-equal to the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .bundle import Bundle, Delta
from .errors import AdapterError

_BY_ROW_UP_TO = 2  # times the numbers that gates would read; batched products need no second pass over them
_BATCH: ContextVar[tuple[int, int] | None] = ContextVar("unlearn_peft_batch", default=None)  # rows, tokens of a row


@dataclass(eq=False)
class Resident:
    """An adapter on the base's device, read and checked. Two versions of one adapter are two objects."""

    bundle: Bundle
    deltas: dict[str, Delta]  # by module name, where and as the module computes
    different_base: tuple[str, ...] = ()  # in what its base differs from the one that it is on: allowed, but unsafe
    pins: int = 0  # how many hold it: requests, and its being attached

    @classmethod
    def on(cls, model: nn.Module, bundle: Bundle, different_base: tuple[str, ...] = ()) -> Resident:
        """Return an adapter on the device of the layers that it changes, in the precision that they compute in."""
        deltas = {}
        for name, delta in bundle.deltas.items():
            weight = cast(Tensor, model.get_submodule(name).weight)
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            down = None if delta.down is None else delta.down.to(weight.device, dtype)
            deltas[name] = Delta(delta.up.to(weight.device, dtype), down, delta.scale)
        return cls(bundle, deltas, different_base)

    @cached_property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = [t for delta in self.deltas.values() for t in (delta.up, delta.down) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Part(NamedTuple):
    """One adapter of a row's set."""

    adapter: Resident
    strength: float


class Mix:
    """The sets of a batch's rows, and what each layer adds for them.

    Args:
        rows: one set a row; a single one is for all rows of any batch. A batch may hold each row several times in
            succession, as beams and `num_return_sequences` do.
    """

    def __init__(self, rows: Sequence[Sequence[Part]]) -> None:
        # by content, not by order of attaching: the sum is then the same to the last bit
        ordered = [sorted(row, key=lambda part: (part.adapter.bundle.identity, part.strength)) for row in rows]
        self.rows = [tuple(part for part in row if part.strength) for row in ordered]
        if len(set(self.rows)) == 1:
            self.rows = self.rows[:1]
        self.size = len(rows)
        self._layers: dict[str, _Layer | None] = {}

    def add(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """Return a layer's output, (B, T, out), with the deltas of its rows added; None where there are none."""
        if name not in self._layers:
            with torch.inference_mode(False), torch.no_grad():  # it may serve under gradients later
                self._layers[name] = _layer(name, self.rows)
        layer = self._layers[name]
        return None if layer is None else layer.add(name, x, output)


def tell_batch(mix: Mix | None, args: Any, named: dict[str, Any]) -> None:
    """Note the size of the batch that a model is about to run, and check it against the sets given for its rows.

    Raises:
        AdapterError: if they cannot be shared out between the rows.
    """
    if mix is None or mix.size == 1:
        return
    ids = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
    ids = args[0] if ids is None and args else ids
    if not isinstance(ids, Tensor):
        return
    if ids.shape[0] % mix.size:
        raise AdapterError(f"{mix.size} sets of adapters for a batch of {ids.shape[0]} rows: expected one set a row")
    _BATCH.set((ids.shape[0], ids.shape[1]))


@dataclass
class _Layer:
    """What the rows of a batch get added in one linear layer."""

    rows: int
    down: Tensor | None  # by row: (rows, in, r); gated: (R, in)
    up: Tensor | None  # by row: (rows, r, out); gated: (R, out)
    gate: Tensor | None  # (rows, 1, R)
    dense: list[tuple[Tensor, Tensor, Tensor]]  # (in, out), the rows that have it (n,), their strengths (n, 1, 1)

    def add(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        rows, some = self.rows, self.down if self.down is not None else self.dense[0][0]
        if rows > 1 and x.dim() != 3:
            _check_flat(name, x)
        found = output
        if x.dim() != 3 or x.shape[0] != rows:  # (rows, T, in): what repeats a row stands beside it
            x, found = x.reshape(rows, -1, x.shape[-1]), output.reshape(rows, -1, output.shape[-1])
        if x.dtype != some.dtype:
            x = x.to(some.dtype)
        if output.requires_grad or output.dtype != some.dtype or not found.is_contiguous():
            found = found.to(some.dtype, copy=True, memory_format=torch.contiguous_format)
        if self.up is not None and self.down is not None:
            if self.gate is None:
                found.baddbmm_(torch.bmm(x, self.down), self.up)
            else:
                inner = nn.functional.linear(x, self.down).mul_(self.gate)
                found.view(-1, found.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self.up)
        for delta, chosen, strengths in self.dense:
            found.index_add_(0, chosen, (x[chosen] * strengths) @ delta)
        return found.view(output.shape).to(output.dtype)


def _layer(name: str, rows: Sequence[Sequence[Part]]) -> _Layer | None:
    """Lay side by side what the rows' adapters hold for one layer; None where they hold nothing."""
    low = [[part for part in row if _rank(part, name)] for row in rows]
    full = [[part for part in row if name in part.adapter.deltas and not _rank(part, name)] for row in rows]
    down = up = gate = None
    adapters = list(dict.fromkeys(part.adapter for row in low for part in row))
    if adapters:
        widest = max(sum(_rank(part, name) for part in row) for row in low)
        total = sum(adapter.deltas[name].rank or 0 for adapter in adapters)
        half = adapters[0].deltas[name].up.dtype == torch.float16  # 0 times what overflows is not 0
        if half or len(rows) * widest <= _BY_ROW_UP_TO * total:
            down, up = _by_row(name, low, widest, adapters[0].deltas[name])
        else:
            down, up, gate = _gated(name, low, adapters)
    dense = _dense(name, full)
    return _Layer(len(rows), down, up, gate, dense) if adapters or dense else None


def _rank(part: Part, name: str) -> int:
    delta = part.adapter.deltas.get(name)
    return 0 if delta is None else delta.rank or 0


def _by_row(name: str, rows: Sequence[Sequence[Part]], widest: int, like: Delta) -> tuple[Tensor, Tensor]:
    down = like.up.new_zeros(len(rows), widest, like.down.shape[1])  # type: ignore[union-attr]
    up = like.up.new_zeros(len(rows), like.up.shape[0], widest)
    for n, row in enumerate(rows):
        first = 0
        for adapter, strength in row:
            delta, last = adapter.deltas[name], first + (adapter.deltas[name].rank or 0)
            down[n, first:last] = delta.down  # type: ignore[assignment]
            up[n, :, first:last] = delta.up.float() * (delta.scale * strength)
            first = last
    return down.transpose(1, 2), up.transpose(1, 2)


def _gated(name: str, rows: Sequence[Sequence[Part]], adapters: Sequence[Resident]) -> tuple[Tensor, Tensor, Tensor]:
    deltas = [adapter.deltas[name] for adapter in adapters]
    down = torch.cat([delta.down for delta in deltas if delta.down is not None])
    up = torch.cat([delta.up.float().t() * delta.scale for delta in deltas]).to(down.dtype)
    strengths = torch.zeros(len(rows), len(adapters))
    for n, row in enumerate(rows):
        for adapter, strength in row:
            strengths[n, adapters.index(adapter)] += strength
    ranks = torch.tensor([delta.rank for delta in deltas])
    gate = strengths.repeat_interleave(ranks, dim=1)[:, None]  # (rows, 1, R)
    return down, up, gate.to(down.device, down.dtype)


def _dense(name: str, rows: Sequence[Sequence[Part]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for adapter in dict.fromkeys(part.adapter for row in rows for part in row):
        delta = adapter.deltas[name].up
        strengths = torch.tensor([sum(part.strength for part in row if part.adapter is adapter) for row in rows])
        chosen = strengths.nonzero()[:, 0]
        found.append((delta.t(), chosen.to(delta.device), strengths[chosen, None, None].to(delta.device, delta.dtype)))
    return found


def _check_flat(name: str, x: Tensor) -> None:
    """Refuse a layer that runs on some of a batch's tokens, as experts do: which row they are of cannot be told."""
    batch = _BATCH.get()
    if x.dim() != 2 or batch is None or x.shape[0] != batch[0] * batch[1]:
        raise AdapterError(
            f"'{name}' runs on tokens {tuple(x.shape)} whose rows cannot be told apart: give all rows of a batch the "
            "same set of adapters, or run each row alone"
        )
