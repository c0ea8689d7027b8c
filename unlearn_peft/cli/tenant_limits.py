"""The commands `tenant quota` and `tenant prefix-cache`: what a tenant's requests take of the server."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .options import JsonOption
from .tenant_store import STORE, StoreOption, TenantArgument, WhoOption, WhyOption, edit


def quota(
    name: TenantArgument,
    requests: Annotated[str | None, typer.Option(metavar="N/minute", help="Requests; `none` removes it.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N/day", help="Tokens, read and generated.")] = None,
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Limit a tenant's requests and tokens in a second, minute, hour or day; beyond that it gets 429.

    unlearn-peft tenant quota acme --requests 60/minute --tokens 1000000/day
    """
    given = {kind: value for kind, value in (("requests", requests), ("tokens", tokens)) if value is not None}
    done = f"tenant '{name}' has the quotas " + ", ".join(f"{kind} {value}" for kind, value in given.items())
    changes = {kind: None if value == "none" else value for kind, value in given.items()}
    edit("quota", name, changes, done=done, store=store, who=who, why=why, as_json=as_json)


def prefix_cache(
    name: TenantArgument,
    state: Annotated[Literal["on", "off"], typer.Argument(help="`on` is the default.")],
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Keep what a tenant's prompts begin with for its next ones, or not.

    With `on`, a system prompt that many requests share is read once for each set of adapters. With `off`, from the next
    request on, each prompt is read whole, and nothing of it stays in memory after its answer. Other tenants never get
    what is kept.

      unlearn-peft tenant prefix-cache acme off
    """
    done = f"prefix cache of tenant '{name}': {state}"
    edit("prefix_cache", name, state == "on", done=done, store=store, who=who, why=why, as_json=as_json)
