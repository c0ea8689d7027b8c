"""Edits of a policy: each changes the plain mapping that a policy's YAML has, and returns what the history records.

Of a store the mapping holds only what the edit names and what that refers to (`tables.read_part`). An API key is
recorded by the first digits of its sha256 only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import PolicyError, did_you_mean, safe_repr
from .entries import check_name, parse_end
from .policy import KEY_ID, Policy, key_digest

Content = dict[str, Any]  # as in YAML: adapters and tenants by name
_MIN_PREFIX = 8


class UnknownName(PolicyError):
    """There is no tenant or adapter of a name."""


def add(content: Content, tenant: str) -> Content:
    """Add a tenant that forgets nothing and has no key yet."""
    if tenant in content["tenants"]:
        raise PolicyError(f"tenant '{tenant}' is there already")
    content["tenants"][_checked(tenant)] = {"forget": {}, "keys": {}}
    return {"tenant": tenant}


def remove(content: Content, tenant: str) -> Content:
    """Remove a tenant with its keys: nobody is served under its name any more."""
    entry = get_entry(content, "tenant", tenant)
    del content["tenants"][tenant]
    return {"tenant": tenant, **summary(entry)}


def forget(content: Content, tenant: str, adapter: str, strength: float = 1.0) -> Content:
    """Make a tenant forget an adapter, or change the strength."""
    return _set_strength(content, "forget", tenant, adapter, strength)


def unforget(content: Content, tenant: str, adapter: str) -> Content:
    """Stop forgetting an adapter for a tenant."""
    strengths = get_entry(content, "tenant", tenant)["forget"]
    if adapter not in strengths:
        near = did_you_mean(adapter, strengths)
        raise PolicyError(f"tenant '{tenant}' does not have {safe_repr(adapter)} forgotten{near}")
    return {"tenant": tenant, "adapter": adapter, "before": strengths.pop(adapter)}


def allow(content: Content, tenant: str, adapter: str, strength: float = 1.0) -> Content:
    """Let a tenant's requests add an adapter, up to a strength."""
    return _set_strength(content, "may_add", tenant, adapter, strength)


def disallow(content: Content, tenant: str, adapter: str) -> Content:
    """Let a tenant's requests add an adapter no longer."""
    strengths = get_entry(content, "tenant", tenant).get("may_add", {})
    if adapter not in strengths:
        near = did_you_mean(adapter, strengths)
        raise PolicyError(f"requests of tenant '{tenant}' may not add {safe_repr(adapter)} anyway{near}")
    return {"tenant": tenant, "adapter": adapter, "before": strengths.pop(adapter)}


def adapter(
    content: Content, name: str, path: str | Path, sha256: str | None, probes: str | Path | None = None,
    canary: str | None = None,
) -> Content:  # fmt: skip
    """Register an adapter, or replace the one of that name; `sha256` is its `Bundle.identity`, None: not checked.

    Without `probes` or a `canary` (see `AdapterEntry`) those of the replaced one stay.
    """
    before = content["adapters"].get(_checked(name))
    entry = {"path": str(Path(path).absolute()), "sha256": sha256.lower() if sha256 else None}
    given = {"probes": None if probes is None else str(Path(probes).absolute()), "canary": canary}
    entry |= {field: value if value is not None else (before or {}).get(field) for field, value in given.items()}
    content["adapters"][name] = entry
    return {"adapter": name, **_given(entry), "before": before and _given(before)}


def unadapter(content: Content, name: str) -> Content:
    """Remove an adapter that no tenant forgets or may add."""
    before = get_entry(content, "adapter", name)
    for field, said, undo in (("forget", "forgotten for", "unforget"), ("may_add", "allowed to", "disallow")):
        if users := [tenant for tenant, entry in content["tenants"].items() if name in entry.get(field, {})]:
            tenants = ", ".join(users[:5]) + " and others" * (len(users) > 5)
            raise PolicyError(f"adapter '{name}' is {said} {tenants}: `{undo}` it there first")
    del content["adapters"][name]
    return {"adapter": name, "before": _given(before)}


def add_key(content: Content, tenant: str, digest: str, settings: Content | None = None) -> Content:
    """Add an API key to a tenant, by its sha256; for its settings see `KeyEntry`. `expires` may be a span, as 90d."""
    keys, settings = get_entry(content, "tenant", tenant)["keys"], _given(settings or {})
    if "expires" in settings:
        settings["expires"] = parse_end(settings["expires"])
    if "name" in settings and any(entry.get("name") == settings["name"] for entry in keys.values()):
        raise PolicyError(f"tenant '{tenant}' has a key called {safe_repr(settings['name'])}: revoke that one first")
    keys[digest] = settings
    return {"tenant": tenant, "key": digest[:KEY_ID], **settings}


def revoke_key(content: Content, tenant: str, key: str) -> Content:
    """Remove an API key from a tenant: the key itself, its name, its sha256, or 8 or more first digits of that."""
    digest = key_digest(key) if key.startswith("uf-") else key.lower()
    keys = get_entry(content, "tenant", tenant)["keys"]
    matches = [known for known, entry in keys.items() if entry.get("name") == key]
    matches = matches or [known for known in keys if len(digest) >= _MIN_PREFIX and known.startswith(digest)]
    if len(matches) != 1:
        raise PolicyError(
            f"{len(matches)} keys of tenant '{tenant}' fit, expected one: give the key, its name, or {_MIN_PREFIX} or "
            f"more digits of its sha256; it has {', '.join(_prefixes(keys)) or 'none'}"
        )
    return {"tenant": tenant, "key": matches[0][:KEY_ID], **_given(keys.pop(matches[0]))}


