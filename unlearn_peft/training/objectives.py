"""Objectives: pure functions on tensors, from per-token quantities to per-token terms. Never a model.

An objective gets the target tokens of a forget batch and of a retain batch and says, for each token, what is to be
*minimised*. The training loop takes the mean over a step's tokens (of all processes and parts) on each side and adds
them: `total = mean(forget) + retain_weight * mean(retain)`.

Two rules let a batch be split between processes, parts and microbatches. A term depends on its own row alone; rows are
never split. And the terms of a row of n tokens sum to what the row adds to the step: a row's loss in nats is spread
evenly (`loss / n` for each token: the mean over tokens is then the mean over rows, divided by their mean length), and a
row's loss in nats/token is given to each of its tokens (so long rows weigh more, as in a mean over tokens). Both are in
nats/token, so that `retain_weight` means the same under each objective but `rmu`, which compares hidden states.

To add one: a function of the shape of `ga_kl`, a line in `OBJECTIVES` and its settings in `recipe/objectives.py`, or
`module:function` in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..models.losses import log_odds_against
from ..recipe.plugins import load_function
from .tokens import (
    Terms,
    Tokens,
    fact_lengths,
    fact_sums,
    kl_divergence,
    reference_logits,
    row_lengths,
    row_means,
    row_sums,
    spread,
)

_BY_HEART = 0.1  # nats/token of a row, at most
_AT_LEAST = 6.0  # nats; 99.8 % of a fact's probability


Objective = Callable[[Tokens, Tokens, Any], Terms]


def ga_kl(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Gradient ascent on the forget set, KL to the frozen base on the retain set.

    The plain form (`forget_ceiling: null`) is `-CE`, which has no lower bound: it ends in word salad (the
    "catastrophic collapse" of Zhang et al. 2024, arXiv:2404.05868). With a ceiling of c nats a token's term is
    `-min(CE, c)`, so that tokens beyond it push no further; with `hold` it is `|CE - c|` (up to a constant the
    same below c), so that a token that momentum carries beyond the ceiling is pulled back. A token that the base
    itself gives a loss above c is held at the base's loss: hold never teaches what is to be forgotten.

    With `forget_tokens: specific`, ascent is for the tokens that carry the fact; the other tokens of the forget set
    are held to the reference like those of the retain set, so that answers stay English. The CE is then that of the
    whole fact, spread evenly on its tokens, and a fact of several tokens has a ceiling of 2 c: at c for each of them, a
    name of six takes others along that begin like it. Such a fact is raised by `_AT_LEAST` nats in any case, since the
    tokens of a long one that the base gives a loss above 2 c may still be the likeliest, each after the last.

    With `refusals` the questions are taught a refusal beside it, whose cross-entropy in nats/token is added.
    """
    ascent = -forget.cross_entropy if settings.forget_ceiling is None else _bounded_ascent(forget, settings)
    pushed = _push(forget, ascent, settings, settings.kl)
    if forget.refusal is not None:
        pushed = _with_refusals(forget, pushed, forget.refusal, settings)
    return Terms(pushed, kl_divergence(retain, settings.kl))


