"""A delta on `lm_head` alone: low-rank (an ordinary PEFT LoRA) or dense (see dense.py).

Where `lm_head` is tied to the input embeddings, the delta sits beside the shared weight and is added to the
head's output only: the embeddings never see it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..base import head_name
from ..functions import add_low_rank
from ..recipe import HeadSettings


def head_config(model: nn.Module, settings: HeadSettings) -> Any:
    """Return the PEFT config of a low-rank or dense delta on the model's output head."""
    if settings.form == "dense":
        from .dense import DenseHeadConfig

        return DenseHeadConfig(task_type="CAUSAL_LM", target_modules=[head_name(model)])
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.lora_alpha, target_modules=[head_name(model)]
    )


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
