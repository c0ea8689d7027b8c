"""Arithmetic on low-rank deltas: sums, truncation, and what is lost by it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError
from ..bundle import Bundle, Delta


def scaled_by_one(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the part of a LoRA's config that says its ranks, by module, where scalings are folded into the factors."""
    most = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": other, "bias": "none"}


def check_set(bundles: Sequence[Bundle], factors: Sequence[float]) -> None:
    """Check that adapters can be added up: a finite strength each, one base for all.

    Raises:
        AdapterError: saying what is wrong.
    """
    if not bundles or len(factors) != len(bundles):
        raise AdapterError(
            f"{len(factors)} strengths for {len(bundles)} adapters: expected one each, and an adapter at least"
        )
    if wild := [factor for factor in factors if not isfinite(factor)]:
        raise AdapterError(f"a strength is {wild[0]}: expected a finite number, 1 is as trained")
    prints = {
        json.dumps(b.manifest["base"].get("fingerprint"), sort_keys=True) for b in bundles if b.manifest.get("base")
    }
    if len(prints) > 1:
        raise AdapterError("these adapters were trained on different bases: a stack needs one base for all")


def in_order(bundles: Sequence[Bundle], factors: Sequence[float]) -> tuple[list[Bundle], list[float]]:
    """Order a set by content, so that its sum is the same to the last bit however it was given."""
    ordered = sorted(zip(bundles, factors, strict=True), key=lambda pair: (pair[0].digest, pair[1]))
    return [bundle for bundle, _ in ordered], [factor for _, factor in ordered]


def parts_of(bundles: Sequence[Bundle], factors: Sequence[float]) -> dict[str, list[tuple[Delta, float]]]:
    """Return, for each module that a set changes, the deltas that add up there and the factor on each."""
    return {
        name: [(b.deltas[name], factor) for b, factor in zip(bundles, factors, strict=True) if name in b.deltas]
        for name in sorted({name for bundle in bundles for name in bundle.deltas})
    }


def concatenated(parts: Sequence[tuple[Delta, float]]) -> tuple[Tensor, Tensor]:
    """Return `up (out, R)` in float32 and `down (R, in)` whose product is the exact sum of low-rank deltas.

    Ranks are concatenated; scalings and factors are folded into `up`.
    """
    down = torch.cat([delta.down for delta, _ in parts if delta.down is not None])
    return torch.cat([delta.up.float() * (delta.scale * factor) for delta, factor in parts], dim=1), down


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of a rank for the product `up @ down`, and the relative error in Frobenius norm.

    Eckart and Young: keep the largest singular values. They are found from the factors' QR decompositions, in float64,
    so that the product (out, in) is never made.

    Args:
        up: (out, R).
        down: (R, in).
        rank: how many singular values to keep.
    """
    left, upper = torch.linalg.qr(up.double())  # (out, k), (k, R)
    right, lower = torch.linalg.qr(down.double().T)  # (in, m), (m, R)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept, whole = values[:rank], values.square().sum()
    root = kept.sqrt()
    error = (values[rank:].square().sum() / whole).sqrt().item() if whole > 0 else 0.0
    return (left @ u[:, :rank] * root).float(), (root[:, None] * (v[:rank] @ right.T)).float(), error


def lost_share(delta: Delta, up: Tensor, down: Tensor | None) -> float:
    """Return |whole - kept| / |whole| in Frobenius norm; of products without ever making them."""
    if delta.down is None or down is None:
        whole = delta.scale * (delta.up.float() if delta.down is None else delta.up.float() @ delta.down.float())
        kept = up if down is None else up @ down
        norm = whole.norm()
        return float((whole - kept).norm() / norm) if norm > 0 else 0.0
    first = torch.cat([delta.up.double() * delta.scale, -up.double()], 1)
    second = torch.cat([delta.down.double(), down.double()])
    size = len(delta.down)

    def squared(left: Tensor, right: Tensor) -> float:
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0))

    norm = squared(first[:, :size], second[:size])
    return float((squared(first, second) / norm) ** 0.5) if norm > 0 else 0.0


def frobenius_norm(delta: Delta) -> float:
    """Return the Frobenius norm of a delta's effect, without multiplying its factors out."""
    up = delta.up.double()
    if delta.down is None:
        return float(up.norm()) * abs(delta.scale)
    down = delta.down.double()
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return float(squared.clamp(min=0).sqrt()) * abs(delta.scale)
