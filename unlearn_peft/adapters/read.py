"""An adapter directory -> a checked `Bundle`. Everything in the directory is untrusted."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import AdapterError, refuse, safe_repr
from ..files.untrusted import list_files, read_file, sha256_of, strict_json
from ..files.weights import LARGEST, Weights, read_header, read_weights
from .bundle import CONFIG, MANIFEST, WEIGHTS, Bundle, Delta, PackedDelta, misplaced
from .names import factor_of, is_base_weight, why_not_lora
from .quantized import MAX_BYTES, QUANTIZED, Matrix, PackedMatrix, floats
from .trust import SIGNATURE, UNSIGNED, Trust
from .validate import DENSE, check_config, check_manifest, of_module

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_SMALL = 16_000_000  # bytes of tensors that are read for any base, so that all that is wrong is told at once
_COPY_AGAIN = "If it was damaged, copy it again from where it came from"
T = TypeVar("T")


def read_bundle(
    path: str | Path,
    *,
    trust: Trust | None = None,
    also: Callable[[Bundle], Sequence[str]] | None = None,
    model: Any = None,
) -> Bundle:
    """Read and check an adapter directory: safetensors only, sizes before allocation, all problems in one error.

    Takes any LoRA on linear layers that PEFT wrote; its tensors alone say which. `forget.json` is optional, but where
    there is one its digests must match. Each file is read once, and what was checked is what is used, even if the files
    change meanwhile. Weights of the base that lie beside a LoRA are compared with the base's when it is attached.

    Args:
        path: the directory.
        trust: the accepted signers, and whether a signature is required; None: signatures are not checked.
        also: called if there are problems, with as much as could be read; returns further ones.
        model: the base, where it is at hand: a large file with a delta that it has no place for is refused by its
            header.

    Raises:
        AdapterError: naming everything that is wrong with it.
    """
    path = Path(path)
    names = list_files(path)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if WEIGHTS not in names:
        raise AdapterError(f"{path} {_instead_of_weights(names, pickles)}")
    problems = [
        f"{safe_repr(name)} lies beside {WEIGHTS}: a pickle that other programs may read instead, and that can run code"
        for name in pickles
        if name.startswith("adapter_model")
    ]
    files, in_config, unusable = {WEIGHTS: "unread"}, list[str](), list[str]()
    if (config := read_json(path / CONFIG, files, in_config)) is not None:
        in_config += check_config(config)

    def usable(header: dict[str, Tensor]) -> bool:
        if config is None or in_config:
            return True
        if too_large := _too_large(config, header):
            problems.append(too_large)
        elif model is not None and sum(tensor.nbytes for tensor in header.values()) > _SMALL:
            further: list[str] = []
            unusable.extend(misplaced(model, deltas_of(config, header, further)))
            problems.extend(further if unusable else ())
        return not too_large and not unusable

    weights = _or_problem(path / WEIGHTS, lambda file: read_weights(file, problems, is_base_weight, usable), problems)
    weights = weights or Weights({}, "unread", {})
    files[WEIGHTS] = weights.sha256
    problems += in_config
    manifest = read_json(path / MANIFEST, files, problems) if MANIFEST in names else None
    deltas: dict[str, Delta] = {}
    if config is not None and weights.tensors and not in_config:
        deltas = deltas_of(config, weights.tensors, problems)
    if manifest is not None and (wrong := check_manifest(manifest)):
        problems, manifest = problems + wrong, None
    manifest = manifest or {}
    problems += [
        f"{name} is not the file that was saved (its sha256 differs from the one in {MANIFEST}): changed or damaged"
        for name, noted in manifest.get("files", {}).items()
        if name in (WEIGHTS, CONFIG) and files.get(name, noted) != noted
    ]
    signature = signed_by = None
    if SIGNATURE in names:
        signature = _or_problem(path / SIGNATURE, read_file, problems)
        for name in names:
            if name not in files and name not in UNSIGNED:
                files[name] = _or_problem(path / name, sha256_of, problems if trust else []) or "unread"
    if trust is not None:
        untrusted, signed_by = trust.problems(files, signature)
        problems += untrusted
    identity = identity_of(files[WEIGHTS], files.get(CONFIG))
    bundle = Bundle(
        path, config or {}, deltas, manifest, files[WEIGHTS], identity, files, signature, signed_by, weights.digests
    )
    if weights.digests and not deltas and not problems and not unusable:
        problems.append("it holds weights of a base and no LoRA")
    if problems or unusable:
        further = [*unusable, *(also(bundle) if also else ())]
        if not problems:
            bundle.refuse_for_base(further)
        refuse(f"the adapter {path} is refused", [*problems, *further], _COPY_AGAIN)
    return bundle


def read_identity(path: str | Path, sha256: str | None = None) -> str:
    """Return the identity of a checked adapter, to be pinned.

    Raises:
        AdapterError: see `read_bundle`; or it is another than `sha256`.
    """
    identity = read_bundle(path).identity
    if sha256 is not None and sha256.lower() != identity:
        raise AdapterError(f"the adapter {path} has the sha256 {identity}, not the one given: copy it again")
    return identity


def count_numbers(path: str | Path) -> int:
    """Return how many numbers an adapter's deltas hold once unpacked, by the header of its weights alone.

    Raises:
        AdapterError: the header cannot be read.
    """
    sizes = {torch.int8: 1, torch.uint8: 2}  # of packed weights: values a byte; their scales are not kept
    return sum(
        math.prod(shape) * sizes.get(dtype, 1)
        for name, (dtype, shape) in read_header(Path(path) / WEIGHTS).items()
        if not is_base_weight(name) and not name.endswith(".scales")
    )


def identity_of(weights: str, config: str | None) -> str:
    """Return `Bundle.identity` from the sha256 of the two files."""
    return hashlib.sha256(f"{weights} {config}".encode()).hexdigest()


def read_json(path: Path, files: dict[str, str], problems: list[str]) -> dict[str, Any] | None:
    """Read an untrusted JSON file, add its sha256 to `files`, and what is wrong with it to `problems`."""
    if (data := _or_problem(path, read_file, problems)) is None:
        return None
    files[path.name] = hashlib.sha256(data).hexdigest()
    try:
        return strict_json(data)
    except ValueError as error:
        problems.append(f"{path.name} is not readable JSON ({error})")
        return None


def _instead_of_weights(names: Sequence[str], pickles: Sequence[str]) -> str:
    """Say what a folder without the weights' file holds, and what to do."""
    if pickles and any(name.startswith("adapter_model") for name in pickles):
        return (
            f"holds {', '.join(map(safe_repr, pickles[:3]))}: a pickle can run code when it is read, and is refused. "
            f"Expected {WEIGHTS}: save it again with PEFT's save_pretrained."
        )
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        return (
            f"holds its weights in {len(shards)} files, {', '.join(map(safe_repr, shards[:2]))}, ...: expected all in "
            f"{WEIGHTS}, which one digest is taken of. Join them with safetensors' load_file and save_file."
        )
    if "adapters.safetensors" in names:
        return (
            f"holds adapters.safetensors, as mlx-lm writes it: expected {WEIGHTS} as PEFT writes it. Convert it: "
            "mlx-lm's lora_a and lora_b are lora_A and lora_B of PEFT transposed, its scale is PEFT's lora_alpha / r."
        )
    inner = [name for name in names if name.startswith("checkpoint-")]
    hint = f" (perhaps you mean {safe_repr(inner[-1])} in it?)" if inner else ""
    return f"holds no {WEIGHTS}: expected an adapter as `unlearn-peft train` or PEFT writes it{hint}"


