"""Multi-LoRA: what the rows of a batch add to a linear layer's output, each row with its own set of adapters.

Sets of adapters, one a row, come in as an `AdapterBatch`; hooks on the base's linear layers call its `add`. For
adapters k of ranks r_k, a layer's output becomes y = Wx + sum over k of s_k B_k A_k x, exactly, in one pass for all
rows. Of two ways to compute it, the one that reads fewer numbers is taken:

- stacked: the factors of all adapters in the batch, A (R, in) and B (out, R) with R the sum of their ranks, and
  y = Wx + ((x A^T) * g) B^T, where g (rows, R) holds a row's strength at each rank, or 0;
- by row: each row's own factors stacked, A (rows, in, r) and B (rows, r, out), in batched products.

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

_BY_ROW_UP_TO = 2  # times the numbers that the stacked way reads; batched products need no second pass over them
_BATCH_TOKENS: ContextVar[int] = ContextVar("unlearn_peft_batch", default=-1)  # of all rows, with padding; -1: unknown


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that was checked and put on the base's device. Two versions of one adapter are two objects."""

    bundle: Bundle  # without its deltas, which the file holds in its own precision
    deltas: dict[str, Delta]  # by module name, on its device and in its precision
    different_base: tuple[str, ...] = ()  # see `Bundle.check_fits`
    pins: int = 0  # of leases, of being attached, of being cached
    _scaled: set[str] = field(default_factory=set)

    @classmethod
    def on(cls, model: nn.Module, bundle: Bundle, different_base: tuple[str, ...] = ()) -> LoadedAdapter:
        """Return an adapter on the device of the layers that it changes, in the precision that they compute in."""
        deltas = {}
        for name, delta in bundle.deltas.items():
            weight = cast(Any, submodule(model, name)).weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            down = delta.down
            down = None if down is None else down.to(weight.device, dtype)
            deltas[name] = Delta(delta.up.to(weight.device, dtype), down, delta.scale)
        return cls(replace(bundle, deltas={}), deltas, different_base)

    @cached_property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = [t for delta in self.deltas.values() for t in (delta.up, delta.down) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def scaled(self, name: str) -> Delta:
        """Return a layer's low-rank delta as `AdapterBatch` copies it: its scale multiplied in, `up.t()` contiguous.

        It replaces the delta on first use, so that an adapter that is swapped in and never used costs less.
        """
        delta = self.deltas[name]
        if name not in self._scaled:  # two threads may both do this: what was scaled already has scale 1
            up = (delta.up.float().t() * delta.scale).contiguous().to(delta.up.dtype)
            delta = self.deltas[name] = Delta(up.t(), delta.down)
            self._scaled.add(name)
        return delta


class WeightedAdapter(NamedTuple):
    """One adapter of a row's set."""

    adapter: LoadedAdapter
    strength: float


class AdapterBatch:
    """The sets of a batch's rows, one a row or one for all (see `Bank.rows`), and what each layer adds for them."""

    def __init__(self, rows: Sequence[Sequence[WeightedAdapter]]) -> None:
        self.rows: list[dict[LoadedAdapter, float]] = []
        for row in rows:
            strengths: dict[LoadedAdapter, float] = {}
            # by content, not by order of attaching: the sum is then the same to the last bit
            for adapter, strength in sorted(row, key=lambda part: (part.adapter.bundle.identity, part.strength)):
                if strength:
                    strengths[adapter] = strengths.get(adapter, 0.0) + strength
            self.rows.append(strengths)
        if all(row == self.rows[0] for row in self.rows):
            self.rows = self.rows[:1]
        self.size = len(rows)
        self.adapters = tuple(dict.fromkeys(adapter for row in self.rows for adapter in row))
        self._layers: dict[str, _Layer | None] = {}
        self._scales: dict[Any, Tensor] = {}  # layers with the same ranks share them

    def add(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """Return a layer's output, (B, T, out), with the deltas of its rows added; None where there are none."""
        if name not in self._layers:
            with torch.inference_mode(False), torch.no_grad():  # it may serve under gradients later
                self._layers[name] = _layer(name, self)
        layer = self._layers[name]
        return None if layer is None else layer.add(name, x, output)

    def scales(self, ranks: dict[LoadedAdapter, int], like: Tensor) -> Tensor:
        """Return each row's strength at each rank of the stacked adapters, (rows, 1, R); device and dtype of `like`."""
        key = tuple(ranks.items()), like.device, like.dtype
        if key not in self._scales:
            table = [[row.get(a, 0.0) for a, rank in ranks.items() for _ in range(rank)] for row in self.rows]
            self._scales[key] = torch.tensor(table)[:, None].to(like.device, like.dtype)
        return self._scales[key]


def note_batch_size(batch: AdapterBatch | None, args: Any, named: dict[str, Any]) -> None:
    """Note the size of the batch that a model is about to run; refuse one whose rows are no multiple of the sets."""
    if batch is None or batch.size == 1:
        return
    inputs = (named.get("input_ids"), named.get("inputs_embeds"), *args[:1])
    ids = next((ids for ids in inputs if ids is not None), None)
    if not isinstance(ids, Tensor):
        return
    if ids.shape[0] % batch.size:
        raise AdapterError(f"{batch.size} sets of adapters for a batch of {ids.shape[0]} rows: expected one set a row")
    _BATCH_TOKENS.set(ids.shape[0] * ids.shape[1])


@dataclass
class _Layer:
    """The factors of a batch's adapters in one linear layer."""

    rows: int
    down: Tensor | None  # by row: (rows, in, r); stacked: (R, in)
    up: Tensor | None  # by row: (rows, r, out); stacked: (R, out)
    scales: Tensor | None  # stacked: (rows, 1, R)
    dense: list[tuple[Tensor, Tensor, Tensor]]  # (in, out), the rows that have it (n,), their strengths (n, 1, 1)

    def add(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        rows, dtype = self.rows, (self.down if self.down is not None else self.dense[0][0]).dtype
        if rows > 1 and x.dim() != 3 and (x.dim() != 2 or x.shape[0] != _BATCH_TOKENS.get()):
            raise AdapterError(  # it runs on some tokens of a batch, as experts do: their rows are unknown
                f"'{name}' runs on tokens {tuple(x.shape)} whose rows cannot be told apart: give all rows of a batch "
                "the same set of adapters, or run each row alone"
            )
        result = output
        if x.dim() != 3 or x.shape[0] != rows:  # (rows, T, in): the repeats of a row become more tokens of it
            x, result = x.reshape(rows, -1, x.shape[-1]), output.reshape(rows, -1, output.shape[-1])
        if x.dtype != dtype:
            x = x.to(dtype)
        if output.requires_grad or output.dtype != dtype or not result.is_contiguous():
            result = result.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if self.up is not None and self.down is not None:
            if self.scales is None:
                result.baddbmm_(torch.bmm(x, self.down), self.up)
            else:
                inner = nn.functional.linear(x, self.down).mul_(self.scales)
                result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self.up)
        for delta, chosen, strengths in self.dense:
            result.index_add_(0, chosen, (x[chosen] * strengths) @ delta)
        return result.view(output.shape).to(output.dtype)


def _layer(name: str, batch: AdapterBatch) -> _Layer | None:
    """Stack what the rows' adapters hold for one layer; None where they hold nothing."""
    low = {a: a.scaled(name) for a in batch.adapters if name in a.deltas and a.deltas[name].rank}
    dense = []
    for adapter in batch.adapters:
        if name in adapter.deltas and not adapter.deltas[name].rank:
            delta = adapter.deltas[name].up
            strengths = torch.tensor([row.get(adapter, 0.0) for row in batch.rows])
            chosen = strengths.nonzero()[:, 0]
            factors = strengths[chosen, None, None].to(delta.device, delta.dtype)
            dense.append((delta.t(), chosen.to(delta.device), factors))
    down = up = scales = None
    if low:
        ranks = {adapter: delta.rank or 0 for adapter, delta in low.items()}
        widest = max(sum(ranks.get(adapter, 0) for adapter in row) for row in batch.rows)
        like = next(iter(low.values())).up
        # in half precision 0 times what overflows is not 0
        if like.dtype == torch.float16 or len(batch.rows) * widest <= _BY_ROW_UP_TO * sum(ranks.values()):
            down, up = _by_row(batch.rows, low, widest)
        else:
            down = torch.cat([cast(Tensor, delta.down) for delta in low.values()])
            up = torch.cat([delta.up.t() for delta in low.values()])
            scales = batch.scales(ranks, like)
    return _Layer(len(batch.rows), down, up, scales, dense) if low or dense else None


def _by_row(
    rows: Sequence[dict[LoadedAdapter, float]], low: dict[LoadedAdapter, Delta], widest: int
) -> tuple[Tensor, Tensor]:
    """Return each row's stacked factors, (rows, in, widest) and (rows, widest, out), padded with zeros."""
    any_delta = next(iter(low.values()))
    down, up, strengths = [], [], []
    for row in rows:
        parts = [(low[adapter], strength) for adapter, strength in row.items() if adapter in low]
        if room := widest - sum(delta.rank or 0 for delta, _ in parts):
            zeros = [t.new_zeros(room, t.shape[1]) for t in (any_delta.up.t(), cast(Tensor, any_delta.down))]
            parts.append((Delta(zeros[0].t(), zeros[1]), 0.0))
        down += [cast(Tensor, delta.down) for delta, _ in parts]
        up += [delta.up.t() for delta, _ in parts]
        strengths.append([strength for delta, strength in parts for _ in range(delta.rank or 0)])
    downs, ups = (torch.cat(parts).view(len(rows), widest, -1) for parts in (down, up))
    if any(strength not in (0.0, 1.0) for row in strengths for strength in row):
        ups = (ups.float() * torch.tensor(strengths, device=ups.device)[:, :, None]).to(ups.dtype)
    return downs.transpose(1, 2), ups
