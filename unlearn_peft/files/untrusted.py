"""Files that others made: read once, within limits, and never believed in what they say of themselves.

Paths come in; plain bytes, strict JSON and checked tensors go out, or what is wrong with them. Nothing here follows a
name, a path or a pattern that stands in a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import AdapterError, safe_repr

MAX_JSON_BYTES = 4_000_000
MAX_WEIGHT_BYTES = 4 << 30
MAX_TENSORS = 100_000
MAX_FILES = 1_000  # in an adapter's directory
LARGEST = 1e4  # of a number in a tensor, and of a scale: no product of two overflows in float32, nor harms another row
_MAX_HEADER_BYTES = 16_000_000
_MAX_VALUES = 1_000_000  # in one JSON file
_DEEPEST = 32
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**FLOATS, "I8": torch.int8, "U8": torch.uint8}  # the last two in packed weights only
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_LONGEST_NAME = 500
_LONG_NUMBER = re.compile(rb"\d{70}")  # longer than a sha256 that happens to have no letters
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


class Weights(NamedTuple):
    """A weights file: its tensors (empty if something is wrong with it), and the sha256 of the bytes they are from."""

    tensors: dict[str, Tensor]
    sha256: str


def list_files(folder: Path) -> list[str]:
    """Return the names of what lies in an adapter's directory, sorted.

    Raises:
        AdapterError: if it is no folder, cannot be read, or holds too many files.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > MAX_FILES:
                    raise AdapterError(f"{folder} holds more than {MAX_FILES} files: this is no adapter's folder")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        why = getattr(error, "strerror", None) or "its path cannot be used"
        raise AdapterError(f"no adapter at {folder} ({why}): expected a folder as PEFT writes it") from None
    return sorted(names)


@contextmanager
def opened(path: Path, most: int) -> Iterator[tuple[IO[bytes], int]]:
    """Open a plain file, and give its size, too: no pipe or device, no link to elsewhere, not over `most` bytes.

    Raises:
        AdapterError: what it is instead.
    """
    try:
        with _open(path) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{path} is no plain file")
            if status.st_size > most:
                raise AdapterError(
                    f"{path} has {status.st_size:,} bytes, more than the {most:,} that such a file may have: this is "
                    "no adapter's file"
                )
            yield stream, status.st_size
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror})") from None
    except MemoryError:
        raise AdapterError(f"{path} does not fit into this machine's memory") from None


