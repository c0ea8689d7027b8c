"""An adapter directory: PEFT's two files, a manifest and a card. Read as untrusted, written whole or not at all.

`read_bundle` checks everything that can be checked without a base; `Bundle.check_fits` the rest, against a live
model. Both tell all that is wrong at once, before anything is attached.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from .base import fingerprint, mismatches
from .errors import AdapterError, OutputError
from .files import folder_bytes, whole_file, whole_folder

WEIGHTS, CONFIG, MANIFEST, CARD, CURVES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "forget.json",
    "README.md",
    "curves.png",
)
SCHEMA_VERSION = 1
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_PLAIN_LORA = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
}
_MAX_JSON_BYTES = 10_000_000


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear layer: `scale * up @ down`, or a dense `up` alone."""

    up: Tensor  # (out, r); dense: (out, in)
    down: Tensor | None  # (r, in)
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """The rank, or None where the delta is dense."""
        return None if self.down is None else self.down.shape[0]


@dataclass(frozen=True)
class Bundle:
    """An adapter read from disk: its deltas by module name, its PEFT config, its manifest (empty if it has none)."""

    path: Path
    config: dict[str, Any]
    deltas: dict[str, Delta]
    manifest: dict[str, Any]
    digest: str  # sha256 of the weights file
    identity: str  # sha256 over weights file and config: equal if and only if the effect is the same

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    @property
    def bytes(self) -> int:
        """Size of the whole directory."""
        return folder_bytes(self.path)

    def check_fits(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        allow_different_base: bool = False,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that the adapter was made for this base; `known` is the base's fingerprint, if it is known.

        Raises:
            AdapterError: naming every module that is missing or has another shape, and every part of the
                base's fingerprint that differs (skipped with `allow_different_base`).
        """
        problems = []
        for name, delta in self.deltas.items():
            module = _submodule(model, name)
            weight = getattr(module, "weight", None)
            if module is None or weight is None:
                problems.append(f"module '{name}' does not exist in the base")
                continue
            expected = (
                (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(weight.shape)
            )
            if not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D":
                expected = (weight.shape[1], weight.shape[0])
            found = (delta.up.shape[0], (delta.up if delta.down is None else delta.down).shape[1])
            if found != expected:
                problems.append(f"'{name}' has shape {expected} in the base, the adapter was made for {found}")
        noted = self.manifest.get("base", {}).get("fingerprint", {})
        if noted and not allow_different_base:
            for part in mismatches(noted, known or fingerprint(model, tokenizer)):
                problems.append(f"the base's {part} is not the one that the adapter was trained on")
        if problems:
            trained_on = self.manifest.get("base", {}).get("name") or self.config.get("base_model_name_or_path")
            raise AdapterError(
                f"the adapter {self.path} does not match this base (it was trained on {trained_on}):\n"
                + "\n".join(f"  - {p}" for p in problems[:12])
                + (f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else "")
                + "\nLoad the base that it was trained on, or train an adapter for this one."
            )


def read_bundle(path: str | Path) -> Bundle:
    """Read and check an adapter directory: safetensors only, sizes before allocation, all mismatches at once.

    Any LoRA that PEFT wrote will do; a `forget.json` is not needed, but where there is one its digests must hold.

    Raises:
        AdapterError: naming everything that is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterError(f"no adapter at {path}: expected a folder with {CONFIG} and {WEIGHTS}")
    weights = path / WEIGHTS
    if not weights.is_file():
        pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
        if pickles:
            raise AdapterError(
                f"{path} holds {', '.join(sorted(pickles))}: a pickle can run code when it is read, and is refused. "
                f"Expected {WEIGHTS}: save it again with PEFT's save_pretrained."
            )
        raise AdapterError(f"{path} holds no {WEIGHTS}: expected an adapter as `unlearn-peft train` or PEFT writes it")
    config_bytes, manifest = _read(path / CONFIG), {}
    config = _json(path / CONFIG, config_bytes)
    if (path / MANIFEST).exists():
        manifest = _json(path / MANIFEST, _read(path / MANIFEST))
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise AdapterError(
                f"{path / MANIFEST} has schema version {manifest.get('schema_version')}, expected {SCHEMA_VERSION}: "
                "update unlearn_peft"
            )
    # read once, not mapped: what was checked is what is used, whatever happens to the file meanwhile
    data = _read(weights, None)
    _check_header(weights, data)
    digests = {name: hashlib.sha256(b).hexdigest() for name, b in ((WEIGHTS, data), (CONFIG, config_bytes))}
    for name, noted in manifest.get("files", {}).items():
        if name in digests and digests[name] != noted:
            raise AdapterError(
                f"{path / name} is not the file that was saved (its sha256 differs from the one in {MANIFEST}): "
                "it was changed or damaged. Copy it again from where it came from."
            )
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{weights} cannot be read ({error}): it is truncated or damaged; copy it again") from None
    identity = hashlib.sha256(f"{digests[WEIGHTS]} {digests[CONFIG]}".encode()).hexdigest()
    return Bundle(path, config, _deltas(path, config, tensors), manifest, digests[WEIGHTS], identity)


@contextmanager
def new_bundle(path: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to put an adapter's files into; it becomes `path`, whole, with its manifest.

    Raises:
        OutputError: if `path` holds something else than an adapter, or cannot be written.
    """
    check_output(path)
    with whole_folder(path, replace=True) as folder:
        yield folder
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest, "files": files}, indent=2, sort_keys=True)
        (folder / MANIFEST).write_text(text + "\n")


def note_digest(path: Path, name: str) -> None:
    """Note in an adapter's manifest, if it has one, that a file beside the weights and config was changed on purpose.

    Raises:
        OutputError: if the manifest cannot be written.
    """
    if not (path / MANIFEST).is_file():
        return
    manifest = _json(path / MANIFEST, _read(path / MANIFEST))
    manifest["files"] = {**manifest.get("files", {}), name: sha256(path / name)}
    with whole_file(path / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def check_output(path: Path) -> None:
    """Refuse to write an adapter over something that is none.

    Raises:
        OutputError: saying what lies there.
    """
    if path.is_file():
        raise OutputError(f"the output {path} is a file: choose a new folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        some = ", ".join(sorted(file.name for file in path.iterdir())[:3])
        raise OutputError(
            f"the output folder {path} holds something else ({some} ...): expected a new or empty folder, or an "
            "earlier adapter to replace. Choose another with --output."
        )


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path, most: int | None = _MAX_JSON_BYTES) -> bytes:
    """Return a file's bytes, if they are not more than `most`."""
    try:
        with path.open("rb") as stream:
            data = stream.read(-1 if most is None else most + 1)
    except FileNotFoundError:
        raise AdapterError(f"no {path.name} in {path.parent}: expected an adapter as PEFT writes it") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror})") from None
    if most is not None and len(data) > most:
        raise AdapterError(f"{path} is larger than {most / 1e6:.0f} MB: this is no adapter's file")
    return data


