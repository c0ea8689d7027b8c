"""An adapter in fewer bytes: fewer ranks, fewer bits a value, and how much of its effect that leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError
from ...files.atomic import folder_bytes
from ..bundle import WEIGHTS, Bundle, Delta
from ..quantized import QUANTIZED, pack, unpack
from ..read import read_bundle
from ..trust import Trust
from ..validate import DENSE, LORA
from .low_rank import lost_share, scaled_by_one, truncated
from .merge import write_made

BITS = (8, 4)


@dataclass(frozen=True)
class Shrunk:
    """What was written, and what each module's change lost: Frobenius norm of the difference over that of the whole."""

    path: Path
    before: int  # bytes of the weights file
    after: int
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The module that lost most."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """The mean over modules."""
        return fmean(self.errors.values())

    @property
    def bytes(self) -> int:
        """Size of the whole folder."""
        return folder_bytes(self.path)


def shrink(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    bits: int | None = None,
    max_error: float | None = None,
    trust: Trust | None = None,
) -> Shrunk:
    """Write an adapter with fewer ranks, fewer bits a value, or both.

    Args:
        adapter: its directory. A dense head takes `bits`, and becomes a LoRA by `rank`.
        output: the new directory, written whole or not at all.
        rank: of each module at most; None: as it is.
        bits: 8 or 4 for each value, see adapters/quantized.py; None: as many as before, and PEFT can read it.
        max_error: refuse to lose more than this of any module's change; None: no limit.
        trust: whose signatures are taken, and whether one is needed. What is written is not signed.

    Raises:
        AdapterError: if it is refused, has no more ranks than asked for, or would lose more than `max_error`.
        OutputError: if the output cannot be written.
    """
    if bits is not None and bits not in BITS:
        raise AdapterError(f"{bits} bits are not known: expected 8 or 4")
    if bits is None and rank is None:
        raise AdapterError("nothing to do: give a rank, bits, or both")
    if rank is not None and rank < 1:
        raise AdapterError(f"the rank is {rank}: expected at least 1")
    bundle = read_bundle(adapter, trust=trust)
    dtype = next(iter(bundle.deltas.values())).up.dtype
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, delta in sorted(bundle.deltas.items()):
        factors = _factors(delta, rank)
        parts = {f"base_model.model.{name}.{part}": tensor for part, tensor in factors.items()}
        if bits:
            stored = {key: value for part in parts.items() for key, value in pack(*part, bits).items()}
            problems: list[str] = []
            read = unpack(stored, problems)
            assert not problems, problems
        else:
            stored = {f"{key}.weight": tensor.to(dtype).contiguous() for key, tensor in parts.items()}
            read = stored
        tensors |= stored
        again = [read[f"{key}.weight"].float() for key in parts]
        if len(again) == 2:
            ranks[name] = len(again[0])
        errors[name] = lost_share(delta, again[-1], again[0] if len(again) == 2 else None)
    made = Shrunk(Path(output), (bundle.path / WEIGHTS).stat().st_size, _bytes(tensors), errors)
    if max_error is not None and made.worst[1] > max_error:
        raise AdapterError(
            f"'{made.worst[0]}' would lose {made.worst[1]:.3g} of its change, more than {max_error:g}: keep more ranks "
            "or bits"
        )
    write_made(made.path, tensors, _config(bundle, ranks, bits), _manifest(bundle, made, rank, bits, bool(ranks)))
    return made


def _factors(delta: Delta, rank: int | None) -> dict[str, Tensor]:
    """Return a delta's factors, scaling folded in; balanced by their singular values, so that bits are well spent."""
    if delta.down is None:
        if rank is None:
            return {"dense_head_delta": delta.up.float() * delta.scale}
        left, values, right = torch.svd_lowrank(delta.up.float(), min(rank + 8, *delta.up.shape), niter=4)
        root = values[:rank].sqrt()
        return {"lora_A": root[:, None] * right[:, :rank].T, "lora_B": left[:, :rank] * root}
    most = len(delta.down)
    up, down, _ = truncated(delta.up.float() * delta.scale, delta.down.float(), min(rank or most, most))
    return {"lora_A": down, "lora_B": up}


def _config(bundle: Bundle, ranks: dict[str, int], bits: int | None) -> dict[str, Any]:
    suffix = QUANTIZED if bits else ""
    config: dict[str, Any] = {
        "peft_type": (LORA if ranks else DENSE) + suffix, "task_type": "CAUSAL_LM", "inference_mode": True,
        "target_modules": sorted(bundle.deltas),
        "base_model_name_or_path": bundle.config.get("base_model_name_or_path"),
    }  # fmt: skip
    return config | scaled_by_one(ranks) if ranks else config


def _manifest(bundle: Bundle, made: Shrunk, rank: int | None, bits: int | None, lora: bool) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key in ("base", "recipe", "data_digests", "stack_of"):
        if key in bundle.manifest:
            kept[key] = bundle.manifest[key]
    module, error = made.worst
    return {
        **kept,
        "peft_type": (LORA if lora else DENSE) + (QUANTIZED if bits else ""),
        "shrunk": {
            "weights_sha256": bundle.digest, "rank": rank, "bits": bits, "mean_relative_error": made.mean,
            "worst": {"module": module, "relative_error": error}, "relative_errors": made.errors,
        },
        "versions": {"unlearn-peft": version("unlearn-peft")},
    }  # fmt: skip


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