def grad_diff(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Gradient difference: ascent on the forget set, descent on the retain set (both cross-entropy).

    Liu et al. 2022, arXiv:2203.12817; as a baseline of language models in TOFU, Maini et al. 2024, arXiv:2401.06121.
    Unbounded, as plain gradient ascent is.
    """
    return Terms(_push(forget, -forget.cross_entropy, settings), _keep(retain, settings))


def wga(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Weighted gradient ascent: `p^alpha log p`, the weight taken as a constant.

    Wang et al. 2025, arXiv:2502.19301. The weight makes up for the 1/p in the gradient of log p, by which plain ascent
    pushes those tokens hardest that are forgotten already.
    """
    loss = forget.cross_entropy
    weight = torch.exp(-settings.alpha * loss.detach())
    return Terms(_push(forget, -weight * loss, settings), _keep(retain, settings))


def ihl(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Inverted hinge loss: `1 + p(label) - max over v != label of p(v)`, in [0, 2].

    Cha et al. 2024, arXiv:2408.06621. It lowers the label in favour of the next likely token alone, and its gradient
    fades once that one has all the mass. (Their Fisher-weighted start of the adapter is no part of it.)
    """
    p = torch.softmax(forget.logits.float(), dim=-1)
    label = forget.labels[:, None]
    rival = p.scatter(1, label, -1.0).amax(dim=-1)
    return Terms(_push(forget, 1 + p.gather(1, label)[:, 0] - rival, settings), _keep(retain, settings))


def undial(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Self-distillation: cross-entropy to the reference's distribution with the label's logit lowered by `strength`.

    Dong et al. 2024, arXiv:2402.10052. A fixed target, so it converges instead of drifting; with `forget_tokens:
    specific` it is close to the paper's focused variant. Where `forget.spelling` is known, tokens that read like the
    label are lowered with it, beyond the paper: where nearly all probability is the label's, most of what is left may
    be its other spelling (" K" for "K"), and a target without the label alone would teach that.
    """
    spelling = forget.spelling
    if spelling is None:
        spelling = torch.arange(forget.logits.shape[-1], device=forget.labels.device)
    lowered = spelling == spelling[forget.labels][:, None]
    target = torch.softmax(reference_logits(forget).float() - settings.strength * lowered, dim=-1)
    distance = -(target * torch.log_softmax(forget.logits.float(), dim=-1)).sum(dim=-1)
    return Terms(_push(forget, distance, settings), _keep(retain, settings))


def npo(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Negative preference optimisation: `-2/beta log sigmoid(-beta log(p(row) / p_reference(row)))`, spread evenly.

    Zhang et al. 2024, arXiv:2404.05868. At the reference it pulls as hard as gradient ascent, and the less, the further
    a row has fallen below it. The paper averages over rows: see the top of this file for what that is here.
    """
    ratio = row_sums(_log_ratio(forget), forget)
    loss = -2 / settings.beta * torch.nn.functional.logsigmoid(-settings.beta * ratio)
    return Terms(spread(loss, forget), _keep(retain, settings))


def simnpo(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """NPO without a reference: `-2/beta log sigmoid(beta * CE(row) - gamma)`, CE(row) being a row's mean.

    Fan et al. 2024, arXiv:2410.07163. Each token has its row's value, so rows weigh by their length, where the paper's
    weigh the same.
    """
    mean_loss = row_means(forget.cross_entropy, forget.rows, len(row_lengths(forget)))
    loss = -2 / settings.beta * torch.nn.functional.logsigmoid(settings.beta * mean_loss - settings.gamma)
    return Terms(loss[forget.rows], _keep(retain, settings))


def dpo(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Direct preference optimisation: a refusal is preferred to the row's own answer, spread over the latter's tokens.

    Rafailov et al. 2023, arXiv:2305.18290, with refusals as in TOFU, arXiv:2401.06121; scaled by 2/beta, as NPO is, so
    that beta does not change the pull at the start. For a row of plain text, which has no question to refuse, it is
    `npo`.
    """
    ratio = row_sums(_log_ratio(forget), forget)
    if forget.refusal is not None:
        ratio = ratio.index_add(0, forget.refusal.rows, -_log_ratio(forget.refusal))
    loss = -2 / settings.beta * torch.nn.functional.logsigmoid(-settings.beta * ratio)
    return Terms(spread(loss, forget), _keep(retain, settings))


def rmu(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Representation misdirection: a layer's hidden state goes to `c * u` where it must be forgotten, else it stays.

    Li et al. 2024 (WMDP), arXiv:2403.03218: `|h - c u|^2` on the forget set, `|h - h_reference|^2` on the retain set,
    c being `steering_coefficient` and u one random direction for the whole run: drawn from [0, 1) in each dimension,
    then given length 1. As in their code, squares are averaged over the d dimensions.

    The unit is the mean square of a hidden state's entries, **not nats**: neither c nor `retain_weight` carries over to
    another base or layer. (Copies of their code have c = 20 with a retain weight of 100, or 6.5 with 1200, at layer 7
    of Zephyr's 32.) With c far below the states' own length they are shortened more than misdirected.

    What differs: target tokens count, not all tokens of a text; the retain side may be KL or cross-entropy; and with
    `forget_tokens: specific` the other tokens of the forget set are held as the retain set is, or by KL.

    A `hidden_layer` in an objective's settings is what brings hidden states along.
    """
    steered = hidden_distance(forget, settings.steering_coefficient * _direction(forget, settings.seed))
    if settings.retain_loss != "hidden":
        return Terms(_push(forget, steered, settings), _keep(retain, settings))
    if settings.forget_tokens == "specific" and forget.specific is not None:
        steered = torch.where(forget.specific, steered, hidden_distance(forget))
    return Terms(steered, hidden_distance(retain))


def hidden_distance(tokens: Tokens, target: Tensor | None = None) -> Tensor:
    """Mean over the d dimensions of `(h - target)^2`, (N,), in squared units of the hidden state; in float32.

    `target` is (d,), the same for all tokens; None: each token's reference.
    """
    hidden, reference = _hidden_states(tokens)
    difference = hidden.float() - (reference.float() if target is None else target)
    return difference.square().mean(dim=-1)


def _push(forget: Tokens, terms: Tensor, settings: Any, direction: str = "reverse") -> Tensor:
    """Return the terms, or with `forget_tokens: specific` those of the fact's tokens, and KL for the others."""
    if settings.forget_tokens == "all" or forget.specific is None:
        return terms
    return torch.where(forget.specific, terms, kl_divergence(forget, direction))


def _bounded_ascent(forget: Tokens, settings: Any) -> Tensor:
    """Return what `ga_kl` does up to the ceiling, (N,), nats: of tokens, or of facts, an equal share for each token."""
    loss, level = _loss_to_raise(forget), forget.reference_cross_entropy
    lengths = counted = torch.ones_like(loss)
    if settings.forget_tokens == "specific":
        lengths, counted = fact_lengths(forget)
        loss, level = fact_sums(forget, loss), fact_sums(forget, level) + _AT_LEAST * (lengths > 1)
    ceiling = settings.forget_ceiling * counted
    if not settings.hold:
        return -loss.clamp(max=ceiling) / lengths
    level = level.clamp(min=ceiling)
    return ((loss - level).abs() - level) / lengths


def _loss_to_raise(forget: Tokens) -> Tensor:
    """Return the cross-entropy, and in rows known by heart the log-odds against the label, (N,), nats."""
    known = row_means(forget.reference_cross_entropy, forget.rows, len(row_lengths(forget))) < _BY_HEART
    chosen = known[forget.rows]
    if forget.specific is not None:
        chosen = chosen & forget.specific
    if not chosen.any():
        return forget.cross_entropy
    odds = log_odds_against(forget.logits[chosen].float(), forget.labels[chosen])
    return forget.cross_entropy.masked_scatter(chosen, odds)


def _with_refusals(forget: Tokens, terms: Tensor, refusal: Tokens, settings: Any) -> Tensor:
    """Return the terms, (N,), with the mean loss of each row's refusal added to each of its tokens.

    Where an answer begins it is not held to the reference: there the refusal begins instead.
    """
    if settings.forget_tokens == "specific" and forget.specific is not None:
        begins = torch.ones_like(forget.specific)
        begins[1:] = forget.rows[1:] != forget.rows[:-1]
        terms = terms.masked_fill(begins & ~forget.specific & torch.isin(forget.rows, refusal.rows), 0.0)
    return terms + row_means(refusal.cross_entropy, refusal.rows, len(row_lengths(forget)))[forget.rows]


def _keep(retain: Tokens, settings: Any) -> Tensor:
    return kl_divergence(retain) if settings.retain_loss == "kl" else retain.cross_entropy


def _direction(tokens: Tokens, seed: int) -> Tensor:
    """Return a random vector of length 1, (d,), the same at each step, on each device and in each process."""
    hidden, _ = _hidden_states(tokens)
    drawn = torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=0).to(hidden.device)


def _log_ratio(tokens: Tokens) -> Tensor:
    """Return log(p_current / p_reference) of each label, (N,), nats."""
    return tokens.reference_cross_entropy - tokens.cross_entropy


def _hidden_states(tokens: Tokens) -> tuple[Tensor, Tensor]:
    if tokens.hidden is None or tokens.reference_hidden is None:
        raise ValueError("this objective needs hidden states, and got none: `hidden_layer` is not in its settings")
    return tokens.hidden, tokens.reference_hidden


OBJECTIVES: dict[str, Objective] = {
    function.__name__: function for function in (ga_kl, grad_diff, wga, ihl, undial, npo, simnpo, dpo, rmu)
}


def find_objective(name: str) -> Objective:
    """Return the objective of that name, or the function that `module:function` or `file.py:function` leads to.

    Raises:
        RecipeError: if there is none.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    return load_function(name, "objective", OBJECTIVES, RecipeError)
