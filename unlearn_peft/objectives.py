"""Objectives: pure functions on tensors, from per-token quantities to per-token terms. Never a model.

An objective gets the target tokens of a forget batch and of a retain batch and says, for each token, what is to
be *minimised*. The training loop takes the mean over the tokens of each side (over all processes and all parts
of an accumulated step) and adds them: `total = mean(forget) + retain_weight * mean(retain)`.

To add one: a function of the shape of `ga_kl` and a line in `OBJECTIVES`, or `module:function` in a recipe.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import RecipeError


@dataclass(frozen=True)
class Tokens:
    """The target tokens of one batch, packed: prompts and padding are already gone.

    `reference_logits` come from the same model with its adapter off.
    """

    logits: Tensor  # (N, V), current
    labels: Tensor  # (N,), the token that really follows
    rows: Tensor  # (N,), the row of the batch that the token is in
    reference_logits: Tensor | None = None  # (N, V)
    specific: Tensor | None = None  # (N,), bool: the tokens that carry the fact; None: all of them

    @property
    def cross_entropy(self) -> Tensor:
        """-log p_current(label), (N,), nats."""
        return torch.nn.functional.cross_entropy(self.logits.float(), self.labels, reduction="none")

    @property
    def reference_cross_entropy(self) -> Tensor:
        """-log p_reference(label), (N,), nats."""
        return torch.nn.functional.cross_entropy(_needed(self).float(), self.labels, reduction="none")


@dataclass(frozen=True)
class Terms:
    """What an objective wants minimised, per target token, in nats: `forget` (N_f,) and `retain` (N_r,)."""

    forget: Tensor
    retain: Tensor


Objective = Callable[[Tokens, Tokens, Any], Terms]


def ga_kl(forget: Tokens, retain: Tokens, settings: Any) -> Terms:
    """Gradient ascent on the forget set, KL to the frozen base on the retain set.

    The plain form (`forget_ceiling: null`) is `-CE`, which has no lower bound: it ends in word salad (the
    "catastrophic collapse" of Zhang et al. 2024, arXiv:2404.05868). With a ceiling c a token's term is
    `-min(CE, c)`, so that tokens beyond it push no further; with `hold` it is `|CE - c|` (up to a constant the
    same below c), so that a token that momentum carries beyond the ceiling is pulled back. A token that the base
    itself gives a loss above c is held at the base's loss: hold never teaches what is to be forgotten.

    With `forget_tokens: specific`, ascent is for the tokens that carry the fact; the other tokens of the forget set
    are held to the reference like those of the retain set, so that answers stay English.

    Args:
        forget: target tokens of the forget batch, with reference logits.
        retain: target tokens of the retain batch, likewise.
        settings: `forget_tokens`, `forget_ceiling` (nats or None), `hold`, `kl` (`reverse` or `forward`).
    """
    loss = forget.cross_entropy
    if settings.forget_ceiling is None:
        ascent = -loss
    elif settings.hold:
        level = forget.reference_cross_entropy.clamp(min=settings.forget_ceiling)
        ascent = (loss - level).abs() - level
    else:
        ascent = -loss.clamp(max=settings.forget_ceiling)
    if settings.forget_tokens == "specific" and forget.specific is not None:
        ascent = torch.where(forget.specific, ascent, kl_divergence(forget, settings.kl))
    return Terms(ascent, kl_divergence(retain, settings.kl))


def kl_divergence(tokens: Tokens, direction: str = "reverse") -> Tensor:
    """KL between the current and the reference distribution of each token, (N,), nats.

    `reverse` is KL(current || reference), `forward` is KL(reference || current). Computed in float32.
    """
    current = torch.log_softmax(tokens.logits.float(), dim=-1)
    reference = torch.log_softmax(_needed(tokens).float(), dim=-1)
    p, q = (current, reference) if direction == "reverse" else (reference, current)
    return (p.exp() * (p - q)).sum(dim=-1)


def _needed(tokens: Tokens) -> Tensor:
    if tokens.reference_logits is None:
        raise ValueError("this objective needs reference logits, and got none")
    return tokens.reference_logits


OBJECTIVES: dict[str, Objective] = {"ga_kl": ga_kl}


def find_objective(name: str) -> Objective:
    """Return the objective of that name, or the function that `module:function` or `file.py:function` leads to.

    Raises:
        RecipeError: if there is none.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    place, _, function = name.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, function)
    except (ImportError, AttributeError, OSError) as error:
        raise RecipeError(
            f"cannot load the objective '{name}' ({type(error).__name__}: {error}): expected one of "
            f"{', '.join(OBJECTIVES)}, or 'module:function' or 'file.py:function'"
        ) from error
    if not callable(found):
        raise RecipeError(f"the objective '{name}' is {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
