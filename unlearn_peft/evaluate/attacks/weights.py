"""Attacks on the weights that need no training: adapter strength, merging and rounding, a second adapter.

Nothing is written into the base: weights are replaced by others inside a `with` block and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.bundle import Bundle, Delta
from ...adapters.read import read_bundle
from ...adapters.transform.low_rank import frobenius_norm
from ...errors import AdapterError
from ...models.layers import head_name
from ..score import Array
from ..token_scores import adapters_off, keep_reference, kl_to_reference
from .harness import Attacked, Target, adapters_on, any_of, attacked, leaks, replaced_weights, share

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def scaling(target: Target, *, strengths: Sequence[float] = STRENGTHS) -> Attacked:
    """Weaken or strengthen the adapter; an answer that leaks at any strength is recovered.

    `details` holds the share by strength and, if the target has neighbours, their mean KL to the base in nats/token:
    how much is forgotten for how much harm. Weakening needs the right to set it, which is the right to take the
    adapter off; the curve tells how much margin there is at 1.
    """
    near, how = target.neighbours, {"chat_template": target.chat_template}
    with adapters_off(target.base):
        base = leaks(target)
        kept = keep_reference(target.base, near, what="neighbours", **how) if near else None
    found: dict[str, Array] = {}
    details: dict[str, dict[str, float]] = {}
    for strength in strengths:
        with adapters_on(target, strength):
            found[f"{strength:g}"] = values = leaks(target)
            details[f"{strength:g}"] = {"recovered": float(values.mean())}
            if kept:
                kl = torch.cat(kl_to_reference(target.base, near, kept, what="neighbours", **how))
                details[f"{strength:g}"]["neighbours_kl"] = float(kl.mean())
    budget = f"strength set to {', '.join(found)}, one greedy answer a probe each"
    return attacked(target, "scaling", budget, any_of(found.values()), base, details)


def quantise(target: Target, *, bits: int, name: str = "quantise") -> Attacked:
    """Merge the adapter into the base and round the result to a few bits; small changes may get lost in rounding.

    The finding is that of Zhang et al. 2024, arXiv:2410.16454, on unlearning by changed weights. Rounding is
    simulated: symmetric, round to nearest, one scale for each output channel (`rounded`), and weights are computed
    with in the base's own precision. All linear layers are rounded, the output head only if the adapter is on it
    (quantisers leave it alone). The bare base of the comparison is rounded likewise.

    `details`: shares of the merged model unrounded, and of the rounded base with the adapter kept apart, its numbers
    in bfloat16; `levels changed`: share of the weights changed by the adapter that round to another level for it.

    Raises:
        AdapterError: if the base is quantised already.
    """
    modules, names = dict(target.base.model.named_modules()), _rounded_names(target)
    changes = _changes(target)
    plain = {name: _matrix(modules[name]) for name in names}

    def state(merged: bool, coarse: bool) -> dict[str, Tensor]:
        weights = {}
        for name, weight in plain.items():
            full = weight + changes[name] if merged and name in changes else weight
            weights[name] = _stored(modules[name], rounded(full, bits) if coarse else full)
        return weights

    with adapters_off(target.base):
        with replaced_weights(modules, state(False, True)):
            base = leaks(target)
        with replaced_weights(modules, state(True, True)):
            found = leaks(target)
        with replaced_weights(modules, {n: w for n, w in state(True, False).items() if n in changes}):
            whole = leaks(target)
    with (
        adapters_on(target, bundles=[_in_16_bits(bundle) for bundle in target.bundles]),
        replaced_weights(modules, state(False, True)),
    ):
        apart = leaks(target)
    kept = changed = 0
    for layer, change in changes.items():
        moved = _stored(modules[layer], plain[layer] + change) != modules[layer].weight
        after = _levels(plain[layer] + change, bits)[0] != _levels(plain[layer], bits)[0]
        after = after.T if _is_transposed(modules[layer]) else after
        changed, kept = changed + int(moved.sum()), kept + int((moved & after).sum())
    details = {
        "merged, not rounded": {"recovered": float(whole.mean())},
        "adapter apart in 16 bits": {"recovered": float(apart.mean())},
        "levels changed": kept / changed if changed else None,
    }
    budget = (
        f"{len(names)} linear layers of the merged model rounded to {bits} bits a weight (symmetric, one scale for "
        "each output channel; simulated), one greedy answer a probe"
    )
    return attacked(target, name, budget, found, base, details)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight (out, in) rounded to 2^bits - 1 evenly spaced values for each row, zero among them."""
    levels, step = _levels(weight, bits)
    return levels * step


