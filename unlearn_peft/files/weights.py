"""A safetensors file that others made: its header is checked before anything is allocated for what it promises.

Tensors come out, or for those that a caller needs only to compare, digests: they are never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError, safe_repr
from .untrusted import MAX_WEIGHT_BYTES, opened, sha256_of_stream, strict_json

MAX_TENSORS = 100_000
LARGEST = 1e4  # of a number in a tensor, and of a scale: no product of two overflows in float32, nor harms another row
_MAX_HEADER_BYTES = 16_000_000
_MAX_NAME = 500  # characters
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**FLOATS, "I8": torch.int8, "U8": torch.uint8}  # the last two in packed weights only
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape, in the order of the file
_BLOCK = 1 << 20  # bytes; a whole number of each dtype's


class Weights(NamedTuple):
    """A weights file: its tensors (none if something is wrong with it), and the sha256 of the bytes they are from."""

    tensors: dict[str, Tensor]
    sha256: str
    digests: dict[str, TensorDigest]  # of the tensors that were only to be compared


@dataclass(frozen=True)
class TensorDigest:
    """What is kept of a tensor to compare it with another one: sha256 of its values, also in dtypes as narrow."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: dict[torch.dtype, str]

    def equals(self, tensor: Tensor) -> bool:
        """Return whether a tensor has the same values bit for bit, once both are in the dtype of one of the two."""
        dtypes = {self.dtype, tensor.dtype} & self.sha256.keys()
        return tuple(tensor.shape) == self.shape and any(
            self.sha256[dtype] == digest_of(tensor, dtype) for dtype in dtypes
        )


@torch.no_grad()
def digest_of(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return the sha256 of a tensor's values in a dtype, a block at a time."""
    digest = hashlib.sha256()
    for block in torch.split(tensor.detach().reshape(-1), _BLOCK // tensor.element_size()):
        digest.update(_bytes(block.to(dtype)))
    return digest.hexdigest()


def read_weights(
    path: Path,
    problems: list[str],
    compare_only: Callable[[str], bool] = lambda _: False,
    usable: Callable[[dict[str, Tensor]], bool] = lambda _: True,
) -> Weights:
    """Read a safetensors file; what is wrong with it is added to `problems`.

    The header is checked before anything is allocated for what it promises, and all is read once, from one open file:
    what was checked is what is used, whatever happens to the file meanwhile. (safetensors would hold it twice.)

    Args:
        path: the file.
        problems: is added to.
        compare_only: says by its name whether a tensor is read into a digest and not kept.
        usable: gets the others' shapes and dtypes, as tensors on the device `meta`; if it says no, none is read.

    Raises:
        AdapterError: if it cannot be read at all, see `opened`.
    """
    with opened(path, MAX_WEIGHT_BYTES) as (stream, size):
        try:
            head, header = _read_header(stream, size)
            kept = {key: entry for key, entry in header.items() if not compare_only(key)}
            shapes = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in kept.items()}
            is_usable = usable(shapes)
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
            is_usable = False
        if not is_usable:
            stream.seek(0)
            return Weights({}, sha256_of_stream(stream), {})
        digest, tensors, digests = hashlib.sha256(head), {}, {}
        for key, (dtype, shape) in header.items():
            if key not in kept:
                digests[key] = _read_digest(path, stream, dtype, shape, digest)
            else:
                data = _read_block(path, stream, math.prod(shape) * dtype.itemsize, digest)
                tensors[key] = torch.frombuffer(data, dtype=dtype).reshape(shape)
        if stream.read(1):
            raise _changed(path)
    for key, tensor in tensors.items():
        if not (largest := largest_of(tensor)) <= LARGEST:
            number = f"a number of size {largest:.3g}, expected at most {LARGEST:g}"
            problems.append(f"tensor '{key}' holds {number if math.isfinite(largest) else 'NaN or infinity'}")
    return Weights(tensors, digest.hexdigest(), digests)


def read_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtypes and shapes of a safetensors file's tensors; nothing but its header is read.

    Raises:
        AdapterError: if it cannot be read at all, see `opened`, or its header is damaged.
    """
    with opened(path, MAX_WEIGHT_BYTES) as (stream, size):
        try:
            return _read_header(stream, size)[1]
        except ValueError as error:
            raise AdapterError(f"{path.name}: {error}") from None


def _read_header(stream: IO[bytes], size: int) -> tuple[bytes, _Header]:
    """Return the first bytes of a file of `size` bytes, up to its tensors, and what they say; ValueError if damaged."""
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 0 < length <= size - 8:
        raise ValueError(f"truncated or no safetensors file ({size} bytes)")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"it has a header of {length:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
    head += stream.read(length)
    return head, _parse_header(head[8:], size - 8 - length)


def _read_block(path: Path, stream: IO[bytes], size: int, digest: Any) -> bytearray:
    data = bytearray(size)
    if stream.readinto(data) != size:  # type: ignore[attr-defined]
        raise _changed(path)
    digest.update(data)
    return data


def _read_digest(
    path: Path, stream: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...], digest: Any
) -> TensorDigest:
    narrow = (d for d in FLOATS.values() if d.itemsize <= dtype.itemsize and dtype.is_floating_point)
    found = {d: hashlib.sha256() for d in (dtype, *narrow)}
    left = math.prod(shape) * dtype.itemsize
    while left:
        block = torch.frombuffer(_read_block(path, stream, min(left, _BLOCK), digest), dtype=dtype)
        left -= block.nbytes
        for narrower, each in found.items():
            each.update(_bytes(block.to(narrower)))
    return TensorDigest(dtype, shape, {d: each.hexdigest() for d, each in found.items()})


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().view(torch.uint8).numpy()


def _changed(path: Path) -> AdapterError:
    return AdapterError(f"{path} changed while it was read: try again when nobody writes to it")


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
    spans = {}
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
        spans[key] = span
    end, in_order = 0, sorted(spans, key=spans.__getitem__)
    for begin, after in map(spans.__getitem__, in_order):
        if begin != end:
            raise ValueError(f"its tensors {'overlap' if begin < end else 'leave a hole'} at byte {min(begin, end)}")
        end = after
    if end != room:
        problem = "is truncated" if end > room else "holds more than its tensors"
        raise ValueError(f"it {problem}: its header promises {end:,} bytes of tensors, the file holds {room:,}")
    return {key: header[key] for key in in_order}


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