def _or_problem(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    try:
        return read(path)
    except AdapterError as error:
        problems.append(str(error))
    return None


def _too_large(config: Mapping[str, Any], header: Mapping[str, Tensor]) -> str | None:
    size = sum(tensor.nbytes for tensor in header.values())
    if config["peft_type"].endswith(QUANTIZED) and size > MAX_BYTES:
        return f"it holds {size:,} bytes of packed weights, expected at most {MAX_BYTES:,}: leave them unpacked"
    return None


def deltas_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Delta]:
    """Return the deltas that an adapter's tensors are; what is wrong with them is added to `problems`."""
    matrices = floats(config["peft_type"], tensors, problems)
    if not config["peft_type"].startswith(DENSE):
        return _lora_deltas(config, matrices, problems)
    deltas: dict[str, Delta] = {}
    for key, tensor in matrices.items():
        stem = key.removesuffix(".weight")
        module = stem.removesuffix(".dense_head_delta").removeprefix("base_model.model.")
        if tensor.dim() != 2 or not stem.endswith(".dense_head_delta"):
            problems.append(f"tensor '{key}' is no dense delta of two dimensions")
            continue
        if module in deltas:
            problems.append("two tensors are for the same module")
        deltas[module] = _delta(tensor, None)
    return deltas


def _delta(up: Matrix, down: Matrix | None, scale: float = 1.0) -> Delta:
    return (PackedDelta if isinstance(up, PackedMatrix) else Delta)(up, down, scale)  # type: ignore[arg-type]


def _lora_deltas(config: Mapping[str, Any], tensors: Mapping[str, Matrix], problems: list[str]) -> dict[str, Delta]:
    sides: dict[str, dict[str, Matrix]] = {}  # by module
    others: dict[str, None] = {}
    for key in sorted(tensors):
        if (factor := factor_of(key)) is None:
            others[why_not_lora(key)] = None
        elif factor.side in sides.setdefault(factor.module, {}):
            problems.append(f"two tensors are for the module '{factor.module}'")
        else:
            sides[factor.module][factor.side] = tensors[key]
    problems += others
    deltas: dict[str, Delta] = {}
    for module, sided in sides.items():
        down, up = sided.get("lora_A"), sided.get("lora_B")
        if down is None or up is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            shapes = " and ".join(str(None if side is None else tuple(side.shape)) for side in (down, up))
            problems.append(f"'{module}': lora_A and lora_B have shapes {shapes}, expected (r, in) and (out, r)")
            continue
        rank, expected = down.shape[0], of_module(config.get("rank_pattern"), module, config.get("r", 8))
        if expected not in (rank, None):
            problems.append(f"'{module}' has rank {rank}, its config says {expected}")
        alpha = float(of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if abs(scale) > LARGEST:
            problems.append(f"'{module}' is scaled by {scale:.3g}, expected at most {LARGEST:g}: see its lora_alpha")
        deltas[module] = delta = _delta(up, down, scale)
        if isinstance(up, PackedMatrix) and rank > min(delta.shape):
            problems.append(
                f"'{module}' has rank {rank} and shape {delta.shape}: expected a rank of at most the smaller size in "
                "packed weights, as `unlearn-peft shrink` writes them"
            )
    return deltas
