"""The commands `inspect`, `stack`, `export`, `merge` and `shrink`: adapter directories in, new ones out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UnlearnError, printable
from . import options


def inspect(
    adapter: options.AdapterArgument,
    as_json: options.JsonOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Check an adapter, and show its kind, ranks, size and figures."""
    (bundle,) = options.read_adapters([adapter], options.trust_of(trusted_keys, require_signature))
    ranks = sorted({delta.rank for delta in bundle.deltas.values() if delta.rank})
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "peft_type": bundle.config.get("peft_type"),
        "base": bundle.manifest.get("base", {}).get("name") or bundle.config.get("base_model_name_or_path"),
        "modules": len(bundle.deltas),
        "base_weights": f"{bundle.carried}, compared when attached" if bundle.base_weights else "none",
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
                print(printable(f"  {inner}: {part}", lines=False))
        else:
            print(printable(f"{name}: {value}", lines=False))


def stack(
    adapters: options.AdaptersArgument,
    output: options.NewAdapterOption,
    strength: options.StrengthOption = None,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Write one adapter with the exact sum of the effects of several.

    Their ranks are added up.
    """
    from ..adapters.read import read_bundle
    from ..adapters.transform.merge import stack as stack_

    path = stack_(adapters, output, strength, trust=options.trust_of(trusted_keys, require_signature))
    print(f"adapter: {path} ({read_bundle(path).bytes / 1e6:.2f} MB)")


def merge(
    adapters: options.AdaptersArgument,
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: options.BaseOption = None,
    strength: options.StrengthOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Write the base with adapters added to its weights. A tied lm_head is untied if an adapter changes it."""
    from ..adapters.transform.merge import merge as merge_

    trust = options.trust_of(trusted_keys, require_signature)
    live = options.load(base, options.read_adapters(adapters, trust, strength), dtype, device)
    print(f"merged model: {merge_(live, adapters, output, strength, trust=trust)}")


def export(
    adapters: options.AdaptersArgument,
    output: options.NewAdapterOption,
    for_: Annotated[str, typer.Option("--for", help="The engine that will load it: vllm.")] = "vllm",
    max_rank: Annotated[int, typer.Option(help="vLLM's --max-lora-rank: 1, 8, 16, 32, 64, 128, 256, 320 or 512.")] = 64,
    max_error: Annotated[
        float | None, typer.Option(help="Refuse if a module's relative error is larger, e.g. 0.01.")
    ] = None,
    strength: options.StrengthOption = None,
    base: options.BaseOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: options.JsonOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Write a set of adapters as one LoRA for another engine.

    The sum is exact while the ranks add up to --max-rank at most; beyond
    that, each module keeps its largest singular values and the relative error
    is printed. Module names and shapes are checked against the base's config:

      unlearn-peft export out/hp out/acme --for vllm --output out/set
    """
    from ..adapters.transform.export_vllm import export_vllm

    if for_ != "vllm":
        raise UnlearnError(f"unknown engine '{for_}': expected --for vllm")
    trust = options.trust_of(trusted_keys, require_signature)
    base = options.base_of(base, options.read_adapters(adapters, trust, strength))
    exported = export_vllm(
        adapters, output, strength, max_rank=max_rank, base=base, dtype=dtype, max_error=max_error, trust=trust
    )
    if as_json:
        worst = exported.worst and {"module": exported.worst[0], "relative_error": exported.worst[1]}
        facts = {"path": str(exported.path), "rank": exported.rank, "bytes": exported.bytes, "worst": worst}
        print(json.dumps({**facts, "relative_errors": exported.errors}))
        return
    print(f"adapter: {exported.path} (rank {exported.rank}, {exported.bytes / 1e6:.2f} MB)")
    if exported.worst is None:
        print("the sum is exact")
    else:
        print(
            f"{len(exported.errors)} modules were cut to rank {max_rank}; what is missing is up to "
            f"{100 * exported.worst[1]:.3g} % of a module's change, in {exported.worst[0]}"
        )


def shrink(
    adapter: options.AdapterArgument,
    output: options.NewAdapterOption,
    rank: Annotated[int | None, typer.Option(min=1, help="Number of singular values to keep of each module.")] = None,
    quantize: Annotated[int | None, typer.Option(help="8 or 4 bits a weight. PEFT itself cannot read these.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Refuse if a module's relative error is larger, e.g. 0.05.")
    ] = None,
    as_json: options.JsonOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Write a smaller adapter with nearly the same effect.

      unlearn-peft shrink out/hp --rank 4 --output out/hp4

      unlearn-peft shrink out/hp --quantize 8 --output out/hp8bit

    A relative error is the Frobenius norm of what a module's change lost,
    divided by that of the whole change. It says little about forgetting:
    measure that with `unlearn-peft eval` (docs/adapter_size.md shows how).
    """
    from ..adapters.transform.shrink import shrink as shrink_

    trust = options.trust_of(trusted_keys, require_signature)
    shrunk = shrink_(adapter, output, rank=rank, bits=quantize, max_error=max_error, trust=trust)
    module, error = shrunk.worst
    if as_json:
        print(json.dumps({**asdict(shrunk), "path": str(shrunk.path), "bytes": shrunk.bytes}))
        return
    print(f"adapter: {shrunk.path} ({shrunk.bytes / 1e6:.3f} MB, before {shrunk.before / 1e6:.3f} MB)")
    print(f"relative error of the modules' changes: mean {shrunk.mean:.3g}, worst {error:.3g} in {module}")
