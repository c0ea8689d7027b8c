"""A delta on the output head alone, in two thin products."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...models.losses import add_low_rank


def knows_delta(head: Any) -> bool:
    """Return whether `with_delta` can stand in for a PEFT layer's own forward pass."""
    if hasattr(head, "dense_head_delta"):
        return True
    plain = all(isinstance(dropout, nn.Identity) for dropout in getattr(head, "lora_dropout", {}).values())
    return hasattr(head, "lora_A") and plain and not head.lora_variant


def with_delta(head: Any, adapter: str, x: Tensor, known: Tensor) -> Tensor:
    """Return what a head with an adapter gives, (n, V), from what the bare head gives.

    Args:
        head: the PEFT layer.
        adapter: its name.
        x: the head's input, (n, d).
        known: the bare head's output for it, (n, V).
    """
    if hasattr(head, "dense_head_delta"):
        return head.added(x, known, [adapter])  # type: ignore[no-any-return]
    down, up = head.lora_A[adapter].weight, head.lora_B[adapter].weight
    thin = nn.functional.linear(x.to(down.dtype), down) * head.scaling[adapter]
    if known.dtype != up.dtype:
        return known + nn.functional.linear(thin, up).to(known.dtype)
    return add_low_rank(known, thin, up)
