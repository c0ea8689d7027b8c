"""Attacks on the weights without training: adapter strength, merging and quantisation, a second adapter.

Nothing is written into the base: weights are replaced inside a `with` block and put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapters.bundle import Bundle, Delta
from ...adapters.transform.low_rank import frobenius_norm
from ...errors import AdapterError
from ...models.layers import head_name, is_transposed, linear_layers
from ..score import Array
from ..token_scores import adapters_off, keep_reference, kl_to_reference
from .harness import Attacked, Target, adapters_on, any_of, attacked, averages, leaks, replaced_weights

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def scaling(target: Target, *, strengths: Sequence[float] = STRENGTHS) -> Attacked:
    """Weaken or strengthen the adapter; an answer that leaks at any strength is recovered.

    `details`: the share by strength and, if the target has neighbours, their mean KL to the base in nats/token: how
    much is forgotten for how much harm. Who may set the strength may take the adapter off as well; the curve shows how
    much margin there is at 1.
    """
    neighbours = target.neighbours
    options: dict[str, Any] = {"what": "neighbours", "chat_template": target.chat_template}
    with adapters_off(target.base):
        base = leaks(target)
        reference = keep_reference(target.base, neighbours, **options) if neighbours else None
    recovered: dict[str, Array] = {}
    details: dict[str, dict[str, float]] = {}
    for strength in strengths:
        with adapters_on(target, strength):
            recovered[f"{strength:g}"] = values = leaks(target)
            details[f"{strength:g}"] = {"recovered": float(values.mean())}
            if reference:
                kl = torch.cat(kl_to_reference(target.base, neighbours, reference, **options))
                details[f"{strength:g}"]["neighbours_kl"] = float(kl.mean())
    budget = f"strength set to {', '.join(recovered)}, one greedy answer a probe each"
    return attacked(target, "scaling", budget, any_of(recovered.values()), base, details)


def quantise(target: Target, *, bits: int, name: str = "quantise") -> Attacked:
    """Merge the adapter into the base and quantise the result; small changes may get lost in rounding.

    As found by Zhang et al. 2024, arXiv:2410.16454, for unlearning by changed weights. Quantisation is simulated
    (`rounded`), and weights are computed with in the base's own precision. All linear layers are rounded, the output
    head only if the adapter is on it, as quantisers leave the head alone. The bare base of the comparison is rounded
    likewise.

    `details`: shares of the merged model unrounded, and of the rounded base with the adapter beside it in bfloat16;
    `levels changed`: share of the weights changed by the adapter that round to another level because of it.

    Raises:
        AdapterError: if the base is quantised already.
    """
    modules, names = dict(target.base.model.named_modules()), _names_to_round(target)
    changes = _changes(target)
    plain = {name: _matrix(modules[name]) for name in names}

    def weights(merged: bool, coarse: bool) -> dict[str, Tensor]:
        result = {}
        for name, weight in plain.items():
            full = weight + changes[name] if merged and name in changes else weight
            result[name] = _stored(modules[name], rounded(full, bits) if coarse else full)
        return result

    with adapters_off(target.base):
        with replaced_weights(modules, weights(merged=False, coarse=True)):
            base = leaks(target)
        with replaced_weights(modules, weights(merged=True, coarse=True)):
            recovered = leaks(target)
        unrounded = {name: w for name, w in weights(merged=True, coarse=False).items() if name in changes}
        with replaced_weights(modules, unrounded):
            recovered_unrounded = leaks(target)
    with (
        adapters_on(target, bundles=[_in_16_bits(bundle) for bundle in target.bundles]),
        replaced_weights(modules, weights(merged=False, coarse=True)),
    ):
        recovered_apart = leaks(target)
    survived = changed = 0
    for layer, change in changes.items():
        differs = _stored(modules[layer], plain[layer] + change) != modules[layer].weight
        other_level = _levels(plain[layer] + change, bits)[0] != _levels(plain[layer], bits)[0]
        other_level = other_level.T if is_transposed(modules[layer]) else other_level
        changed, survived = changed + int(differs.sum()), survived + int((differs & other_level).sum())
    details = {
        "merged, not rounded": {"recovered": float(recovered_unrounded.mean())},
        "adapter apart in 16 bits": {"recovered": float(recovered_apart.mean())},
        "levels changed": survived / changed if changed else None,
    }
    budget = (
        f"{len(names)} linear layers of the merged model rounded to {bits} bits a weight (symmetric, one scale for "
        "each output channel; simulated), one greedy answer a probe"
    )
    return attacked(target, name, budget, recovered, base, details)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight (out, in) rounded to the nearest of 2^bits - 1 evenly spaced values, one scale for each row."""
    levels, step = _levels(weight, bits)
    return levels * step


