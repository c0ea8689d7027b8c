"""What the commands `tenant ...` share: their options, and how they reach the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PolicyError

if TYPE_CHECKING:
    from ..serve.policy.store import PolicyStore

StoreOption = Annotated[
    str,
    typer.Option(
        envvar="UNLEARN_PEFT_STORE",
        help="SQLite file, or URL such as postgresql://user@host/db; one with a password, better in the variable.",
    ),
]
WhoOption = Annotated[str | None, typer.Option(help="Who makes the change. Default: your user name.")]
WhyOption = Annotated[str, typer.Option(help="The reason, for the history.")]
TenantArgument = Annotated[str, typer.Argument(metavar="NAME", help="The tenant's name.")]
STORE = "tenants.db"


def open_store(store: str, create: bool = False) -> PolicyStore:
    """Open the store that an option names."""
    from ..serve.policy.store import PolicyStore

    return PolicyStore(store, create=create)


def edit(
    name: str, *arguments: object, done: str, store: str, who: str | None, why: str, as_json: bool, create: bool = False
) -> None:
    """Call a method of `PolicyStore` that edits it, and print what was done."""
    revision = getattr(open_store(store, create), name)(*arguments, who=user_name(who), why=why)
    print(json.dumps({"done": done, "revision": revision}) if as_json else f"{done} (revision {revision})")


def user_name(who: str | None) -> str:
    """Return who makes a change: whoever was given, or who runs this."""
    if who is not None:
        return who
    import getpass
    import os

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def parse_strength(text: str) -> tuple[str, float]:
    """Return the adapter and the strength of ADAPTER[=STRENGTH]."""
    adapter, equals, strength = text.partition("=")
    try:
        return adapter, float(strength) if equals else 1.0
    except ValueError:
        raise PolicyError(
            f"the strength '{strength}' is no number: write ADAPTER=0.5, or ADAPTER alone for 1"
        ) from None


def format_strengths(strengths: Mapping[str, float]) -> str:
    """Return adapters with their strengths, as the options take them."""
    return ", ".join(f"{name}={strength:g}" for name, strength in strengths.items()) or "nothing"
