"""`unlearn-peft tenant ...`: who must have what forgotten, in a store that records every change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterError, PolicyError
from .options import JsonOption

if TYPE_CHECKING:
    from ..serve.policy.store import PolicyStore


app = typer.Typer(
    no_args_is_help=True,
    help="Say which tenant must have which adapters forgotten.\n\n"
    "A tenant is whoever has an API key. All is kept in a store (an SQLite file, or a database for several servers), "
    "where a running server sees a change at its next request, and every change stays on record: who, when, what, "
    "why.\n\n"
    "  unlearn-peft tenant adapter hp out/harry_potter\n\n"
    "  unlearn-peft tenant add acme --why 'contract 12'\n\n"
    "  unlearn-peft tenant forget acme hp\n\n"
    "  unlearn-peft tenant key acme\n\n"
    "  unlearn-peft tenant history",
)

StoreOption = Annotated[
    str,
    typer.Option(
        envvar="UNLEARN_PEFT_STORE",
        help="SQLite file, or URL such as postgresql://user@host/db; with a password, better in the variable.",
    ),
]
WhoOption = Annotated[str | None, typer.Option(help="Who makes the change. Default: the user of this machine.")]
WhyOption = Annotated[str, typer.Option(help="The reason, for the history.")]
TenantArgument = Annotated[str, typer.Argument(metavar="NAME", help="The tenant's name.")]
_STORE = "tenants.db"


@app.command()
def add(
    name: TenantArgument, store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Add a tenant, which then has nothing forgotten and no key.

    The store is made if it is not there.

      unlearn-peft tenant add acme --why 'contract 12'
    """
    revision = _open(store, create=True).add(name, who=_who(who), why=why)
    _told(f"tenant '{name}' added", revision, as_json)


