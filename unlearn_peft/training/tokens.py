"""The target tokens of a batch, as an objective sees them, and sums and means over rows and facts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..models.losses import cross_entropy, kl_of_logits, reverse_kl


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
    refusal: Tokens | None = None  # the same rows, where they have a question, with a refusal for an answer
    hidden: Tensor | None = None  # (N, d), a decoder layer's output where the token is predicted; if asked for
    reference_hidden: Tensor | None = None  # (N, d), the same with the adapter off
    spelling: Tensor | None = None  # (V,), the same number for tokens that read alike; None: no two do
    facts: Tensor | None = None  # (N,), the number of the fact that the token is a part of, -1: of none

    @cached_property
    def cross_entropy(self) -> Tensor:
        """-log p_current(label), (N,), nats."""
        return cross_entropy(self.logits.float(), self.labels)

    @cached_property
    def reference_cross_entropy(self) -> Tensor:
        """-log p_reference(label), (N,), nats."""
        return cross_entropy(reference_logits(self).float(), self.labels)

    @cached_property
    def reverse_kl(self) -> Tensor:
        """KL(current || reference), (N,), nats."""
        return reverse_kl(self.logits.float(), reference_logits(self).float())

    @cached_property
    def forward_kl(self) -> Tensor:
        """KL(reference || current), (N,), nats."""
        return kl_of_logits(reference_logits(self), self.logits)


@dataclass(frozen=True)
class Terms:
    """What is to be minimised, per target token: `forget` (N_f,) and `retain` (N_r,).

    In nats, except for the forget terms of `ihl`, which are probabilities, and the terms of `rmu`.
    """

    forget: Tensor
    retain: Tensor


def kl_divergence(tokens: Tokens, direction: str = "reverse") -> Tensor:
    """KL between the current and the reference distribution of each token, (N,), nats.

    `reverse` is KL(current || reference), `forward` is KL(reference || current). Computed in float32.
    """
    return tokens.reverse_kl if direction == "reverse" else tokens.forward_kl


def fact_sums(tokens: Tokens, values: Tensor) -> Tensor:
    """Return for each token the sum of `values` (N,) over the tokens of its fact, (N,); without one, its own."""
    if tokens.facts is None:
        return values
    sums = values.new_zeros(len(values) + 1).index_add(0, tokens.facts + 1, values)
    return torch.where(tokens.facts < 0, values, sums[tokens.facts + 1])


def fact_lengths(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return for each token how many its fact has, (N,), and as how many that fact is raised, (N,): two at most."""
    lengths = fact_sums(tokens, torch.ones_like(tokens.cross_entropy))
    return lengths, lengths.clamp(max=2)


def row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of `values` (N,) over the tokens of each of `count` rows, (count,)."""
    sums = torch.zeros(count, device=values.device, dtype=values.dtype).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)


def row_sums(values: Tensor, tokens: Tokens) -> Tensor:
    """Return the sum of `values` (N,) over the tokens of each row, (rows,)."""
    return values.new_zeros(len(row_lengths(tokens))).index_add(0, tokens.rows, values)


def row_lengths(tokens: Tokens) -> Tensor:
    """Return how many tokens each row has, (rows,)."""
    return torch.bincount(tokens.rows)


def spread(losses: Tensor, tokens: Tokens) -> Tensor:
    """Return each row's loss (rows,) in equal parts on its tokens, (N,)."""
    return (losses / row_lengths(tokens).clamp(min=1))[tokens.rows]


def reference_logits(tokens: Tokens) -> Tensor:
    """Return the reference's logits, (N, V); an objective that asks for them always gets them in training."""
    if tokens.reference_logits is None:
        raise ValueError("this objective needs reference logits, and got none")
    return tokens.reference_logits