def quota(content: Content, tenant: str, quotas: Mapping[str, str | None]) -> Content:
    """Change quotas of a tenant, such as {"requests": "60/minute"}; None removes one."""
    if not quotas:
        raise PolicyError("which quota? Give requests, tokens or both")
    entry = get_entry(content, "tenant", tenant)
    before = entry.get("quotas") or {}
    entry["quotas"] = {kind: value for kind, value in {**before, **quotas}.items() if value is not None}
    return {"tenant": tenant, "quotas": entry["quotas"], "before": before}


def prefix_cache(content: Content, tenant: str, on: bool) -> Content:
    """Let what a tenant's prompts begin with be kept for its next ones, or not."""
    entry = get_entry(content, "tenant", tenant)
    before, entry["prefix_cache"] = entry.get("prefix_cache", True), on
    return {"tenant": tenant, "prefix_cache": on, "before": before}


def trust(content: Content, tenant: str, keys: Mapping[str, str]) -> Content:
    """Add public keys (name -> PEM) to those that a tenant trusts: it is served signed adapters only."""
    entry = get_entry(content, "tenant", tenant)
    trusted = entry.get("trusted_keys") or {}
    if other := [name for name, pem in keys.items() if trusted.get(name, pem) != pem]:
        raise PolicyError(
            f"tenant '{tenant}' trusts another key called {safe_repr(other[0])}: `untrust` that one first, or rename "
            "the file of this one"
        )
    entry["trusted_keys"] = {**trusted, **keys}
    return {"tenant": tenant, "trusted_keys": _fingerprints(keys)}


def untrust(content: Content, tenant: str, name: str | None) -> Content:
    """Remove a trusted key from a tenant; None: all of them, so that it no longer requires signatures."""
    entry = get_entry(content, "tenant", tenant)
    trusted = entry.get("trusted_keys") or {}
    if name is not None and name not in trusted:
        raise PolicyError(f"tenant '{tenant}' trusts no key called {safe_repr(name)}{did_you_mean(name, trusted)}")
    if not trusted:
        raise PolicyError(f"tenant '{tenant}' has no trusted keys: it requires no signatures anyway")
    if name is not None and len(trusted) == 1:
        raise PolicyError(
            f"{safe_repr(name)} is the last key that tenant '{tenant}' trusts: without it, unsigned adapters would be "
            "applied. Trust another key first, or remove all (--all) if that is what you want"
        )
    removed = trusted if name is None else {name: trusted[name]}
    entry["trusted_keys"] = {key: pem for key, pem in trusted.items() if key not in removed} or None
    return {"tenant": tenant, "trusted_keys": _fingerprints(removed), "all": name is None}


def replace(content: Content, policy: Policy) -> Content:
    """Replace everything by another policy."""
    content |= policy.dump()
    tenants = {name: summary(entry) for name, entry in content["tenants"].items()}
    return {"adapters": {name: _given(entry) for name, entry in content["adapters"].items()}, "tenants": tenants}


def summary(entry: Content, uses: Mapping[str, str] | None = None) -> Content:
    """Return a tenant's entry with prefixes of digests in place of its keys; `uses`: see `PolicyStore.key_uses`."""
    trusted = entry.get("trusted_keys")
    more: Content = {"trusted_keys": _fingerprints(trusted)} if trusted else {}
    settings = {digest[:KEY_ID]: given for digest, key in entry["keys"].items() if (given := _given(key))}
    if settings:
        more["key_settings"] = settings
    more |= {"quotas": entry["quotas"]} if entry.get("quotas") else {}
    more |= {} if entry.get("prefix_cache", True) else {"prefix_cache": False}
    more |= {"may_add": entry["may_add"]} if entry.get("may_add") else {}
    more |= {"key_uses": {digest[:KEY_ID]: time for digest, time in uses.items()}} if uses else {}
    return {"forget": entry["forget"], "keys": _prefixes(entry["keys"]), **more}


def fingerprint(pem: str) -> str:
    """Return the first digits of a public key's sha256, as `sha256sum KEY.pub` prints it."""
    return hashlib.sha256(pem.encode()).hexdigest()[:KEY_ID]


def get_entry(content: Content, kind: str, name: str) -> Content:
    """Return the entry of a "tenant" or an "adapter".

    Raises:
        UnknownName: there is none of that name.
    """
    entries: dict[str, Content] = content[f"{kind}s"]
    if name not in entries:
        hint = (
            did_you_mean(name, [*entries, *content.get("near", ())])
            or ": `unlearn-peft tenant list` shows all, `tenant --help` how to add one"
        )
        raise UnknownName(f"no {kind} {safe_repr(name)}{hint}")
    return entries[name]


def _given(entry: Content) -> Content:
    """Return an adapter's or a key's entry without the settings that it does not have."""
    return {field: value for field, value in entry.items() if value is not None or field in ("path", "sha256")}


def _set_strength(content: Content, field: str, tenant: str, adapter: str, strength: float) -> Content:
    strengths = get_entry(content, "tenant", tenant).setdefault(field, {})
    get_entry(content, "adapter", adapter)
    before, strengths[adapter] = strengths.get(adapter), strength
    return {"tenant": tenant, "adapter": adapter, "strength": strength, "before": before}


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _fingerprints(keys: Mapping[str, str]) -> dict[str, str]:
    return {name: fingerprint(pem) for name, pem in keys.items()}


def _prefixes(digests: Iterable[str]) -> list[str]:
    return [digest[:KEY_ID] for digest in digests]
