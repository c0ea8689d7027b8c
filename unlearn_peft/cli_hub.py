"""`unlearn-peft push`, `pull` and `shrink`: adapters to and from elsewhere, and smaller."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import JsonOption, RequireOption, TrustedOption, trust_of

EndpointOption = Annotated[str | None, typer.Option(help="Another Hub. Default: HF_ENDPOINT, else huggingface.co.")]


def pull(
    source: Annotated[
        str, typer.Argument(help=r"hub:OWNER/NAME\[@REVISION], https://...#sha256=..., archive, folder.")
    ],
    output: Annotated[Path | None, typer.Option(help="The adapter directory. Default: in the cache.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no server: the cache only. So does HF_HUB_OFFLINE=1.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow http:// and archives without #sha256=. Unsafe.")
    ] = False,
    max_size: Annotated[float, typer.Option(min=0.001, help="MB, for all files of the adapter, unpacked.")] = 1000,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Get an adapter from the Hub, a mirror or an archive, and check it.

    The folder appears when everything has been checked, and its path is
    printed; NAME.source.json beside it says where it is from, with the commit:

      unlearn-peft pull hub:acme/forgets-hp --output out/hp

      unlearn-peft pull hub:acme/forgets-hp@0d1c2b3a... --offline

      unlearn-peft pull https://example.org/hp.tar.gz#sha256=9f86d081...

      unlearn-peft generate --adapter $(unlearn-peft pull hp.tar.gz) --prompt ...

    A broken download goes on where it broke. Only an adapter's own files are
    taken: weights, config, manifest, card, plots, licence, signature.
    """
    from .adapters.hub.pull import pull as pull_

    pulled = pull_(
        source, output, offline=offline or None, trust=trust_of(trusted_keys, require_signature), insecure=insecure,
        max_bytes=int(max_size * 1e6), endpoint=endpoint,
    )  # fmt: skip
    _tell(pulled, as_json)
    if not as_json:
        print(pulled.path)


def push(
    adapter: Annotated[Path, typer.Argument(help="The adapter directory.")],
    target: Annotated[str, typer.Argument(help=r"hub:OWNER/NAME\[@BRANCH], an archive (.tar, .tar.gz), or a folder.")],
    public: Annotated[bool, typer.Option("--public", help="A repository made now is for all to see.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Put an adapter onto the Hub, or into an archive; it is checked before.

    What is printed is what to pull: with the commit, or the archive's sha256.
    A token is taken from HF_TOKEN or `hf auth login`. The card and manifest
    hold no forget row, but the name of a repository or folder is seen by all:

      unlearn-peft push out/hp hub:acme/forgets-hp

      unlearn-peft push out/hp hp.tar.gz
    """
    from .adapters.hub.push import push as push_

    pushed = push_(
        adapter, target, private=not public, message=message, endpoint=endpoint,
        trust=trust_of(trusted_keys, require_signature),
    )  # fmt: skip
    _tell(pushed, as_json)
    if not as_json:
        print(pushed.source + (f"#sha256={pushed.sha256}" if pushed.sha256 else ""))


def _tell(pulled: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(pulled), "path": str(pulled.path)}))
        return
    facts = [("commit", pulled.commit), ("sha256 of the archive", pulled.sha256), ("signed by", pulled.signed_by)]
    for name, value in [("identity", pulled.identity), *facts]:
        if value:
            print(f"{name}: {value}", file=sys.stderr)


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
    """Write a smaller adapter with nearly the same effect, and tell what it lost.

      unlearn-peft shrink out/hp --rank 4 --output out/hp4

      unlearn-peft shrink out/hp --quantize 8 --output out/hp8bit

    An error is the Frobenius norm of what a module's change lost over that of
    the whole change. It says little about forgetting: measure that with
    `unlearn-peft eval`, as benchmarks/adapter_size.py did (docs/adapter_size.md).
    """
    from .adapters.transform.shrink import shrink as shrink_

    made = shrink_(
        adapter, output, rank=rank, bits=quantize, max_error=max_error, trust=trust_of(trusted_keys, require_signature)
    )
    module, error = made.worst
    if as_json:
        print(json.dumps({**asdict(made), "path": str(made.path), "bytes": made.bytes}))
        return
    print(f"adapter: {made.path} ({made.bytes / 1e6:.3f} MB, before {made.before / 1e6:.3f} MB)")
    print(f"relative error of the modules' changes: mean {made.mean:.3g}, worst {error:.3g} in {module}")


def add_hub(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("push")(push)
    app.command("pull")(pull)
    app.command("shrink")(shrink)
