"""What makes two bases the same: architecture, tokenizer, weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES_PER_TENSOR = 64


def fingerprint(model: Any, tokenizer: Any | None = None) -> dict[str, str | None]:
    """Return digests of a base's architecture, tokenizer and weights.

    The weights' digest reads 64 evenly spaced values of each tensor, rounded to bfloat16: it takes milliseconds, and is
    the same for a base loaded in float32 or bfloat16. It is None, not to be compared, where the weights are held in
    another way (float16, quantized) or not at all.
    """
    config = model.config
    shape = {
        key: _field(config, key)
        for key in (
            "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size",
        )
    }  # fmt: skip
    vocabulary = None if tokenizer is None else sorted(tokenizer.get_vocab().items(), key=lambda item: item[::-1])
    return {
        "config": _digest(shape),
        "tokenizer": None if vocabulary is None else _digest(vocabulary),
        "weights": _weights_digest(model),
    }


def mismatches(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts in which two fingerprints differ; parts unknown on one side are skipped."""
    parts = ("config", "tokenizer", "weights")
    return [part for part in parts if expected.get(part) and found.get(part) and expected[part] != found[part]]


def _field(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # Gemma 4's layers have several: its config raises an error of its own
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _weights_digest(model: nn.Module) -> str | None:
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model)):
        plain = type(parameter) in (nn.Parameter, Tensor)  # no tensor subclass that holds fewer bits
        if not plain or parameter.is_meta or parameter.dtype not in (torch.float32, torch.bfloat16):
            return None
        flat = parameter.detach().reshape(-1)
        count = min(flat.numel(), _SAMPLES_PER_TENSOR)
        picks = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        values = flat[picks].to(torch.bfloat16).to(torch.float32).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the base's own parameters, under the names that they have without PEFT's wrappers."""
    return [
        (name.removeprefix("base_model.model.").replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and ".dense_head_" not in name
    ]
