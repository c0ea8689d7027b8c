"""Cross-entropy, KL and a low-rank sum on logits, most with hand-written gradients.

These make fewer passes over (n, V) tensors than autograd would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Tensor, down: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(down, up)
        return torch.addmm(known, down, up.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        down, up = ctx.saved_tensors
        # both factors' gradients with the long side last: several times faster than `grad.t() @ down`, `grad @ up`
        return None, grad @ up.t().contiguous().t(), (down.t() @ grad).t()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        p = torch.softmax(logits, dim=-1)
        ctx.save_for_backward(p, labels)
        return (_log_sum_exp(logits, p) - logits.gather(-1, labels[:, None]))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors
        return (p * grad[:, None]).scatter_add_(-1, labels[:, None], -grad[:, None]), None


class _ReverseKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        p = torch.softmax(logits, dim=-1)
        # computed the same way for both, so that rounding cancels where they are alike
        shift = _log_sum_exp(logits, p) - _log_sum_exp(reference, torch.softmax(reference, dim=-1))
        weighted = (logits - reference).mul_(p)
        kl = weighted.sum(dim=-1, keepdim=True) - shift
        ctx.save_for_backward(p, weighted, kl + shift)
        return kl[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, weighted, mean = ctx.saved_tensors
        return torch.addcmul(weighted, p, mean, value=-1).mul_(grad[:, None]), None


def _log_sum_exp(logits: Tensor, p: Tensor) -> Tensor:
    """Return log sum exp of each row, (n, 1), from its softmax `p`: cheaper than to sum the exponentials again."""
    largest, place = logits.max(dim=-1, keepdim=True)
    return largest - p.gather(-1, place).log()


def add_low_rank(known: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return `known + down @ up.T`, (n, V), for down (n, r) and up (V, r); `known` gets no gradient."""
    return _AddLowRank.apply(known, down, up)  # type: ignore[no-any-return, no-untyped-call]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of each row, (n,), nats.

    Keeps one (n, V) tensor beside the logits for the gradient; PyTorch's own makes another one in the backward pass.
    """
    return _CrossEntropy.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]


def log_odds_against(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log((1 - p) / p) of each label, (n,), nats, where p is its probability.

    About the cross-entropy where p is small; but where p is near 1, the gradient does not vanish.
    """
    label = labels[:, None]
    others = logits.scatter(-1, label, -torch.inf).logsumexp(dim=-1)
    return others - logits.gather(-1, label)[:, 0]


def kl_of_logits(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(softmax(p_logits) || softmax(q_logits)) of each row, (n,), nats, in float32; both get gradients."""
    p, q = (torch.log_softmax(logits.float(), dim=-1) for logits in (p_logits, q_logits))
    return (p.exp() * (p - q)).sum(dim=-1)


def reverse_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(softmax(logits) || softmax(reference)) of each row, (n,), nats; `reference` gets no gradient.

    As `kl_of_logits`, written as sum p (l - r) - (lse(l) - lse(r)) with the gradient p (l - r - sum p (l - r)), where
    lse is log sum exp.
    """
    return _ReverseKl.apply(logits, reference)  # type: ignore[no-any-return, no-untyped-call]