def _json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values


def _check_header(path: Path, data: bytes) -> None:
    """Check the sizes that a safetensors file claims, before anything is allocated for them."""
    size = len(data)
    length = struct.unpack("<Q", data[:8])[0] if size >= 8 else -1
    if not 0 < length <= size - 8:
        raise AdapterError(f"{path} is truncated or no safetensors file ({size} bytes): copy it again")
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise AdapterError(f"{path} has a damaged safetensors header: copy it again") from None
    if max(ends, default=0) != size - 8 - length:
        raise AdapterError(
            f"{path} is truncated: its header promises {max(ends, default=0)} bytes of tensors, the file holds "
            f"{size - 8 - length}. Copy it again."
        )


def _deltas(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    kind = config.get("peft_type")
    problems = [f"tensor '{name}' holds NaN or infinity" for name, tensor in tensors.items() if not _finite(tensor)]
    deltas: dict[str, Delta] = {}
    if kind == "DENSE_HEAD":
        for key, tensor in tensors.items():
            deltas[_module_name(key, ".dense_head_delta")] = Delta(tensor, None)
    elif kind == "LORA":
        for field, plain in _PLAIN_LORA.items():
            if config.get(field, plain) not in (plain, None, []):
                problems.append(f"'{field}' is {config[field]!r}, expected {plain!r}: use it through PEFT alone")
        deltas = _lora_deltas(config, tensors, problems)
    else:
        problems.append(f"peft_type is {kind!r}, expected LORA or DENSE_HEAD")
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        raise AdapterError(f"the adapter {path} is refused:\n" + "\n".join(f"  - {p}" for p in problems[:12]))
    return deltas


def _finite(tensor: Tensor) -> bool:
    """Look at an adapter's tensor on this thread alone: there are hundreds of small ones."""
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy: all bits of the exponent are set in NaN and infinity
        return bool((tensor.view(torch.int16).numpy() & 0x7F80 != 0x7F80).all())
    if tensor.dtype in (torch.float32, torch.float16):
        return bool(np.isfinite(tensor.numpy()).all())
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _lora_deltas(config: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Delta]:
    deltas = {}
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        problems.append(f"rank r is {rank!r}, expected a whole number of at least 1")
        return {}
    for key in sorted(tensors):
        if key.endswith(".lora_B.weight"):
            if key.replace(".lora_B.", ".lora_A.") not in tensors:
                problems.append(f"'{key}' has no lora_A beside it")
            continue
        if not key.endswith(".lora_A.weight"):
            problems.append(f"tensor '{key}' is no LoRA weight")
            continue
        module, down, up = (
            _module_name(key, ".lora_A.weight"),
            tensors[key],
            tensors.get(key.replace(".lora_A.", ".lora_B.")),
        )
        if up is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0] or down.shape[0] < 1:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape) if up is not None else None}"
            problems.append(f"'{module}': lora_A and lora_B have shapes {shapes}, expected (r, in) and (out, r)")
            continue
        expected = _pattern(config.get("rank_pattern"), module, rank)
        if down.shape[0] != expected:
            problems.append(f"'{module}' has rank {down.shape[0]}, its config says {expected}")
            continue
        alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        root = down.shape[0] ** 0.5 if config.get("use_rslora") else down.shape[0]
        deltas[module] = Delta(up, down, alpha / root)
    return deltas


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _module_name(key: str, ending: str) -> str:
    return (
        key.removesuffix(".weight" if ending == ".dense_head_delta" else "")
        .removesuffix(ending)
        .removeprefix("base_model.model.")
    )


def _pattern(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern; only plain names count here, never a regular expression."""
    for name, value in (pattern or {}).items():
        if module == name or module.endswith("." + name):
            return value
    return default
