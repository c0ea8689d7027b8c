"""Bases of 8 or 4 bits a weight, made while they are loaded: the name of a way -> what transformers loads with.

Only linear layers are quantised; embeddings, norms and the output head stay as they are, and adapters are trained and
kept in their own precision. torchao's 4 bits are not among the ways: PEFT puts no LoRA on them. The libraries come with
`pip install 'unlearn-peft[quantized]'`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import BaseModelError

WAYS = {  # -> library
    "int8": "torchao",  # 8 bits a weight, one scale for each output channel
    "llm_int8": "bitsandbytes",  # 8 bits a weight and activation, large activations apart (arXiv:2208.07339)
    "nf4": "bitsandbytes",  # 4 bits, values as a normal distribution has them (arXiv:2305.14314)
}


def quantization(way: str, dtype: torch.dtype) -> Any:
    """Return transformers' quantization config.

    Args:
        way: one of `WAYS`.
        dtype: what layers compute in.

    Raises:
        BaseModelError: if there is no such way, or its library is not installed.
    """
    if way not in WAYS:
        raise BaseModelError(f"unknown way to quantise '{way}': expected {', '.join(WAYS)}")
    if importlib.util.find_spec(WAYS[way]) is None:
        raise BaseModelError(
            f"quantize: {way} needs {WAYS[way]}, which is not installed: pip install 'unlearn-peft[quantized]'"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if way == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if way == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def let_gradients_pass(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for CPUs.

    It would do that when a layer first runs, in place and not to the same values, and no gradient would pass any more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
