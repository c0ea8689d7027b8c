"""A safetensors file that others made: its header is checked before anything is allocated for what it promises."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import AdapterError, safe_repr
from .untrusted import MAX_WEIGHT_BYTES, opened, read_all, sha256_of_stream, strict_json

MAX_TENSORS = 100_000
LARGEST = 1e4  # of a number in a tensor, and of a scale: no product of two overflows in float32, nor harms another row
_MAX_HEADER_BYTES = 16_000_000
_MAX_NAME = 500  # characters
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**FLOATS, "I8": torch.int8, "U8": torch.uint8}  # the last two in packed weights only
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape


class Weights(NamedTuple):
    """A weights file: its tensors (empty if something is wrong with it), and the sha256 of the bytes they are from."""

    tensors: dict[str, Tensor]
    sha256: str


def read_weights(path: Path, problems: list[str]) -> Weights:
    """Read a safetensors file; what is wrong with it is added to `problems`.

    The header is checked before anything is allocated for what it promises, and all is read from one open file: what
    was checked is what is used, whatever happens to the file meanwhile.

    Raises:
        AdapterError: if it cannot be read at all, see `opened`.
    """
    with opened(path, MAX_WEIGHT_BYTES) as (stream, size):
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        try:
            if len(head) < 8 or not 0 < length <= size - 8:
                raise ValueError(f"truncated or no safetensors file ({size} bytes)")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"it has a header of {length:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
            head += stream.read(length)
            header = _parse_header(head[8:], size - 8 - length)
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
            stream.seek(0)
            return Weights({}, sha256_of_stream(stream))
        stream.seek(0)
        data = read_all(path, stream, size)
        if data[: len(head)] != head:
            raise AdapterError(f"{path} changed while it was read: try again when nobody writes to it")
        return Weights(_load_tensors(path.name, data, header, problems), hashlib.sha256(data).hexdigest())


def _load_tensors(name: str, data: bytes, header: _Header, problems: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a file; what is wrong with it or with a tensor's numbers is added to `problems`."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # what we did not think of
        problems.append(f"{name} cannot be read ({safe_repr(str(error))}): it is damaged")
        return {}
    if {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} != header:
        problems.append(f"{name} reads otherwise than its header says")
        return {}
    for key, tensor in tensors.items():
        if not (largest := largest_of(tensor)) <= LARGEST:
            size = f"a number of size {largest:.3g}, expected at most {LARGEST:g}"
            problems.append(f"tensor '{key}' holds {size if math.isfinite(largest) else 'NaN or infinity'}")
    return tensors


def largest_of(tensor: Tensor) -> float:
    """Return the largest magnitude of a tensor's numbers, NaN if one is.

    By numpy, on this thread alone: there are hundreds of small tensors.
    """
    if tensor.dtype in (torch.bfloat16, torch.float16):  # bits without the sign are in the order of the numbers
        bits = (tensor.view(torch.int16).numpy() & 0x7FFF).max()
        return float(torch.tensor(int(bits), dtype=torch.int16).view(tensor.dtype))
    numbers = tensor.numpy()
    high, low = float(numbers.max()), float(numbers.min())
    return max(high, -low) if not math.isnan(high) else math.nan


def _parse_header(data: bytes, room: int) -> _Header:
    """Return the tensors that the header of a file with `room` bytes behind it describes.

    Offsets are checked here, though safetensors would: before the file is read, and to say what is wrong.

    Raises:
        ValueError: saying what is wrong; every byte must be one tensor's.
    """
    try:
        entries = strict_json(data, values=False)
    except ValueError as error:
        raise ValueError(f"damaged safetensors header ({error})") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("damaged safetensors header (__metadata__ is no table of texts)")
    if not entries:
        raise ValueError("it holds no tensors")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"it holds {len(entries):,} tensors, expected at most {MAX_TENSORS:,}")
    header: _Header = {}
    spans = []
    for key, entry in entries.items():
        if len(key) > _MAX_NAME or not _TENSOR_NAME.fullmatch(key):
            expected = "expected names of letters, digits, '_', '-' and '.'"
            raise ValueError(f"it holds a tensor named {safe_repr(key)}: {expected}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"damaged safetensors header ('{key}': expected dtype, shape and data_offsets)")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"'{key}' has dtype {safe_repr(dtype)}, expected one of {', '.join(_DTYPES)}")
        if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2 or len(shape) > 8:
            raise ValueError(f"damaged safetensors header ('{key}': shape and offsets must be whole numbers)")
        header[key] = (_DTYPES[dtype], tuple(shape))
        size, space = math.prod(shape) * _DTYPES[dtype].itemsize, span[1] - span[0]
        if size == 0:
            raise ValueError(f"'{key}' has shape {tuple(shape)}, expected no size to be 0")
        if space != size:
            tensor = f"'{key}' has shape {safe_repr(tuple(shape))} in {dtype}"
            raise ValueError(f"{tensor}, which takes {size:,} bytes, but its offsets give it {space:,}")
        spans.append(span)
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise ValueError(f"its tensors {'overlap' if begin < end else 'leave a hole'} at byte {min(begin, end)}")
        end = after
    if end != room:
        problem = "is truncated" if end > room else "holds more than its tensors"
        raise ValueError(f"it {problem}: its header promises {end:,} bytes of tensors, the file holds {room:,}")
    return header


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
