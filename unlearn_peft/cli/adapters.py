"""The commands `inspect`, `stack`, `export`, `merge` and `shrink`: adapter directories in, others out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UnlearnError
from .options import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    RequireOption,
    StrengthOption,
    TrustedOption,
    base_of,
    load,
    trust_of,
)


def inspect(
    adapter: Path,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Check an adapter, and show its kind, ranks, size and figures."""
    from ..adapters.read import read_bundle

    bundle = read_bundle(adapter, trust=trust_of(trusted_keys, require_signature))
    ranks = sorted({delta.rank for delta in bundle.deltas.values() if delta.rank})
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "peft_type": bundle.config.get("peft_type"),
        "base": bundle.manifest.get("base", {}).get("name") or bundle.config.get("base_model_name_or_path"),
        "modules": len(bundle.deltas),
        "ranks": ranks or "dense",
        "bytes": bundle.bytes,
        "sha256": bundle.identity,
        "weights_sha256": bundle.digest,
        "signature": bundle.signed_by or ("not verified" if bundle.signature else "none"),
        "metrics": bundle.manifest.get("metrics", {}),
        "recipe": bundle.manifest.get("recipe", {}),
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for inner, part in value.items():
                print(f"  {inner}: {part}")
        else:
            print(f"{name}: {value}")


def stack(
    adapters: list[Path],
    output: Annotated[Path, typer.Option(help="The new adapter directory.")],
    strength: StrengthOption = None,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Write one adapter with the exact sum of the effects of several.

    Their ranks are concatenated.
    """
    from ..adapters.read import read_bundle
    from ..adapters.transform.merge import stack as stack_

    path = stack_(adapters, output, strength, trust=trust_of(trusted_keys, require_signature))
    print(f"adapter: {path} ({read_bundle(path).bytes / 1e6:.2f} MB)")


def merge(
    adapters: list[Path],
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: BaseOption = None,
    strength: StrengthOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Write the base with adapters added to its weights. A tied lm_head is untied where a delta meets it."""
    from ..adapters.transform.merge import merge as merge_

    trust = trust_of(trusted_keys, require_signature)
    path = merge_(load(base, adapters, dtype, device, None, trust), adapters, output, strength, trust=trust)
    print(f"merged model: {path}")


def export(
    adapters: list[Path],
    output: Annotated[Path, typer.Option(help="The new adapter directory.")],
    for_: Annotated[str, typer.Option("--for", help="The engine that is to load it: vllm.")] = "vllm",
    max_rank: Annotated[int, typer.Option(help="vLLM's --max-lora-rank: 1, 8, 16, 32, 64, 128, 256, 320 or 512.")] = 64,
    max_error: Annotated[
        float | None, typer.Option(help="Refuse where the rank limit takes more than this from a module, e.g. 0.01.")
    ] = None,
    strength: Annotated[list[float] | None, typer.Option("--strength", help="One for each adapter.")] = None,
    base: BaseOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Write a set of adapters as one LoRA for another engine.

    The sum is exact while the ranks together stay within --max-rank; beyond
    it, each module keeps its largest singular values and the error is told.
    Module names and shapes are checked against the base's config:

      unlearn-peft export out/hp out/acme --for vllm --output out/set
    """
    from ..adapters.transform.export_vllm import export_vllm

    if for_ != "vllm":
        raise UnlearnError(f"unknown engine '{for_}': expected --for vllm")
    trust = trust_of(trusted_keys, require_signature)
    made = export_vllm(
        adapters, output, strength, max_rank=max_rank, base=base_of(base, adapters, trust), dtype=dtype,
        max_error=max_error, trust=trust,
    )  # fmt: skip
    if as_json:
        worst = made.worst and {"module": made.worst[0], "relative_error": made.worst[1]}
        facts = {"path": str(made.path), "rank": made.rank, "bytes": made.bytes, "worst": worst}
        print(json.dumps({**facts, "relative_errors": made.errors}))
        return
    print(f"adapter: {made.path} (rank {made.rank}, {made.bytes / 1e6:.2f} MB)")
    if made.worst is None:
        print("the sum is exact")
    else:
        print(
            f"{len(made.errors)} modules were cut to rank {max_rank}; what is missing is up to "
            f"{100 * made.worst[1]:.3g} % of a module's change, in {made.worst[0]}"
        )


def shrink(
    adapter: Annotated[Path, typer.Argument(help="The adapter directory.")],
    output: Annotated[Path, typer.Option(help="The new adapter directory.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Keep so many singular values of each module.")] = None,
    quantize: Annotated[
        int | None, typer.Option(help="8 or 4 bits a weight. Then unlearn_peft alone can read it, not PEFT.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Refuse where a module's change would lose more than this, e.g. 0.05.")
    ] = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Write a smaller adapter with nearly the same effect.

      unlearn-peft shrink out/hp --rank 4 --output out/hp4

      unlearn-peft shrink out/hp --quantize 8 --output out/hp8bit

    An error is the Frobenius norm of what a module's change lost over that of
    the whole change. It says little about forgetting: measure that with
    `unlearn-peft eval`, as benchmarks/adapter_size.py did (docs/adapter_size.md).
    """
    from ..adapters.transform.shrink import shrink as shrink_

    made = shrink_(
        adapter, output, rank=rank, bits=quantize, max_error=max_error, trust=trust_of(trusted_keys, require_signature)
    )
    module, error = made.worst
    if as_json:
        print(json.dumps({**asdict(made), "path": str(made.path), "bytes": made.bytes}))
        return
    print(f"adapter: {made.path} ({made.bytes / 1e6:.3f} MB, before {made.before / 1e6:.3f} MB)")
    print(f"relative error of the modules' changes: mean {made.mean:.3g}, worst {error:.3g} in {module}")
