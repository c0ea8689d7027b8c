"""A delta on `lm_head` alone: low-rank (an ordinary PEFT LoRA) or dense (see dense.py).

Where `lm_head` is tied to the input embeddings, the delta sits beside the shared weight and is added to the
head's output only: the embeddings never see it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..base import head_name
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
