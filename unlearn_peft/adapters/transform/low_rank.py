"""Arithmetic on sets of deltas: exact sums, truncation to a rank, and the share of a delta that is lost by it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError
from ..bundle import Bundle, Delta
from ..validate import check_strengths


def rank_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the rank fields of a LoRA config with a scaling of 1; `ranks` is by module name."""
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return {"r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": pattern, "bias": "none"}


def weighted(
    bundles: Sequence[Bundle], strengths: Sequence[float] | None, *, without_base: bool = True
) -> list[tuple[Bundle, float]]:
    """Pair adapters with their strengths, 1 by default; an AdapterError says why they cannot be added up.

    With a base at hand, `check_fits` compares the base weights that they carry; else they are refused here.
    """
    if not bundles:
        raise AdapterError("no adapters given: expected an adapter at least")
    factors = check_strengths(strengths or 1.0, len(bundles))
    for bundle in bundles if without_base else ():
        bundle.check_without_base()
    bases = [bundle.manifest.get("base") for bundle in bundles]
    if len({json.dumps(base.get("fingerprint"), sort_keys=True) for base in bases if base}) > 1:
        raise AdapterError("these adapters were trained on different bases: a stack needs one base for all")
    return list(zip(bundles, factors, strict=True))


def in_order(pairs: Iterable[tuple[Bundle, float]]) -> list[tuple[Bundle, float]]:
    """Sort a set by content, so that its sum has the same bits in whatever order it is given."""
    return sorted(pairs, key=lambda pair: (pair[0].digest, pair[1]))


def parts_of(pairs: Sequence[tuple[Bundle, float]]) -> dict[str, list[tuple[Delta, float]]]:
    """Return the deltas that add up in each module that a set changes, each with its factor."""
    return {
        name: [(bundle.deltas[name], factor) for bundle, factor in pairs if name in bundle.deltas]
        for name in sorted({name for bundle, _ in pairs for name in bundle.deltas})
    }


def concatenated(parts: Sequence[tuple[Delta, float]]) -> tuple[Tensor, Tensor]:
    """Return `up (out, R)` in float32 and `down (R, in)`, whose product is the exact sum of deltas.

    Ranks are concatenated; scalings and factors are folded into `up`. A dense delta is itself times the identity.
    """
    down = torch.cat([torch.eye(delta.shape[1]) if delta.down is None else delta.down for delta, _ in parts])
    return torch.cat([delta.up.float() * (delta.scale * factor) for delta, factor in parts], dim=1), down


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of a rank for the product of `up (out, R)` and `down (R, in)`, and their `lost_share`.

    Keeps the largest singular values (Eckart and Young), from the factors' QR decompositions in float64.
    """
    left, upper = torch.linalg.qr(up.double())  # (out, k), (k, R)
    right, lower = torch.linalg.qr(down.double().T)  # (in, m), (m, R)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = values[:rank].sqrt()
    less_up, less_down = (left @ u[:, :rank] * root).float(), (root[:, None] * (v[:rank] @ right.T)).float()
    return less_up, less_down, lost_share(Delta(up, down), Delta(less_up, less_down))


def lost_share(whole: Delta, rest: Delta) -> float:
    """Return |whole - rest| / |whole| in Frobenius norm, without multiplying out the factors of two low-rank deltas."""
    if whole.down is None or rest.down is None:
        difference = Delta(whole.matrix() - rest.matrix(), None)
    else:
        ups = torch.cat([whole.up.double() * whole.scale, -rest.up.double() * rest.scale], 1)
        difference = Delta(ups, torch.cat([whole.down.double(), rest.down.double()]))
    norm = frobenius_norm(whole)
    return frobenius_norm(difference) / norm if norm > 0 else 0.0


def frobenius_norm(delta: Delta) -> float:
    """Return the Frobenius norm of a delta, without multiplying its factors out."""
    up = delta.up.double()
    if delta.down is None:
        return float(up.norm()) * abs(delta.scale)
    down = delta.down.double()
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return float(squared.clamp(min=0).sqrt()) * abs(delta.scale)
