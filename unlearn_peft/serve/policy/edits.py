"""The changes of a policy's content: plain mappings, no database. Each returns what the history notes, without keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import PolicyError, did_you_mean, safe_repr
from .policy import Policy, check_name, key_digest

Content = dict[str, Any]  # as the YAML form: adapters and tenants by name
_PREFIX = 12  # hexadecimal digits of a key's digest that tell it from others
_SHORTEST = 8


def add(content: Content, tenant: str) -> Content:
    """Add a tenant that has nothing forgotten and no key yet."""
    if tenant in content["tenants"]:
        raise PolicyError(f"tenant '{tenant}' is there already")
    content["tenants"][_checked(tenant)] = {"forget": {}, "keys": []}
    return {"tenant": tenant}


def remove(content: Content, tenant: str) -> Content:
    """Remove a tenant with its keys."""
    entry = _known(content, "tenant", tenant)
    del content["tenants"][tenant]
    return {"tenant": tenant, **_noted(entry)}


def forget(content: Content, tenant: str, adapter: str, strength: float) -> Content:
    """Have an adapter forgotten for a tenant, or change its strength."""
    held = _known(content, "tenant", tenant)["forget"]
    _known(content, "adapter", adapter)
    before, held[adapter] = held.get(adapter), strength
    return {"tenant": tenant, "adapter": adapter, "strength": strength, "before": before}


def unforget(content: Content, tenant: str, adapter: str) -> Content:
    """Have an adapter no longer forgotten for a tenant."""
    held = _known(content, "tenant", tenant)["forget"]
    if adapter not in held:
        raise PolicyError(
            f"tenant '{tenant}' does not have {safe_repr(adapter)} forgotten{did_you_mean(adapter, held)}"
        )
    return {"tenant": tenant, "adapter": adapter, "before": held.pop(adapter)}


def adapter(content: Content, name: str, path: str | Path, sha256: str | None) -> Content:
    """Name an adapter, or put another one into a name's place."""
    before = content["adapters"].get(_checked(name))
    entry = {"path": str(Path(path).absolute()), "sha256": sha256.lower() if sha256 else None}
    content["adapters"][name] = entry
    return {"adapter": name, **entry, "before": before}


def unadapter(content: Content, name: str) -> Content:
    """Take an adapter's name away, if no tenant has it forgotten."""
    before = _known(content, "adapter", name)
    if users := [tenant for tenant, entry in content["tenants"].items() if name in entry["forget"]]:
        told = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
        raise PolicyError(f"adapter '{name}' is forgotten for {told}: take it away there first (unforget)")
    del content["adapters"][name]
    return {"adapter": name, "before": before}


def add_key(content: Content, tenant: str, digest: str) -> Content:
    """Give a tenant a key, by its digest."""
    _known(content, "tenant", tenant)["keys"].append(digest)
    return {"tenant": tenant, "key": digest[:_PREFIX]}


def revoke_key(content: Content, tenant: str, which: str) -> Content:
    """Take a key away from a tenant: given itself, by its digest, or by the first digits of that."""
    digest = key_digest(which) if which.startswith("uf-") else which.lower()
    keys = _known(content, "tenant", tenant)["keys"]
    found = [key for key in keys if len(digest) >= _SHORTEST and key.startswith(digest)]
    if len(found) != 1:
        raise PolicyError(
            f"{len(found)} keys of tenant '{tenant}' fit, expected one: give the key, or {_SHORTEST} or more digits of "
            f"its sha256; it has {', '.join(_prefixes(keys)) or 'none'}"
        )
    keys.remove(found[0])
    return {"tenant": tenant, "key": found[0][:_PREFIX]}


def trust(content: Content, tenant: str, keys: Mapping[str, str]) -> Content:
    """Have a tenant trust these public keys (name -> PEM), and no adapter without a signature by one that it trusts."""
    entry = _known(content, "tenant", tenant)
    trusted = entry.get("trusted_keys") or {}
    if other := [name for name, pem in keys.items() if trusted.get(name, pem) != pem]:
        raise PolicyError(
            f"tenant '{tenant}' trusts another key called {safe_repr(other[0])}: take that away first (untrust), or "
            "rename the file of this one"
        )
    entry["trusted_keys"] = {**trusted, **keys}
    return {"tenant": tenant, "trusted_keys": _fingerprints(keys)}


def untrust(content: Content, tenant: str, name: str | None) -> Content:
    """Take a trusted key away from a tenant; None: all, so that it asks for no signatures any more."""
    entry = _known(content, "tenant", tenant)
    trusted = entry.get("trusted_keys") or {}
    if name is not None and name not in trusted:
        raise PolicyError(f"tenant '{tenant}' trusts no key called {safe_repr(name)}{did_you_mean(name, trusted)}")
    if not trusted:
        raise PolicyError(f"tenant '{tenant}' has no trusted keys: it asks for no signatures anyway")
    if name is not None and len(trusted) == 1:
        raise PolicyError(
            f"{safe_repr(name)} is the last key that tenant '{tenant}' trusts: without any, adapters would be applied "
            "that nobody has signed. Let it trust another first, or take all away (--all) if that is what you want"
        )
    taken = trusted if name is None else {name: trusted[name]}
    entry["trusted_keys"] = {key: pem for key, pem in trusted.items() if key not in taken} or None
    return {"tenant": tenant, "trusted_keys": _fingerprints(taken), "all": name is None}


def replace(content: Content, policy: Policy) -> Content:
    """Put a whole policy into the place of all that is there."""
    content |= policy.model_dump()
    tenants = {name: _noted(entry) for name, entry in content["tenants"].items()}
    return {"adapters": content["adapters"], "tenants": tenants}


def _noted(entry: Content) -> Content:
    """What the history notes of a tenant."""
    trusted = entry.get("trusted_keys")
    more = {"trusted_keys": _fingerprints(trusted)} if trusted else {}
    return {"forget": entry["forget"], "keys": _prefixes(entry["keys"]), **more}


def fingerprint(pem: str) -> str:
    """Return the first digits of a public key's sha256, which `sha256sum KEY.pub` tells, too."""
    return hashlib.sha256(pem.encode()).hexdigest()[:_PREFIX]


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _known(content: Content, kind: str, name: str) -> Content:
    entries: dict[str, Content] = content[f"{kind}s"]
    if name not in entries:
        raise unknown(kind, name, entries)
    return entries[name]


def unknown(kind: str, name: str, entries: Iterable[str]) -> PolicyError:
    """Return the error for a tenant or adapter that the policy does not have."""
    near = did_you_mean(name, entries) or ": `unlearn-peft tenant list` tells what there is, `--help` how to add"
    return PolicyError(f"no {kind} {safe_repr(name)}{near}")


def _fingerprints(keys: Mapping[str, str]) -> dict[str, str]:
    return {name: fingerprint(pem) for name, pem in keys.items()}


def _prefixes(digests: Iterable[str]) -> list[str]:
    return [digest[:_PREFIX] for digest in digests]
