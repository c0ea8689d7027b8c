"""A smaller adapter with nearly the same effect: a lower rank, fewer bits a value, and what each module loses by it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ...errors import AdapterError
from ...files.atomic import folder_bytes
from ..bundle import WEIGHTS, Delta
from ..quantized import QUANTIZED, pack, packed_matrices
from ..read import read_bundle
from ..trust import Trust
from ..validate import DENSE, LORA
from .low_rank import lost_share, rank_config, truncated
from .merge import write_derived

BITS = (8, 4)
_INHERITED = ("base", "recipe", "data_digests", "stack_of")  # of the manifest


@dataclass(frozen=True)
class Shrunk:
    """What was written, and the share of its delta that each module lost, see `lost_share`."""

    path: Path
    before: int  # bytes of the weights file
    after: int
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The module that lost most, and its error."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """The mean error over modules."""
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
    """Write an adapter with a lower rank, fewer bits a value, or both. It is not signed.

    Args:
        adapter: its directory. A dense head takes `bits`; a `rank` makes a LoRA of it.
        output: the new directory, written whole or not at all.
        rank: the most that a module keeps; None: unchanged.
        bits: 8 or 4 a value, see adapters/quantized.py; None: unchanged, and PEFT can read it.
        max_error: the largest share that a module may lose; None: no limit.
        trust: see `read_bundle`.

    Raises:
        AdapterError: if the adapter is refused, nothing is asked for, or a module would lose more than `max_error`.
        OutputError: if the output cannot be written.
    """
    if bits is not None and bits not in BITS:
        raise AdapterError(f"{bits} bits are not known: expected 8 or 4")
    if bits is None and rank is None:
        raise AdapterError("nothing to do: give a rank, bits, or both")
    if rank is not None and rank < 1:
        raise AdapterError(f"the rank is {rank}: expected at least 1")
    bundle = read_bundle(adapter, trust=trust)
    bundle.check_without_base()
    dtype = reduce(
        torch.promote_types,
        {part.dtype for delta in bundle.deltas.values() for part in (delta.up, delta.down) if part is not None},
    )
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, delta in sorted(bundle.deltas.items()):
        factors = {f"base_model.model.{name}.{part}": tensor for part, tensor in _factors(delta, rank).items()}
        if bits:
            stored = {key: value for factor in factors.items() for key, value in pack(*factor, bits).items()}
            problems: list[str] = []
            read = {key: matrix.unpack() for key, matrix in packed_matrices(stored, problems).items()}
            assert not problems, problems
        else:
            read = stored = {f"{key}.weight": tensor.to(dtype) for key, tensor in factors.items()}
        tensors |= stored
        *down, up = (read[f"{key}.weight"].float() for key in factors)
        if down:
            ranks[name] = len(down[0])
        errors[name] = lost_share(delta, Delta(up, down[0] if down else None))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    result = Shrunk(Path(output), (bundle.path / WEIGHTS).stat().st_size, size, errors)
    module, error = result.worst
    if max_error is not None and error > max_error:
        raise AdapterError(
            f"'{module}' would lose {error:.3g} of its change, more than {max_error:g}: keep more ranks or bits"
        )
    manifest = {
        **{key: bundle.manifest[key] for key in _INHERITED if key in bundle.manifest},
        "peft_type": (LORA if ranks else DENSE) + (QUANTIZED if bits else ""),
        "shrunk": {
            "weights_sha256": bundle.digest, "rank": rank, "bits": bits, "mean_relative_error": result.mean,
            "worst": {"module": module, "relative_error": error}, "relative_errors": errors,
        },
    }  # fmt: skip
    base = bundle.config.get("base_model_name_or_path")
    write_derived(result.path, tensors, manifest, bundle.deltas, base, rank_config(ranks) if ranks else {})
    return result


def _factors(delta: Delta, rank: int | None) -> dict[str, Tensor]:
    """Return a delta's factors, scaling folded in; balanced by their singular values, so that bits are well spent."""
    if delta.down is None:
        if rank is None:
            return {"dense_head_delta": delta.up.float() * delta.scale}
        left, values, right = torch.svd_lowrank(delta.up.float(), min(rank + 8, *delta.up.shape), niter=4)
        root = values[:rank].sqrt()
        return {"lora_A": root[:, None] * right[:, :rank].T, "lora_B": left[:, :rank] * root}
    full = len(delta.down)
    up, down, _ = truncated(delta.up.float() * delta.scale, delta.down.float(), min(rank or full, full))
    return {"lora_A": down, "lora_B": up}