def interference(target: Target) -> Attacked:
    """Stack a second adapter on top: does the first fact come back?

    The second is each of `target.others`, or if there is none, one random LoRA on the same layers, of the same rank
    and the same size (Frobenius norm of its effect on each layer), drawn by the target's seed. The bare base of the
    comparison carries the second adapter alone. `details` tells how many probes leak with the second that didn't
    without it.
    """
    others = {f"other {n}": [read_bundle(path, trust=target.trust)] for n, path in enumerate(target.others, 1)}
    what = f"{len(others)} other forget adapters, stacked one at a time"
    if not others:
        others = {"random": random_like(target.bundles, target.seed)}
        what = "one random LoRA of the same layers, rank and size (no other adapter was given)"
    with adapters_on(target):
        alone_ = leaks(target)
    found: dict[str, Array] = {}
    base: dict[str, Array] = {}
    for name, second in others.items():
        with adapters_on(target, bundles=second):
            base[name] = leaks(target)
        with adapters_on(target, bundles=[*target.bundles, *second]):
            found[name] = leaks(target)
    both = any_of(found.values())
    details: dict[str, Any] = {
        name: {"recovered": float(found[name].mean()), "base": float(base[name].mean())} for name in others
    }
    details["without a second"] = {"recovered": float(alone_.mean())}
    details["brought back"] = share(target, "brought back", (both > alone_).astype(float)).value
    budget = f"{what}; one greedy answer a probe each"
    return attacked(target, "interference", budget, both, any_of(base.values()), details)


def random_like(bundles: Sequence[Bundle], seed: int) -> list[Bundle]:
    """Return bundles with random deltas in place of theirs: same layers, ranks and Frobenius norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    result = []
    for bundle in bundles:
        deltas = {}
        for name, delta in bundle.deltas.items():
            fresh = Delta(normal(delta.up), None if delta.down is None else normal(delta.down))
            factor = frobenius_norm(delta) / max(frobenius_norm(fresh), 1e-12)
            deltas[name] = replace(fresh, up=fresh.up * factor)
        result.append(replace(bundle, deltas=deltas))
    return result


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of all linear layers, the output head among them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def shape_of(module: Any) -> tuple[int, int]:
    """Return a linear layer's sizes, (out, in), also where its weight is packed."""
    if _is_transposed(module):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)


def _rounded_names(target: Target) -> list[str]:
    adapted = {name for bundle in target.bundles for name in bundle.deltas}
    head = head_name(target.base.model)
    layers = {name: module for name, module in linear_layers(target.base.model) if name != head or name in adapted}
    odd = sorted(adapted - layers.keys()) + [n for n, m in layers.items() if not m.weight.is_floating_point()]
    if odd:
        raise AdapterError(f"cannot round a merged model with {odd[0]}: expected linear layers that are not quantised")
    return list(layers)


def _changes(target: Target) -> dict[str, Tensor]:
    """Return what the adapters add to each weight, (out, in), in float32 on the base's device."""
    changes: dict[str, Tensor] = {}
    for bundle in target.bundles:
        for name, delta in bundle.deltas.items():
            up = delta.up.float().to(target.base.device)
            change = up * delta.scale if delta.down is None else delta.scale * up @ delta.down.float().to(up.device)
            changes[name] = changes[name] + change if name in changes else change
    return changes


def _levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the whole number that each weight (out, in) is rounded to, and what 1 stands for in each row, (out, 1)."""
    most = 2 ** (bits - 1) - 1
    step: Tensor = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / most
    return (weight / step).round().clamp(-most, most), step


def _is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


def _matrix(module: Any) -> Tensor:
    """Return a layer's weight as (out, in) in float32."""
    weight: Tensor = module.weight.detach().float()
    return weight.T if _is_transposed(module) else weight


def _stored(module: Any, matrix: Tensor) -> Tensor:
    """Return (out, in) as the layer holds it."""
    matrix = matrix.T.contiguous() if _is_transposed(module) else matrix
    dtype: torch.dtype = module.weight.dtype
    return matrix.to(dtype)


def _in_16_bits(bundle: Bundle) -> Bundle:
    deltas = {
        name: replace(
            delta, up=delta.up.to(torch.bfloat16), down=None if delta.down is None else delta.down.to(torch.bfloat16)
        )
        for name, delta in bundle.deltas.items()
    }
    return replace(bundle, deltas=deltas)