def interference(target: Target) -> Attacked:
    """Stack a second adapter on top: does the first fact come back?

    The second is each of `target.others` in turn. If there is none, it is a random LoRA on the same layers, of the same
    rank and size (Frobenius norm of its effect on each layer), drawn with the target's seed. The bare base of the
    comparison carries the second adapter alone. `details` has the share by second adapter, and the share of probes
    that leak with a second one and not without (`brought back`).
    """
    others = {f"other {n}": [bundle] for n, bundle in enumerate(target.read(target.others), 1)}
    which = f"{len(others)} other forget adapters, stacked one at a time"
    if not others:
        others = {"random": random_like(target.bundles, target.seed)}
        which = "one random LoRA of the same layers, rank and size (no other adapter was given)"
    with adapters_on(target):
        without_second = leaks(target)
    recovered: dict[str, Array] = {}
    base: dict[str, Array] = {}
    for name, second in others.items():
        with adapters_on(target, bundles=second):
            base[name] = leaks(target)
        with adapters_on(target, bundles=[*target.bundles, *second]):
            recovered[name] = leaks(target)
    with_any = any_of(recovered.values())
    details: dict[str, Any] = {name: averages(recovered[name], base[name]) for name in others}
    details["without a second"] = {"recovered": float(without_second.mean())}
    details["brought back"] = float((with_any > without_second).mean())
    budget = f"{which}; one greedy answer a probe each"
    return attacked(target, "interference", budget, with_any, any_of(base.values()), details)


def random_like(bundles: Sequence[Bundle], seed: int) -> list[Bundle]:
    """Return copies of bundles with random deltas: same layers, ranks and Frobenius norms."""
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


def shape_of(module: Any) -> tuple[int, int]:
    """Return a linear layer's sizes, (out, in), also where its weight is packed."""
    if is_transposed(module):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)


def _names_to_round(target: Target) -> list[str]:
    adapted = {name for bundle in target.bundles for name in bundle.deltas}
    head = head_name(target.base.model)
    layers = {n: m for n, m in linear_layers(target.base.model).items() if n != head or n in adapted}
    odd = sorted(adapted - layers.keys()) + [n for n, m in layers.items() if not m.weight.is_floating_point()]
    if odd:
        raise AdapterError(f"cannot round a merged model with {odd[0]}: expected linear layers that are not quantised")
    return list(layers)


def _changes(target: Target) -> dict[str, Tensor]:
    """Return what the adapters add to each weight, (out, in), in float32 on the base's device."""
    changes: dict[str, Tensor] = {}
    for bundle in target.bundles:
        for name, delta in bundle.deltas.items():
            change = delta.matrix().to(target.base.device)
            changes[name] = changes[name] + change if name in changes else change
    return changes


def _levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers that a weight (out, in) is rounded to, and the step between two of them, (out, 1)."""
    largest = 2 ** (bits - 1) - 1
    step: Tensor = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / largest
    return (weight / step).round().clamp(-largest, largest), step


def _matrix(module: Any) -> Tensor:
    """Return a layer's weight, (out, in), in float32."""
    weight: Tensor = module.weight.detach().float()
    return weight.T if is_transposed(module) else weight


def _stored(module: Any, matrix: Tensor) -> Tensor:
    """Return a weight (out, in) in the layout and precision of the layer's own."""
    matrix = matrix.T.contiguous() if is_transposed(module) else matrix
    dtype: torch.dtype = module.weight.dtype
    return matrix.to(dtype)


def _in_16_bits(bundle: Bundle) -> Bundle:
    def half(delta: Delta) -> Delta:
        down = delta.down
        return Delta(delta.up.bfloat16(), None if down is None else down.bfloat16(), delta.scale)

    return replace(bundle, deltas={name: half(delta) for name, delta in bundle.deltas.items()})
