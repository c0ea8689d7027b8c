"""The commands `tenant ...`: which adapters each tenant forgets, in a store that records every change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from . import tenant_keys, tenant_limits
from .options import JsonOption
from .tenant_store import (
    STORE,
    StoreOption,
    TenantArgument,
    WhoOption,
    WhyOption,
    edit,
    format_strengths,
    open_store,
    parse_strength,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Say which adapters each tenant forgets.\n\n"
    "A tenant is whoever has one of its API keys. The policy is in a store (an SQLite file, or a database for several "
    "servers): a running server sees a change at its next request, and the history records every change: who, when, "
    "what, why.\n\n"
    "  unlearn-peft tenant adapter hp out/harry_potter\n\n"
    "  unlearn-peft tenant add acme --why 'contract 12'\n\n"
    "  unlearn-peft tenant forget acme hp\n\n"
    "  unlearn-peft tenant key acme\n\n"
    "  unlearn-peft tenant history",
)


@app.command()
def add(
    name: TenantArgument, store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Add a tenant that forgets nothing and has no key yet. The store is made if it does not exist.

    unlearn-peft tenant add acme --why 'contract 12'
    """
    edit("add", name, done=f"tenant '{name}' added", store=store, who=who, why=why, as_json=as_json, create=True)


@app.command()
def remove(
    name: TenantArgument, store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Remove a tenant and its keys: they are refused from now on.

    unlearn-peft tenant remove acme --why 'contract ended'
    """
    edit("remove", name, done=f"tenant '{name}' removed", store=store, who=who, why=why, as_json=as_json)


@app.command("list")
def list_(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """List tenants and adapters.

    unlearn-peft tenant list --json
    """
    from ..serve.policy.edits import summary

    policy = open_store(store).read_all()
    if as_json:
        content = policy.dump()
        tenants = {name: summary(entry) for name, entry in content["tenants"].items()}
        print(json.dumps({**content, "tenants": tenants, "version": policy.version}))
        return
    for name, entry in policy.tenants.items():
        may_add = f"; may add {format_strengths(entry.may_add)}" if entry.may_add else ""
        print(f"tenant {name}: forgets {format_strengths(entry.forget)}{may_add}; keys: {len(entry.keys)}")
    for name, adapter in policy.adapters.items():
        canary = f"; canary: {adapter.canary or 'refuse'}, {probes}" if (probes := adapter.probes_path) else ""
        print(f"adapter {name}: {adapter.path} ({adapter.sha256 or 'any content'}){canary}")


@app.command()
def show(name: TenantArgument, store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Show a tenant: what it forgets and may add, the keys that it trusts, the first digits of its API keys' sha256.

    unlearn-peft tenant show acme
    """
    from ..serve.policy.edits import summary

    opened = open_store(store)
    facts = {"tenant": name, **summary(opened.tenant(name), opened.key_uses(name))}
    if as_json:
        print(json.dumps(facts))
        return

    def say(line: str) -> None:
        print(printable(line, lines=False))  # a database may hold anything

    say(f"tenant {name} forgets {format_strengths(facts['forget'])}")
    if may_add := facts.get("may_add"):
        say(f"its requests may add {format_strengths(may_add)} at most")
    for kind, value in facts.get("quotas", {}).items():
        say(f"quota of {kind}: {value}")
    if not facts.get("prefix_cache", True):
        say("nothing is kept of its prompts (prefix-cache off)")
    for key in facts["keys"]:
        given = facts.get("key_settings", {}).get(key, {})
        scopes = given.get("scopes")
        parts = [
            f"key {key}..." + (f" {given['name']}" if "name" in given else ""),
            *([f"ends {given['expires']}"] if "expires" in given else []),
            *([f"may {', '.join(scopes) or 'only ask'}"] if scopes is not None else []),
            *([f"last used {used}"] if (used := facts.get("key_uses", {}).get(key)) else []),
        ]
        say("; ".join(parts))
    for key, digest in facts.get("trusted_keys", {}).items():
        say(f"trusts {key} ({digest}...)")


@app.command()
def forget(
    name: TenantArgument,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER[=STRENGTH]", help="1 is as trained.")],
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make a tenant forget an adapter, or change the strength.

    unlearn-peft tenant forget acme hp --why 'ticket 4711'

    unlearn-peft tenant forget acme news=0.5
    """
    adapter, strength = parse_strength(adapter)
    done = f"tenant '{name}' forgets '{adapter}' at strength {strength:g}"
    edit("forget", name, adapter, strength, done=done, store=store, who=who, why=why, as_json=as_json)


@app.command()
def unforget(
    name: TenantArgument, adapter: str, store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Stop forgetting an adapter for a tenant.

    unlearn-peft tenant unforget acme news --why 'withdrawn'
    """
    done = f"tenant '{name}' no longer forgets '{adapter}'"
    edit("unforget", name, adapter, done=done, store=store, who=who, why=why, as_json=as_json)


@app.command()
def allow(
    name: TenantArgument,
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER[=STRENGTH]", help="With the greatest strength, 1 is as trained.")
    ],
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Let a tenant's requests add an adapter to its set, up to a strength; they may add nothing else.

    An adapter that was trained to oppose can bring a fact back: give the tenant's adapters probes (`tenant adapter
    --probes`), so that such a set is refused, or try what you allow with the tenant's set.

      unlearn-peft tenant allow acme news

      unlearn-peft tenant allow acme hp=1.5 --why 'may be stronger'
    """
    adapter, strength = parse_strength(adapter)
    done = f"requests of tenant '{name}' may add '{adapter}' up to strength {strength:g}"
    edit("allow", name, adapter, strength, done=done, store=store, who=who, why=why, as_json=as_json)


@app.command()
def disallow(
    name: TenantArgument, adapter: str, store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Let a tenant's requests add an adapter no longer.

    unlearn-peft tenant disallow acme news
    """
    done = f"requests of tenant '{name}' may no longer add '{adapter}'"
    edit("disallow", name, adapter, done=done, store=store, who=who, why=why, as_json=as_json)


@app.command("adapter")
def adapter_(
    name: Annotated[str, typer.Argument(help="Its name in the policy.")],
    path: Annotated[Path, typer.Argument(help="Its directory, the same on every server.")],
    sha256: Annotated[str | None, typer.Option(help="The expected one, as `inspect` prints it.")] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            help="What must not come back: JSON lines with prompt and leak. Default: PATH.probes.jsonl, if it is there."
        ),
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(metavar="refuse|warn|off", help="What happens to a set in which one does. Default: refuse."),
    ] = None,
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Register an adapter under a name, or replace the one of that name.

    The adapter is checked now and its sha256 (of weights and config, as `unlearn-peft inspect` prints it) is pinned:
    servers refuse anything else at this path until you register it again.

      unlearn-peft tenant adapter hp out/harry_potter

    With probes, each set that has more than this adapter is checked once, before it is first served: a probe that leaks
    there, and does not with this adapter alone, has come back. Without --probes and --canary, those that the name had
    before stay.

      unlearn-peft tenant adapter hp out/harry_potter --probes hp.jsonl --canary warn
    """
    from ..serve.canary import check_adapter, idle_note

    digest = check_adapter(path, sha256, probes)
    done = f"adapter '{name}' is {path.absolute()} ({digest})"
    edit(
        "adapter", name, path, digest, probes, canary, done=done, store=store, who=who, why=why, as_json=as_json,
        create=True,
    )  # fmt: skip
    if note := idle_note(name, open_store(store).current().adapters[name]):
        print(note, file=sys.stderr)


@app.command()
def unadapter(
    name: str, store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False
) -> None:
    """Remove an adapter from the policy, but not its files; refused while a tenant forgets or may add it.

    unlearn-peft tenant unadapter hp
    """
    edit("unadapter", name, done=f"adapter '{name}' removed", store=store, who=who, why=why, as_json=as_json)


for command in (
    tenant_limits.quota, tenant_limits.prefix_cache, tenant_keys.key, tenant_keys.trust, tenant_keys.untrust,
):  # fmt: skip
    app.command(command.__name__.replace("_", "-"))(command)


@app.command()
def history(
    limit: Annotated[int | None, typer.Option(min=1, help="Only the newest.")] = None,
    store: StoreOption = STORE, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show every change, the newest first: who, when (UTC), what, why.

    unlearn-peft tenant history --limit 10

    unlearn-peft tenant history --json | jq 'select(.what.tenant == "acme")'
    """
    for change in open_store(store).history(limit):
        if as_json:
            print(json.dumps(vars(change)))
        else:
            why = f" # {change.why}" if change.why else ""
            line = f"{change.revision} {change.at} {change.who}: {change.action} {json.dumps(change.what)}{why}"
            print(printable(line, lines=False))


@app.command("admin-key")
def admin_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who or what it is for; the history shows it.")],
    file: Annotated[Path, typer.Option(help="The file that `serve --admin-keys` has.")],
    write: Annotated[bool, typer.Option("--write", help="It may make changes, too. Else it may only look.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key of `serve --admin-port` and print it, once: the file has only its sha256.

    A name's older key ends with that. To take one away, delete its line: the next request sees it.

      unlearn-peft tenant admin-key ops --file admin-keys.yaml --write
    """
    from ..serve.admin.keys import make_admin_key

    api_key = make_admin_key(file, name, write)
    print(json.dumps({"name": name, "key": api_key, "write": write}) if as_json else api_key)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A policy in YAML.")],
    store: StoreOption = STORE, who: WhoOption = None, why: WhyOption = "", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Replace EVERYTHING in the store by a YAML policy, in one change.

    unlearn-peft tenant import policy.yaml --why 'moved from the file'
    """
    from ..serve.policy.yaml_file import read_policy

    policy = read_policy(file)
    done = f"{len(policy.tenants)} tenants and {len(policy.adapters)} adapters imported"
    edit("replace", policy, done=done, store=store, who=who, why=why, as_json=as_json, create=True)


@app.command()
def export(
    output: Annotated[Path | None, typer.Option(help="Write it to this file instead of printing it.")] = None,
    store: StoreOption = STORE,
) -> None:
    """Print the store as YAML, for `import` and `serve --policy`. Of API keys it has only the sha256.

    unlearn-peft tenant export --output policy.yaml
    """
    from ..files.atomic import atomic_file
    from ..serve.policy.yaml_file import dump_policy

    text = dump_policy(open_store(store).read_all())
    if output is None:
        print(text, end="")
        return
    with atomic_file(output, mode=0o600) as temporary:
        temporary.write_text(text, encoding="utf-8")
