"""A quantised adapter's tensors: 8 or 4 bits a value, with one scale for each group of `GROUP` values of a row.

`pack` makes two tensors of a safetensors file from a matrix; `unpack` makes matrices from all tensors of such a file.
Factors are packed along their long side, so that a row is one rank: `lora_B` is stored transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..files.weights import FLOATS, LARGEST, largest_of

GROUP = 64  # values that share a scale
QUANTIZED = "_QUANTIZED"  # suffix of peft_type: PEFT refuses such a type instead of ignoring the tensors
MAX_BYTES = 1 << 29  # packed; unpacked it is up to eight times as much
_SMALLEST = 6e-5  # the smallest normal number in float16, for scales
# of a group's largest value: a smaller step may fit the other values better
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_TRANSPOSED = "lora_B"


def pack(name: str, matrix: Tensor, bits: int) -> dict[str, Tensor]:
    """Return a float matrix (rows, columns) as tensors `NAME.int8` or `NAME.int4` (two values a byte), `NAME.scales`.

    `name` is such as `base_model.model.lm_head.lora_A`, without `.weight`. Rows of odd length always take 8 bits.
    """
    rows = (matrix.T if name.endswith(_TRANSPOSED) else matrix).float()
    levels = 127 if bits == 8 or rows.shape[1] % 2 else 7
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    best, scales = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for clip in _CLIPS if levels == 7 else _CLIPS[:1]:
        step = (largest * clip / levels).clamp(min=_SMALLEST).half().float()
        error = ((groups / step).round().clamp(-levels, levels) * step - groups).square().sum(-1, keepdim=True)
        scales = torch.where(error < best, step, scales)
        best = torch.minimum(error, best)
    values = (groups / scales).round().clamp(-levels, levels).view(len(rows), -1)[:, : rows.shape[1]].to(torch.int8)
    packed = {f"{name}.scales": scales.squeeze(-1).half().contiguous()}
    if levels == 127:
        return {f"{name}.int8": values.contiguous(), **packed}
    low, high = (values[:, 0::2] + 8).to(torch.uint8), (values[:, 1::2] + 8).to(torch.uint8)
    return {f"{name}.int4": (low | high << 4).contiguous(), **packed}


def floats(kind: str, tensors: Mapping[str, Tensor], problems: list[str]) -> Mapping[str, Tensor]:
    """Return the float tensors of a weights file, unpacked if `kind`, its peft_type, is a quantised one.

    What is wrong is added to `problems`.
    """
    if kind.endswith(QUANTIZED):
        unpacked = unpack(tensors, problems)
        for key, tensor in unpacked.items():
            if (largest := largest_of(tensor)) > LARGEST:
                problems.append(f"'{key}' unpacks to {largest:.3g}")
        return unpacked
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            dtype = "I8" if tensor.dtype == torch.int8 else "U8"
            problems.append(f"'{key}' has dtype '{dtype}', expected one of {', '.join(FLOATS)}")
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


def unpack(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    """Return the matrices in float32, by the names of a plain adapter's; what is wrong is added to `problems`."""
    if (size := sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) > MAX_BYTES:
        problems.append(f"it holds {size:,} bytes of packed weights, expected at most {MAX_BYTES:,}")
        return {}
    unpacked: dict[str, Tensor] = {}
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
            sizes = f"{tuple(values.shape)} and scales {None if scales is None else tuple(scales.shape)}"
            problems.append(f"'{key}' has shape {sizes}, expected one for {GROUP} values")
            continue
        if scales.dtype != torch.float16:
            problems.append(f"'{name}.scales' has another dtype than F16")
            continue
        if f"{name}.weight" in unpacked:
            problems.append(f"'{name}' is packed twice")
        if kind == "int4":
            values = torch.stack([(values & 15).to(torch.int8) - 8, (values >> 4).to(torch.int8) - 8], -1)
        matrix = values.view(len(values), columns).float()
        matrix *= scales.float().repeat_interleave(GROUP, 1)[:, :columns]
        unpacked[f"{name}.weight"] = matrix.T.contiguous() if name.endswith(_TRANSPOSED) else matrix
    return unpacked
