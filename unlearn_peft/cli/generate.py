"""The commands `generate` and `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UnlearnError, printable
from . import options


def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="A prompt; repeatable.")],
    base: options.BaseOption = None,
    adapter: options.AdapterOption = None,
    strength: options.StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    raw: Annotated[bool, typer.Option(help="Without the chat template.")] = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantize: options.QuantizeOption = None,
    as_json: options.JsonOption = False,
    allow_different_base: options.DifferentOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Answer prompts, with adapters attached or by the base alone."""
    from ..inference.attach import attach
    from ..inference.generate import answers

    bundles = options.read_adapters(adapter, options.trust_of(trusted_keys, require_signature), strength)
    live = options.load(base, bundles, dtype, device, quantize)
    names = attach(live, *bundles, strength=strength or 1.0, allow_different_base=allow_different_base)
    for question in prompt:
        (text,) = answers(
            live, [question], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat_template=not raw
        )
        if as_json:
            facts = {"prompt": question, "text": text, "adapters": names}
            print(printable(json.dumps(facts, ensure_ascii=False)), flush=True)
        else:
            print(printable(f"> {question}\n{text}\n"), flush=True)


def compare(
    adapter: options.AdaptersArgument,
    probes: Annotated[Path | None, typer.Option(help="Rows with `prompt` and `leak` words.")] = None,
    neighbours: Annotated[
        Path | None, typer.Option(help="Rows near the target that must not change; their KL to the base is measured.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt beside the probes; repeatable.")
    ] = None,
    base: options.BaseOption = None,
    strength: options.StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantize: options.QuantizeOption = None,
    as_json: options.JsonOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Show answers before, with the adapters, and after removal."""
    from ..data.rows import read_rows
    from ..data.source import DataSpec
    from ..evaluate.compare import compare as compare_
    from ..evaluate.compare import show

    rows = read_rows(DataSpec(path=str(probes)), "probes") if probes else []
    rows += [{"prompt": text, "leak": []} for text in prompt or []]
    near = read_rows(DataSpec(path=str(neighbours)), "neighbours") if neighbours else []
    if not rows and not near:
        raise UnlearnError("nothing to compare: give --probes FILE, --neighbours FILE or --prompt TEXT")
    bundles = options.read_adapters(adapter, options.trust_of(trusted_keys, require_signature), strength)
    live = options.load(base, bundles, dtype, device, quantize)
    result = compare_(live, bundles, rows, near, strength or 1.0, max_new_tokens)
    print(printable(json.dumps(result, ensure_ascii=False))) if as_json else show(result)