@app.command()
def remove(
    name: TenantArgument, store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Remove a tenant and its keys; nobody is served under them any more.

    unlearn-peft tenant remove acme --why 'contract ended'
    """
    revision = _open(store).remove(name, who=_who(who), why=why)
    _told(f"tenant '{name}' removed", revision, as_json)


@app.command("list")
def list_(store: StoreOption = _STORE, as_json: JsonOption = False) -> None:
    """List tenants and adapters.

    unlearn-peft tenant list --json
    """
    policy = _open(store).current()
    if as_json:
        tenants = {name: _tenant(entry) for name, entry in policy.tenants.items()}
        print(json.dumps({**policy.model_dump(mode="json"), "tenants": tenants, "version": policy.version}))
        return
    for name, entry in policy.tenants.items():
        print(f"tenant {name}: forgets {_set(entry.forget)}; keys: {len(entry.keys)}")
    for name, adapter in policy.adapters.items():
        print(f"adapter {name}: {adapter.path} ({adapter.sha256 or 'any content'})")


@app.command()
def show(name: TenantArgument, store: StoreOption = _STORE, as_json: JsonOption = False) -> None:
    """Show what a tenant has forgotten, whose signatures it trusts, and the first digits of its keys' sha256.

    unlearn-peft tenant show acme
    """
    from ..serve.policy.edits import unknown

    tenants = _open(store).current().tenants
    if name not in tenants:
        raise unknown("tenant", name, tenants)
    facts = {"tenant": name, **_tenant(tenants[name])}
    if as_json:
        print(json.dumps(facts))
        return
    print(f"tenant {name} forgets {_set(facts['forget'])}")
    for key in facts["keys"]:
        print(f"key {key}...")
    for key, digest in facts.get("trusted_keys", {}).items():
        print(f"trusts {key} ({digest}...)")


@app.command()
def forget(
    name: TenantArgument,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER[=STRENGTH]", help="1 is as trained.")],
    store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Have an adapter forgotten for a tenant, or change its strength.

    unlearn-peft tenant forget acme hp --why 'ticket 4711'

    unlearn-peft tenant forget acme news=0.5
    """
    adapter, equals, text = adapter.partition("=")
    try:
        strength = float(text) if equals else 1.0
    except ValueError:
        raise PolicyError(f"the strength '{text}' is no number: write ADAPTER=0.5, or ADAPTER alone for 1") from None
    revision = _open(store).forget(name, adapter, strength, who=_who(who), why=why)
    _told(f"tenant '{name}' forgets '{adapter}' at strength {strength:g}", revision, as_json)


@app.command()
def unforget(
    name: TenantArgument, adapter: str, store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Have an adapter no longer forgotten for a tenant.

    unlearn-peft tenant unforget acme news --why 'withdrawn'
    """
    revision = _open(store).unforget(name, adapter, who=_who(who), why=why)
    _told(f"tenant '{name}' no longer forgets '{adapter}'", revision, as_json)


@app.command("adapter")
def adapter_(
    name: Annotated[str, typer.Argument(help="What tenants call it.")],
    path: Annotated[Path, typer.Argument(help="Its directory, the same on every server.")],
    sha256: Annotated[str | None, typer.Option(help="What it must be, as `inspect` tells it.")] = None,
    store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Name an adapter, or put another into a name's place.

    It is read and checked now, and its sha256 (over weights and config, as `unlearn-peft inspect` tells it) is pinned:
    a server refuses whatever else comes to lie at this path until it is named again.

      unlearn-peft tenant adapter hp out/harry_potter
    """
    from ..adapters.read import read_bundle

    digest = read_bundle(path).identity
    if sha256 is not None and sha256.lower() != digest:
        raise AdapterError(f"the adapter {path} has the sha256 {digest}, not the one given: copy it again")
    revision = _open(store, create=True).adapter(name, path, digest, who=_who(who), why=why)
    _told(f"adapter '{name}' is {path.absolute()} ({digest})", revision, as_json)


@app.command()
def unadapter(
    name: str, store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False
) -> None:
    """Take an adapter's name away; refused while a tenant has it forgotten. Its files stay.

    unlearn-peft tenant unadapter hp
    """
    revision = _open(store).unadapter(name, who=_who(who), why=why)
    _told(f"adapter '{name}' taken away", revision, as_json)


@app.command()
def key(
    name: TenantArgument,
    revoke: Annotated[
        str | None, typer.Option(metavar="KEY", help="Take a key away: 8 or more digits of its sha256, or the key.")
    ] = None,
    store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make an API key for a tenant and print it, once: only its sha256 is kept.

    unlearn-peft tenant key acme

    unlearn-peft tenant key acme --revoke 9f86d081 --why 'leaked'
    """
    if revoke is not None:
        revision = _open(store).revoke_key(name, revoke, who=_who(who), why=why)
        _told(f"a key of tenant '{name}' revoked", revision, as_json)
        return
    from ..serve.policy.policy import key_digest

    made = _open(store).add_key(name, who=_who(who), why=why)
    print(json.dumps({"tenant": name, "key": made, "sha256": key_digest(made)}) if as_json else made)
    if not as_json:
        print(f"shown this once; known as {key_digest(made)[:12]}", file=sys.stderr)


@app.command()
def trust(
    name: TenantArgument,
    keys: Annotated[list[Path], typer.Argument(help="Public keys: .pub files, folders, or YAML (NAME: KEY.pub).")],
    store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Apply no adapter for a tenant that none of these keys has signed.

    A request that needs one without such a signature is refused (503). The keys themselves go into the store, under
    their files' names, so that all servers have the same; those that the tenant trusts already stay.

      unlearn-peft tenant trust acme keys/alice.pub --why 'contract 12'
    """
    from ..adapters.trust import Identity, Trust

    signers = Trust.read(*keys).signers
    pems = {key: one.decode() for key, one in signers.items() if not isinstance(one, Identity)}
    if other := [key for key in signers if key not in pems]:
        raise PolicyError(f"'{other[0]}' is an identity of Sigstore: a policy takes public keys only")
    revision = _open(store).trust(name, pems, who=_who(who), why=why)
    _told(f"tenant '{name}' trusts {', '.join(pems)}", revision, as_json)


@app.command()
def untrust(
    name: TenantArgument,
    key: Annotated[str | None, typer.Argument(help="The key's name, as `show` tells it.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Take all keys away: adapters need no signature then, for this tenant.")
    ] = False,
    store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Take a trusted key away from a tenant; the last one goes only with --all.

    unlearn-peft tenant untrust acme alice --why 'key lost'
    """
    if (key is None) != every:
        raise PolicyError("which key? Give its name, or --all to ask for no signatures any more")
    revision = _open(store).untrust(name, key, who=_who(who), why=why)
    _told(f"tenant '{name}' " + ("asks for no signatures" if every else f"no longer trusts '{key}'"), revision, as_json)


@app.command()
def history(
    limit: Annotated[int | None, typer.Option(min=1, help="Only the newest.")] = None,
    store: StoreOption = _STORE, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show every change, the newest first: who, when (UTC), what, why.

    unlearn-peft tenant history --limit 10

    unlearn-peft tenant history --json | jq 'select(.what.tenant == "acme")'
    """
    for change in _open(store).history(limit):
        if as_json:
            print(json.dumps(vars(change)))
        else:
            why = f" # {change.why}" if change.why else ""
            print(f"{change.revision} {change.at} {change.who}: {change.action} {json.dumps(change.what)}{why}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A policy in YAML.")],
    store: StoreOption = _STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Put a YAML policy into the place of ALL that is in the store, in one change.

    unlearn-peft tenant import policy.yaml --why 'moved from the file'
    """
    from ..serve.policy.yaml_file import read_policy

    policy = read_policy(file)
    revision = _open(store, create=True).replace(policy, who=_who(who), why=why)
    _told(f"{len(policy.tenants)} tenants and {len(policy.adapters)} adapters imported", revision, as_json)


@app.command()
def export(
    output: Annotated[Path | None, typer.Option(help="Write it here, as a whole, instead of printing it.")] = None,
    store: StoreOption = _STORE,
) -> None:
    """Print the store as a YAML policy, which `import` and `serve --policy` take. It holds no key, only their sha256.

    unlearn-peft tenant export --output policy.yaml
    """
    from ..files.atomic import atomic_file
    from ..serve.policy.yaml_file import dump_policy

    text = dump_policy(_open(store).current())
    if output is None:
        print(text, end="")
        return
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _open(store: str, create: bool = False) -> PolicyStore:
    from ..serve.policy.store import PolicyStore

    return PolicyStore(store, create=create)


def _who(who: str | None) -> str:
    if who is not None:
        return who
    import getpass
    import os

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def _told(text: str, revision: int, as_json: bool) -> None:
    print(json.dumps({"done": text, "revision": revision}) if as_json else f"{text} (revision {revision})")


def _tenant(entry: Any) -> dict[str, Any]:
    from ..serve.policy.edits import fingerprint

    trusted = {name: fingerprint(pem) for name, pem in (entry.trusted_keys or {}).items()}
    facts = {"forget": entry.forget, "keys": [digest[:12] for digest in entry.keys]}
    return {**facts, **({"trusted_keys": trusted} if trusted else {})}


def _set(forget: dict[str, float]) -> str:
    return ", ".join(f"{name}={strength:g}" for name, strength in forget.items()) or "nothing"
