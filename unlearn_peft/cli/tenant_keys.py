"""The commands `tenant key`, `tenant trust` and `tenant untrust`: whose key is what, and which signatures count."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PolicyError
from .options import JsonOption
from .tenant_store import STORE, StoreOption, TenantArgument, WhoOption, WhyOption, edit, open_store, user_name


def key(
    name: TenantArgument,
    revoke: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Revoke this key: itself, its name, or 8 or more digits of its sha256."),
    ] = None,
    key_name: Annotated[str | None, typer.Option("--name", help="A name for the new key.")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="When it ends: 90d, 12h, or a time (UTC) as 2027-01-31.")
    ] = None,
    scopes: Annotated[
        str | None,
        typer.Option(metavar="add,logprobs,playground", help="What it may do beside asking; `none`. Default: all."),
    ] = None,
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make an API key for a tenant and print it, once: the store has only its sha256.

    unlearn-peft tenant key acme

    unlearn-peft tenant key acme --name laptop --expires 90d --scopes add,logprobs

    unlearn-peft tenant key acme --revoke 9f86d081 --why 'leaked'
    """
    if revoke is not None:
        done = f"a key of tenant '{name}' revoked"
        return edit("revoke_key", name, revoke, done=done, store=store, who=who, why=why, as_json=as_json)
    from ..serve.policy.policy import key_digest

    settings = {
        "name": key_name, "expires": expires,
        "scopes": scopes if scopes is None else [scope.strip() for scope in scopes.split(",")] * (scopes != "none"),
    }  # fmt: skip
    api_key = open_store(store).add_key(name, settings, who=user_name(who), why=why)
    print(json.dumps({"tenant": name, "key": api_key, "sha256": key_digest(api_key)}) if as_json else api_key)
    if not as_json:
        print(f"this key is not shown again; its sha256 begins with {key_digest(api_key)[:12]}", file=sys.stderr)


def trust(
    name: TenantArgument,
    keys: Annotated[list[Path], typer.Argument(help="Public keys: .pub files, folders, or YAML (NAME: KEY.pub).")],
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Apply adapters for a tenant only if one of these keys has signed them; other requests are refused (503).

    The keys themselves are stored, under the names of their files, beside those that the tenant trusts already.

      unlearn-peft tenant trust acme keys/alice.pub --why 'contract 12'
    """
    from ..adapters.trust import Identity, Trust

    signers = Trust.read(*keys).signers
    pems = {key: pem.decode() for key, pem in signers.items() if not isinstance(pem, Identity)}
    if other := [key for key in signers if key not in pems]:
        raise PolicyError(f"'{other[0]}' is an identity of Sigstore: a policy takes public keys only")
    done = f"tenant '{name}' trusts {', '.join(pems)}"
    edit("trust", name, pems, done=done, store=store, who=who, why=why, as_json=as_json)


def untrust(
    name: TenantArgument,
    key: Annotated[str | None, typer.Argument(help="The key's name, as `show` prints it.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Remove all keys: this tenant's adapters then need no signature.")
    ] = False,
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Remove a key that a tenant trusts; the last one only with --all.

    unlearn-peft tenant untrust acme alice --why 'key lost'
    """
    if (key is None) != every:
        raise PolicyError("which key? Give its name, or --all to ask for no signatures any more")
    done = f"tenant '{name}' " + ("asks for no signatures" if every else f"no longer trusts '{key}'")
    edit("untrust", name, key, done=done, store=store, who=who, why=why, as_json=as_json)
