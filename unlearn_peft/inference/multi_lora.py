"""Row gates: what the rows of a batch get added to a linear layer's output, each row its own set of adapters.

Sets of adapters, one a row, come in as an `AdapterBatch`; hooks on the base's linear layers ask it for their deltas.
For adapters k of ranks r_k, a layer's output becomes y = Wx + sum over k of s_k B_k A_k x, exactly, in one pass for all
rows. Of two ways to compute it, the one that reads fewer numbers is taken:

- gated: all factors side by side, A (R, in) and B (out, R) with R the sum of all ranks in the batch, and
  y = Wx + ((x A^T) * g) B^T, where the gate g (rows, R) holds a row's strength at each rank, or 0;
- by row: each row's own factors side by side, A (rows, in, r) and B (rows, r, out), in batched products.

A row with the empty set gets 0 added, and so stays bit-equal to the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..adapters.bundle import Bundle, Delta
from ..errors import AdapterError
from ..models.layers import submodule

_BY_ROW_UP_TO = 2  # times the numbers that gates would read; batched products need no second pass over them
_BATCH: ContextVar[tuple[int, int] | None] = ContextVar("unlearn_peft_batch", default=None)  # rows, tokens of a row


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter on the base's device, read and checked. Two versions of one adapter are two objects."""

    bundle: Bundle  # without its deltas, which the file holds in its own precision
    deltas: dict[str, Delta]  # by module name, where and as the module computes
    different_base: tuple[str, ...] = ()  # in what its base differs from the one that it is on: allowed, but unsafe
    pins: int = 0  # how many hold it: requests, and its being attached
    _laid: set[str] = field(default_factory=set)

    @classmethod
    def on(cls, model: nn.Module, bundle: Bundle, different_base: tuple[str, ...] = ()) -> LoadedAdapter:
        """Return an adapter on the device of the layers that it changes, in the precision that they compute in."""
        deltas = {}
        for name, delta in bundle.deltas.items():
            weight = cast(Any, submodule(model, name)).weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            down = None if delta.down is None else delta.down.to(weight.device, dtype)
            deltas[name] = Delta(delta.up.to(weight.device, dtype), down, delta.scale)
        return cls(replace(bundle, deltas={}), deltas, different_base)

    @cached_property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = [t for delta in self.deltas.values() for t in (delta.up, delta.down) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def laid(self, name: str) -> Delta:
        """Return a layer's low-rank delta as `AdapterBatch` copies it: scaled already, with `up.t()` contiguous.

        This is done when it is first asked for, and in the place of what was there: an adapter that is swapped in and
        never used costs less.
        """
        delta = self.deltas[name]
        if name not in self._laid:  # two threads may both do it, from the same delta or, the later one, in vain
            up = (delta.up.float().t() * delta.scale).contiguous().to(delta.up.dtype)
            delta = self.deltas[name] = Delta(up.t(), delta.down)
            self._laid.add(name)
        return delta


class WeightedAdapter(NamedTuple):
    """One adapter of a row's set."""

    adapter: LoadedAdapter
    strength: float


class AdapterBatch:
    """The sets of a batch's rows, and what each layer adds for them.

    Args:
        rows: one set a row; a single one is for all rows of any batch. A batch may hold each row several times in
            succession, as beams and `num_return_sequences` do.
    """

    def __init__(self, rows: Sequence[Sequence[WeightedAdapter]]) -> None:
        # by content, not by order of attaching: the sum is then the same to the last bit
        ordered = [sorted(row, key=lambda part: (part.adapter.bundle.identity, part.strength)) for row in rows]
        self.rows: list[dict[LoadedAdapter, float]] = []
        for row in ordered:
            strengths: dict[LoadedAdapter, float] = {}
            for adapter, strength in row:
                if strength:
                    strengths[adapter] = strengths.get(adapter, 0.0) + strength
            self.rows.append(strengths)
        if all(row == self.rows[0] for row in self.rows):
            self.rows = self.rows[:1]
        self.size = len(rows)
        self.adapters = tuple(dict.fromkeys(adapter for row in self.rows for adapter in row))
        self._layers: dict[str, _Layer | None] = {}
        self._gates: dict[Any, Tensor] = {}  # of layers that are alike

    def add(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """Return a layer's output, (B, T, out), with the deltas of its rows added; None where there are none."""
        if name not in self._layers:
            with torch.inference_mode(False), torch.no_grad():  # it may serve under gradients later
                self._layers[name] = _layer(name, self)
        layer = self._layers[name]
        return None if layer is None else layer.add(name, x, output)

    def gate(self, ranks: dict[LoadedAdapter, int], like: Tensor) -> Tensor:
        """Return a row's strength at each rank of some adapters, one after the other: (rows, 1, R), as `like` is."""
        key = tuple(ranks.items()), like.device, like.dtype
        if key not in self._gates:
            table = [[row.get(a, 0.0) for a, rank in ranks.items() for _ in range(rank)] for row in self.rows]
            self._gates[key] = torch.tensor(table)[:, None].to(like.device, like.dtype)
        return self._gates[key]


def note_batch_size(mix: AdapterBatch | None, args: Any, named: dict[str, Any]) -> None:
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


def _layer(name: str, mix: AdapterBatch) -> _Layer | None:
    """Lay side by side what the rows' adapters hold for one layer; None where they hold nothing."""
    low = {a: a.laid(name) for a in mix.adapters if name in a.deltas and a.deltas[name].rank}
    dense = _dense(name, mix, [a for a in mix.adapters if name in a.deltas and not a.deltas[name].rank])
    down = up = gate = None
    if low:
        ranks = {adapter: delta.rank or 0 for adapter, delta in low.items()}
        widest = max(sum(ranks.get(adapter, 0) for adapter in row) for row in mix.rows)
        some = next(iter(low.values())).up
        # in half precision 0 times what overflows is not 0
        if some.dtype == torch.float16 or len(mix.rows) * widest <= _BY_ROW_UP_TO * sum(ranks.values()):
            down, up = _by_row(mix.rows, low, widest)
        else:
            down = torch.cat([cast(Tensor, delta.down) for delta in low.values()])
            up = torch.cat([delta.up.t() for delta in low.values()])
            gate = mix.gate(ranks, some)
    return _Layer(len(mix.rows), down, up, gate, dense) if low or dense else None


def _by_row(
    rows: Sequence[dict[LoadedAdapter, float]], low: dict[LoadedAdapter, Delta], widest: int
) -> tuple[Tensor, Tensor]:
    some = next(iter(low.values()))
    down, up, strengths = [], [], []
    for row in rows:
        parts = [(low[adapter], strength) for adapter, strength in row.items() if adapter in low]
        if room := widest - sum(delta.rank or 0 for delta, _ in parts):
            nothing = [t.new_zeros(room, t.shape[1]) for t in (some.up.t(), cast(Tensor, some.down))]
            parts.append((Delta(nothing[0].t(), nothing[1]), 0.0))
        down += [cast(Tensor, delta.down) for delta, _ in parts]
        up += [delta.up.t() for delta, _ in parts]
        strengths.append([strength for delta, strength in parts for _ in range(delta.rank or 0)])
    downs, ups = (torch.cat(parts).view(len(rows), widest, -1) for parts in (down, up))
    if any(strength not in (0.0, 1.0) for row in strengths for strength in row):
        ups = (ups.float() * torch.tensor(strengths, device=ups.device)[:, :, None]).to(ups.dtype)
    return downs.transpose(1, 2), ups


def _dense(name: str, mix: AdapterBatch, adapters: Sequence[LoadedAdapter]) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for adapter in adapters:
        delta = adapter.deltas[name].up
        strengths = torch.tensor([row.get(adapter, 0.0) for row in mix.rows])
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
