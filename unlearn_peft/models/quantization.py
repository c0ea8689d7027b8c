"""Bases quantized to 8 or 4 bits a weight while they are loaded: a method's name -> transformers' config.

Only linear layers are quantized; embeddings, norms, the output head and adapters keep their precision. torchao's 4 bits
are no method here: PEFT puts no LoRA on them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import BaseModelError

METHODS = {  # -> library
    "int8": "torchao",  # 8 bits a weight, one scale for each output channel
    "llm_int8": "bitsandbytes",  # 8 bits a weight and activation, outlier activations apart (arXiv:2208.07339)
    "nf4": "bitsandbytes",  # 4-bit NormalFloat (arXiv:2305.14314)
}


def quantization(method: str, dtype: torch.dtype) -> Any:
    """Return transformers' quantization config for one of `METHODS`; layers compute in `dtype`.

    Raises:
        BaseModelError: if there is no such method, or its library is not installed.
    """
    if method not in METHODS:
        raise BaseModelError(f"unknown quantization method '{method}': expected {', '.join(METHODS)}")
    if importlib.util.find_spec(METHODS[method]) is None:
        raise BaseModelError(
            f"quantize: {method} needs {METHODS[method]}, which is not installed: pip install 'unlearn-peft[quantized]'"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if method == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if method == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def disable_cpu_packing(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for CPUs when a layer first runs.

    That changes the values in place, and stops gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
