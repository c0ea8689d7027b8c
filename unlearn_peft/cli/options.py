"""Options and arguments that several commands have, and the adapters and the base that these name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BaseModelError, UnlearnError, safe_repr

if TYPE_CHECKING:
    from ..adapters.bundle import Bundle
    from ..adapters.trust import Trust

AdapterArgument = Annotated[Path, typer.Argument(help="Adapter directory.")]
AdaptersArgument = Annotated[list[Path], typer.Argument(help="Adapter directories; several are stacked.")]
AdapterOption = Annotated[list[Path] | None, typer.Option("--adapter", help="Adapter directory; repeat to stack.")]
NewAdapterOption = Annotated[Path, typer.Option("--output", help="The new adapter directory.")]
StrengthOption = Annotated[
    list[float] | None, typer.Option("--strength", help="Factor on an adapter's effect, one for each; 1 is as trained.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="Hub id, local folder, .gguf file, or 'demo'. Default: the adapter's own base, else demo."),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="int8, llm_int8 or nf4: fewer bits a weight; needs unlearn-peft[quantized].")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DifferentOption = Annotated[
    bool,
    typer.Option(
        "--allow-different-base", help="Attach even if the base's fingerprint differs, with a warning. Unsafe."
    ),
]
TrustedOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-keys",
        envvar="UNLEARN_PEFT_TRUSTED_KEYS",
        help="Public keys: a .pub file, a folder, or YAML (NAME: KEY.pub); repeatable. Signatures are then verified.",
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


_PLACES = ("base", "retrained", "policy", "store", "source", "target")  # texts that may be paths


def checked(command: Callable[..., None] | None) -> Callable[..., None] | None:
    """Let a command expand `~` in every path (no shell does that in `--output=~/x`), and refuse impossible values."""
    if command is None:
        return None

    def check(name: str, value: Any) -> Any:
        from ..files.validation import check_value

        if isinstance(value, (list, tuple)):
            return [check(name, one) for one in value]
        is_path = isinstance(value, Path)
        try:
            check_value(str(value) if is_path else value)
        except ValueError as error:
            raise UnlearnError(f"'{name.strip('_')}': {error}") from None
        if is_path or (name in _PLACES and isinstance(value, str)):
            return type(value)(os.path.expanduser(value))
        return value

    @wraps(command)
    def run(**values: Any) -> None:
        try:
            command(**{name: check(name, value) for name, value in values.items()})
        except typer.Abort:  # a prompt without a terminal, or left by Ctrl-D
            raise UnlearnError("nothing was entered at the prompt: it needs a terminal") from None

    return run


def trust_of(trusted_keys: list[Path] | None, require_signature: bool) -> Trust | None:
    """Return the accepted signers; None: signatures are not checked.

    Raises:
        TrustError: if a signature is required without trusted keys, or keys cannot be read.
    """
    if not trusted_keys and not require_signature:
        return None
    from ..adapters.trust import Trust

    return Trust.read(*(trusted_keys or ()), required=require_signature)


def read_adapters(
    paths: Sequence[Path] | None, trust: Trust | None, strengths: Sequence[float] | None = None
) -> list[Bundle]:
    """Read and check adapters, and that each has a strength, before a base is loaded."""
    from ..adapters.read import read_bundle
    from ..adapters.validate import check_strengths

    check_strengths(strengths or 1.0, len(paths or ()))
    return [read_bundle(path, trust=trust) for path in paths or ()]


def load(base: str | None, adapters: Sequence[Bundle], dtype: str, device: str, quantize: str | None = None) -> Any:
    """Load the named base, or the one that the first adapter was trained on; it is asked as that adapter was trained.

    Raises:
        UnlearnError: if the adapters were trained with different prompt formats.
    """
    from ..models.base import load_base

    formats = {bundle.prompt_format for bundle in adapters}
    if len(formats) > 1:
        raise UnlearnError("the adapters were trained with different prompt formats: use them one by one")
    live = load_base(base_of(base, adapters), dtype, device, quantize)
    live.prompt_format = next(iter(formats), None)
    return live


def base_of(base: str | None, adapters: Sequence[Bundle] = ()) -> str:
    """Return the name of the base to load: `base`, else the one that the first adapter was trained on, else `demo`.

    Raises:
        BaseModelError: that one is a local folder, recorded as seen from where the adapter was made, and not found.
    """
    from ..models.base import DEMO_HUB_ID

    if base is None and adapters:
        base = adapters[0].manifest.get("base", {}).get("name") or adapters[0].config.get("base_model_name_or_path")
        if base is not None and str(base).startswith("."):
            return _base_beside(str(base), adapters[0].path)
    if base is None or base == DEMO_HUB_ID:
        return "demo"  # the same model, and without the network where its wheel is installed
    return str(base)


def _base_beside(base: str, adapter: Path) -> str:
    """Find a base that an adapter names by a relative path: from here, or from a folder that the adapter is in."""
    for folder in (Path(), *adapter.absolute().parents):
        if (folder / base / "config.json").is_file():
            return str(folder / base)
    raise BaseModelError(
        f"the adapter {adapter} was trained on the base in the folder {safe_repr(base)}, which is found neither from "
        "here nor from the adapter's own place: name its place now with --base"
    )
