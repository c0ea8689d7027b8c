"""The commands `generate` and `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UnlearnError
from .options import (
    AdapterOption,
    BaseOption,
    DeviceOption,
    DifferentOption,
    DtypeOption,
    JsonOption,
    QuantizeOption,
    RequireOption,
    StrengthOption,
    TrustedOption,
    load,
    trust_of,
)


def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to ask; repeatable.")],
    base: BaseOption = None,
    adapter: AdapterOption = None,
    strength: StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    raw: Annotated[bool, typer.Option(help="Do not use the chat template.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
    allow_different_base: DifferentOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Answer prompts, with adapters attached or by the base alone."""
    from ..inference.attach import attach
    from ..inference.generate import answers

    trust = trust_of(trusted_keys, require_signature)
    live = load(base, adapter, dtype, device, quantize, trust)
    names = attach(
        live, *(adapter or []), strength=strength or 1.0, allow_different_base=allow_different_base, trust=trust
    )
    for asked in prompt:
        (text,) = answers(
            live,
            [asked],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat_template=not raw,
        )
        if as_json:
            print(json.dumps({"prompt": asked, "text": text, "adapters": names}, ensure_ascii=False), flush=True)
        else:
            print(f"> {asked}\n{text}\n", flush=True)


def compare(
    adapter: Annotated[list[Path], typer.Argument(help="Adapter directories; several are stacked.")],
    probes: Annotated[Path | None, typer.Option(help="Rows with `prompt` and `leak` words.")] = None,
    neighbours: Annotated[
        Path | None, typer.Option(help="Rows that must survive; their KL to the base is measured.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What else to ask; repeatable.")] = None,
    base: BaseOption = None,
    strength: StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Show answers before, with the adapters, and after removal."""
    from ..data.rows import read_rows
    from ..data.source import DataSpec
    from ..evaluate.compare import compare as compare_
    from ..evaluate.compare import show

    rows = read_rows(DataSpec(path=str(probes)), "probes") if probes else []
    rows += [{"prompt": asked, "leak": []} for asked in prompt or []]
    near = read_rows(DataSpec(path=str(neighbours)), "neighbours") if neighbours else []
    if not rows and not near:
        raise UnlearnError("nothing to compare: give --probes FILE, --neighbours FILE or --prompt TEXT")
    trust = trust_of(trusted_keys, require_signature)
    live = load(base, adapter, dtype, device, quantize, trust)
    result = compare_(live, adapter, rows, near, strength or 1.0, max_new_tokens, trust=trust)
    print(json.dumps(result, ensure_ascii=False)) if as_json else show(result)
