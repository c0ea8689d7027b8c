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


def with_delta(head: Any, adapter: str, x: Tensor, bare: Tensor) -> Tensor:
    """Return what a PEFT layer gives for x (n, d) with an adapter, (n, V), from the bare head's output for it."""
    if hasattr(head, "dense_head_delta"):
        return head.added(x, bare, [adapter])  # type: ignore[no-any-return]
    down, up = head.lora_A[adapter].weight, head.lora_B[adapter].weight
    thin = nn.functional.linear(x.to(down.dtype), down) * head.scaling[adapter]
    if bare.dtype != up.dtype:
        return bare + nn.functional.linear(thin, up).to(bare.dtype)
    return add_low_rank(bare, thin, up)
