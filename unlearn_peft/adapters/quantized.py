"""A quantised adapter's tensors: 8 or 4 bits a value, with one scale for each group of `GROUP` values of a row.

`pack` makes two tensors of a safetensors file from a matrix; `packed_matrices` finds the matrices among all tensors of
such a file. They stay packed until one is used, since they grow eightfold. Factors are packed along their long side, so
that a row is one rank: `lora_B` is stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.weights import FLOATS, LARGEST, largest_of

GROUP = 64  # values that share a scale
QUANTIZED = "_QUANTIZED"  # suffix of peft_type: PEFT refuses such a type instead of ignoring the tensors
MAX_BYTES = 1 << 29  # of a file, packed
_SMALLEST = 6e-5  # the smallest normal number in float16, for scales
# of a group's largest value: a smaller step may fit the other values better
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_TRANSPOSED = "lora_B"
_BLOCK = 1 << 20  # values that are unpacked at once


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in its packed form; its values are checked by nobody, see `largest`."""

    values: Tensor  # (rows, columns) of int8, or (rows, columns / 2) of uint8
    scales: Tensor  # (rows, groups) of float16
    transposed: bool  # the matrix is (columns, rows)

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's own shape."""
        rows, columns = self.values.shape
        columns *= 2 if self.values.dtype == torch.uint8 else 1
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def largest(self) -> float:
        """The largest magnitude of its numbers, NaN if one is."""
        return max(map(largest_of, (block for _, _, block in self._blocks())), key=lambda x: (x != x, x))

    def dim(self) -> int:
        """As of a tensor: 2."""
        return 2

    def unpack(self) -> Tensor:
        """Return the matrix in float32; nothing else of its size is allocated."""
        matrix = torch.empty(self.shape)
        rows = matrix.T if self.transposed else matrix
        for row, column, block in self._blocks():
            rows[row : row + block.shape[0], column : column + block.shape[1]] = block
        return matrix

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the matrix as stored in blocks of float32, each with its first row and column."""
        a_byte = 2 if self.values.dtype == torch.uint8 else 1
        width = min(self.values.shape[1] * a_byte, _BLOCK)
        height = max(_BLOCK // width, 1)
        for row in range(0, len(self.values), height):
            for column in range(0, self.values.shape[1] * a_byte, width):
                values = self.values[row : row + height, column // a_byte : (column + width) // a_byte]
                if a_byte == 2:
                    values = torch.stack([(values & 15).to(torch.int8) - 8, (values >> 4).to(torch.int8) - 8], -1)
                block = values.flatten(1).float()
                groups = self.scales[row : row + height, column // GROUP : -(-(column + width) // GROUP)].float()
                yield row, column, block.mul_(groups.repeat_interleave(GROUP, 1)[:, : block.shape[1]])


Matrix = Tensor | PackedMatrix


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


def floats(kind: str, tensors: Mapping[str, Tensor], problems: list[str]) -> Mapping[str, Matrix]:
    """Return the matrices of a weights file, still packed if `kind`, its peft_type, is a quantised one.

    What is wrong is added to `problems`. On the device `meta`, where tensors have shapes only, numbers are not checked.
    """
    if kind.endswith(QUANTIZED):
        matrices = packed_matrices(tensors, problems)
        for key, matrix in matrices.items():
            if not matrix.values.is_meta and not (largest := matrix.largest) <= LARGEST:
                problems.append(f"'{key}' unpacks to {largest:.3g}")
        return matrices
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            dtype = "I8" if tensor.dtype == torch.int8 else "U8"
            problems.append(f"'{key}' has dtype '{dtype}', expected one of {', '.join(FLOATS)}")
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


def packed_matrices(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, PackedMatrix]:
    """Return the packed matrices by the names of a plain adapter's; what is wrong is added to `problems`."""
    matrices: dict[str, PackedMatrix] = {}
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
        if f"{name}.weight" in matrices:
            problems.append(f"'{name}' is packed twice")
        matrices[f"{name}.weight"] = PackedMatrix(values, scales, name.endswith(_TRANSPOSED))
    return matrices
