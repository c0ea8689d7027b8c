"""The command `export`: a set of adapters as one LoRA for another engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import BaseOption, JsonOption, RequireOption, TrustedOption, base_of, trust_of
from .errors import UnlearnError


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
    """Write one LoRA with the effect of a set of adapters, for another engine.

    The sum is exact while the ranks together stay within --max-rank; beyond
    it, each module keeps its largest singular values and the error is told.
    Module names and shapes are checked against the base's config:

      unlearn-peft export out/hp out/acme --for vllm --output out/set
    """
    from .adapters.transform.export_vllm import export_vllm

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