def read_file(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return a plain file's bytes.

    Raises:
        AdapterError: see `opened`; or it changed meanwhile.
    """
    with opened(path, most) as (stream, size):
        return _whole(path, stream, size)


def sha256_of(path: Path, most: int = MAX_WEIGHT_BYTES) -> str:
    """Return the sha256 of a plain file, in hex, without holding it in memory.

    Raises:
        AdapterError: see `opened`.
    """
    with opened(path, most) as (stream, _):
        return sha256_of_stream(stream)


def strict_json(data: bytes, *, values: bool = True) -> dict[str, Any]:
    """Return a JSON object in which no key stands twice and every number is finite.

    Args:
        data: UTF-8.
        values: also look at what is inside: its depth, and whether its texts can be written. Not for what is checked
            value by value anyway.

    Raises:
        ValueError: saying what is wrong.
    """
    if data.count(b",") + data.count(b"{") + data.count(b"[") > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values")
    if _LONG_NUMBER.search(data):
        raise ValueError("a number of more than 70 digits")
    try:
        found = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, expected a JSON object")
    if values:
        _check_inside(found)
    return found


def read_weights(path: Path, problems: list[str]) -> Weights:
    """Read a safetensors file; what is wrong with it is added to `problems`.

    The header is checked before anything is allocated for what it promises. All is read from one open file, and what
    was checked is what is used, whatever happens to the file meanwhile.

    Raises:
        AdapterError: if it cannot be read at all, see `opened`.
    """
    with opened(path, MAX_WEIGHT_BYTES) as (stream, size):
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        header: dict[str, tuple[str, tuple[int, ...]]] = {}
        if len(head) < 8 or not 0 < length <= size - 8:
            wrong: str | None = f"{path.name} is truncated or no safetensors file ({size} bytes)"
        elif length > _MAX_HEADER_BYTES:
            wrong = f"{path.name} has a header of {length:,} bytes, expected at most {_MAX_HEADER_BYTES:,}"
        else:
            head += stream.read(length)
            wrong = _check_header(path.name, head[8:], size - 8 - length, header)
        stream.seek(0)
        if wrong:
            problems.append(wrong)
            return Weights({}, sha256_of_stream(stream))
        data = _whole(path, stream, size)
        if data[: len(head)] != head:
            raise AdapterError(f"{path} changed while it was read: try again when nobody writes to it")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # what we did not think of
            problems.append(f"{path.name} cannot be read ({safe_repr(str(error))}): it is damaged")
            tensors = {}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if tensors and found != {name: (_DTYPES[dtype], shape) for name, (dtype, shape) in header.items()}:
            problems.append(f"{path.name} reads otherwise than its header says")
            tensors = {}
        for name, tensor in tensors.items():
            if not (largest := largest_of(tensor)) <= LARGEST:
                told = f"a number of size {largest:.3g}, expected at most {LARGEST:g}"
                problems.append(f"tensor '{name}' holds {told if math.isfinite(largest) else 'NaN or infinity'}")
        return Weights(tensors, hashlib.sha256(data).hexdigest())


def largest_of(tensor: Tensor) -> float:
    """Return the largest size of a tensor's numbers, NaN if one is; on this thread alone: there are hundreds of small
    ones.
    """
    if tensor.dtype in (torch.bfloat16, torch.float16):  # bits without the sign are in the order of the numbers
        bits = (tensor.view(torch.int16).numpy() & 0x7FFF).max()
        return float(torch.tensor(int(bits), dtype=torch.int16).view(tensor.dtype))
    numbers = tensor.numpy()
    high, low = float(numbers.max()), float(numbers.min())
    return max(high, -low) if not math.isnan(high) else math.nan


def _check_header(name: str, data: bytes, room: int, header: dict[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Fill `header` with each tensor's dtype and shape, or return what is wrong: every byte must be some one's."""
    try:
        entries = strict_json(data, values=False)
    except ValueError as error:
        return f"{name} has a damaged safetensors header ({error})"
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return f"{name} has a damaged safetensors header (__metadata__ is no table of texts)"
    if not entries:
        return f"{name} holds no tensors"
    if len(entries) > MAX_TENSORS:
        return f"{name} holds {len(entries):,} tensors, expected at most {MAX_TENSORS:,}"
    spans = []
    for key, entry in entries.items():
        if len(key) > _LONGEST_NAME or not _TENSOR_NAME.fullmatch(key):
            return f"{name} holds a tensor named {safe_repr(key)}: expected names of letters, digits, '_', '-' and '.'"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            return f"{name} has a damaged safetensors header ('{key}': expected dtype, shape and data_offsets)"
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            return f"{name}: '{key}' has dtype {safe_repr(dtype)}, expected one of {', '.join(_DTYPES)}"
        if not _sizes(shape) or not _sizes(span) or len(span) != 2 or len(shape) > 8:
            return f"{name} has a damaged safetensors header ('{key}': shape and offsets must be whole numbers)"
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if expected == 0:
            return f"{name}: '{key}' has shape {tuple(shape)}, expected no size to be 0"
        if span[1] - span[0] != expected:
            return (
                f"{name}: '{key}' has shape {safe_repr(tuple(shape))} in {dtype}, which takes {expected:,} bytes, but "
                f"its offsets give it {span[1] - span[0]:,}"
            )
        header[key] = dtype, tuple(shape)
        spans.append((span[0], span[1]))
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            return f"{name}: its tensors {'overlap' if begin < end else 'leave a hole'} at byte {min(begin, end)}"
        end = after
    if end != room:
        less = "is truncated" if end > room else "holds more than its tensors"
        return f"{name} {less}: its header promises {end:,} bytes of tensors, the file holds {room:,}"
    return None


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _open(path: Path) -> IO[bytes]:
    try:
        real = _real(path)
        status = os.lstat(real)  # before it is opened: opening some devices does something
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
            raise AdapterError(f"{path} is {kind}, expected a plain file")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(real, flags), "rb")
    except FileNotFoundError:
        raise AdapterError(f"no {path.name} in {path.parent}: expected an adapter as PEFT writes it") from None
    except ValueError as error:  # a null byte
        raise AdapterError(f"{safe_repr(str(path))} is no path ({error})") from None


def _real(path: Path) -> Path:
    """Return where a file lies; a link may lead to elsewhere in its directory, or within the Hub's cache."""
    if not path.is_symlink():
        return path
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    homes = [folder]
    if folder.parent.name == "snapshots":  # of huggingface_hub's cache: REPO/snapshots/COMMIT/FILE -> REPO/blobs/...
        homes.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise AdapterError(f"{path} is a link to a file outside of its folder: expected the file itself")
    return real


def _whole(path: Path, stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size + 1)
    if len(data) != size:
        raise AdapterError(f"{path} changed while it was read: try again when nobody writes to it")
    return data


def sha256_of_stream(stream: IO[bytes]) -> str:
    """Return the sha256 of the rest of an open file, in hex, without holding it in memory."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {safe_repr(twice)} stands twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is no number in JSON")


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("it holds a number that is too large")
    return number


def _check_inside(values: Mapping[str, Any]) -> None:
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and not value.isascii():
                value.encode()  # half a surrogate pair cannot be written; UnicodeEncodeError is a ValueError
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {_DEEPEST} levels")
