"""Tensors in 8 or 4 bits a value, with a scale for each group of a row: how a quantised adapter is stored.

A matrix comes in, two tensors of a safetensors file go out (`pack`); all tensors of such a file come in, matrices go
out (`unpack`). Factors are packed along their long side, so that a row is one rank: `lora_B` is stored transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..files.untrusted import FLOATS, LARGEST, largest_of

GROUP = 64  # values that share a scale
QUANTIZED = "_QUANTIZED"  # at the end of peft_type: PEFT refuses such a type, instead of passing over the tensors
MAX_BYTES = 1 << 29  # packed; unpacked it is up to eight times as much
_SMALLEST = 6e-5  # the smallest normal number in float16, for scales
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's largest value: rounding the others finer may be better
_TRANSPOSED = "lora_B"


def pack(name: str, matrix: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the tensors that stand for a matrix: `NAME.int8` or `.int4` (two values a byte), and `NAME.scales`.

    Args:
        name: such as `base_model.model.lm_head.lora_A`, without `.weight`.
        matrix: (rows, columns); float.
        bits: 8 or 4. Rows of an odd length take 8.
    """
    rows = (matrix.T if name.endswith(_TRANSPOSED) else matrix).float()
    most = 127 if bits == 8 or rows.shape[1] % 2 else 7
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    best, scales = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for clip in _CLIPS if most == 7 else _CLIPS[:1]:
        tried = (largest * clip / most).clamp(min=_SMALLEST).half().float()
        error = ((groups / tried).round().clamp(-most, most) * tried - groups).square().sum(-1, keepdim=True)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(error, best)
    whole = (groups / scales).round().clamp(-most, most).view(len(rows), -1)[:, : rows.shape[1]].to(torch.int8)
    kept = {f"{name}.scales": scales.squeeze(-1).half().contiguous()}
    if most == 127:
        return {f"{name}.int8": whole.contiguous(), **kept}
    low, high = (whole[:, 0::2] + 8).to(torch.uint8), (whole[:, 1::2] + 8).to(torch.uint8)
    return {f"{name}.int4": (low | high << 4).contiguous(), **kept}


def floats(kind: str, tensors: Mapping[str, Tensor], problems: list[str]) -> Mapping[str, Tensor]:
    """Return what an adapter's tensors stand for: themselves, or what was packed into fewer bits.

    Args:
        kind: the adapter's peft_type.
        tensors: of its weights file.
        problems: gets what is wrong.
    """
    if kind.endswith(QUANTIZED):
        found = unpack(tensors, problems)
        problems += [f"'{key}' unpacks to {most:.3g}" for key, t in found.items() if (most := largest_of(t)) > LARGEST]
        return found
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            dtype = "I8" if tensor.dtype == torch.int8 else "U8"
            problems.append(f"'{key}' has dtype '{dtype}', expected one of {', '.join(FLOATS)}")
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


def unpack(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    """Return matrices in float32 by name, as if they had never been packed; what is wrong goes to `problems`."""
    if (size := sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) > MAX_BYTES:
        problems.append(f"it holds {size:,} bytes of packed weights, expected at most {MAX_BYTES:,}")
        return {}
    found: dict[str, Tensor] = {}
    for key in sorted(tensors):
        name, _, kind = key.rpartition(".")
        if kind == "scales":
            if f"{name}.int8" not in tensors and f"{name}.int4" not in tensors:
                problems.append(f"'{key}' has no values beside it")
            continue
        values, scales = tensors[key], tensors.get(f"{name}.scales")
        if (kind, values.dtype) not in (("int8", torch.int8), ("int4", torch.uint8)):
            problems.append(f"tensor '{key}' is no packed weight: expected names in .int8, .int4 (U8) or .scales")
            continue
        columns = values.shape[-1] * (2 if kind == "int4" else 1)
        groups = -(-columns // GROUP)
        if values.dim() != 2 or scales is None or scales.shape != (len(values), groups):
            told = None if scales is None else tuple(scales.shape)
            problems.append(
                f"'{key}' has shape {tuple(values.shape)} and scales {told}, expected one for {GROUP} values"
            )
            continue
        if scales.dtype != torch.float16:
            problems.append(f"'{name}.scales' has another dtype than F16")
            continue
        if f"{name}.weight" in found:
            problems.append(f"'{name}' is packed twice")
        if kind == "int4":
            values = torch.stack([(values & 15).to(torch.int8) - 8, (values >> 4).to(torch.int8) - 8], -1)
        whole = values.view(len(values), columns).float()
        whole *= scales.float().repeat_interleave(GROUP, 1)[:, :columns]
        found[f"{name}.weight"] = whole.T.contiguous() if name.endswith(_TRANSPOSED) else whole
    return found
