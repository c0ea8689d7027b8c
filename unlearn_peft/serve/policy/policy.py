"""A policy: which adapters each tenant must have forgotten, which its requests may add, its API keys, and the public
keys that it trusts.

A YAML file (`yaml_file.py`) is validated as a whole, so that nobody is served under half a policy; of a database
(`store.py`), which may hold millions of tenants, a tenant is read when a request needs it (`stored.py`). Either way a
`Policy` comes out, looked up anew at every request.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from ...errors import PolicyError, did_you_mean, safe_repr
from .entries import DIGEST, AdapterEntry, Content, KeyEntry, TenantEntry, check_strength

if TYPE_CHECKING:
    from ...adapters.trust import Trust


KEY_ID = 12  # hexadecimal digits of a sha256 that tell keys apart
_SECRET = re.compile(rf"uf-[\w-]{{43}}|\b{DIGEST.pattern}\b")


class NotAllowed(PolicyError):
    """A request adds what its tenant's requests may not add: the client's fault (403)."""


class Key(NamedTuple):
    """An API key, without the key itself."""

    tenant: str
    digest: str  # its sha256, in hex
    entry: KeyEntry

    @property
    def id(self) -> str:
        """What logs call it."""
        return self.digest[:KEY_ID]


class Policy:
    """One version of a policy; a `PolicySource` has the current one. Two are equal if their versions are.

    Args:
        adapters: by name.
        tenants: by name; a store's are read when they are asked for, which may wait for the database.
        version: of a YAML file the sha256 of its content, in hex; of a store its revision and that one's token.
        owners: sha256 of an API key, in hex -> its tenant.
    """

    def __init__(
        self, adapters: Mapping[str, AdapterEntry], tenants: Mapping[str, TenantEntry], version: str,
        owners: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.adapters, self.tenants, self.version, self._owners = adapters, tenants, version, owners

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.version == other.version

    def __hash__(self) -> int:
        return hash(self.version)

    def dump(self) -> dict[str, Any]:
        """Return the content as a plain mapping: {"adapters": ..., "tenants": ...}."""
        entries = {"adapters": self.adapters, "tenants": self.tenants}
        return {kind: {name: entry.model_dump() for name, entry in named.items()} for kind, named in entries.items()}

    def tenant_of(self, api_key: str) -> str | None:
        """Return whose key this is, or None.

        The key is found by its sha256. How long that takes tells nothing that helps to guess a key: whoever does not
        have its 256 random bits cannot choose the digest that is looked up.
        """
        return self._owners.get(key_digest(api_key))

    def find_key(self, api_key: str) -> Key | None:
        """Return an API key's tenant and what is known of the key, or None; whether it is over is for the caller."""
        tenant, digest = self.tenant_of(api_key), key_digest(api_key)
        return None if tenant is None else Key(tenant, digest, self.tenants[tenant].keys[digest])

    def trust_of(self, tenant: str) -> Trust | None:
        """Return who must have signed the adapters of a tenant's requests; None: no signature is required.

        Raises:
            PolicyError: unknown tenant.
        """
        trusted = self._entry(tenant).trusted_keys
        return None if trusted is None else _trust(tuple(sorted(trusted.items())))

    def forget_of(self, tenant: str, extra: Mapping[str, float] | Sequence[str] = ()) -> dict[str, float]:
        """Return what must be forgotten for a request of this tenant: adapter -> strength.

        Args:
            tenant: its name.
            extra: what the request adds: an adapter, or a greater strength. A smaller one has no effect.

        Raises:
            NotAllowed: the tenant's requests may not add that. Whether there is such an adapter is not told.
            PolicyError: unknown tenant, or no valid strength.
        """
        entry = self._entry(tenant)
        if isinstance(extra, str) or not isinstance(extra, (Mapping, Sequence)):
            raise PolicyError("expected a list of adapters, or a mapping of adapters to strengths")
        forget = dict(entry.forget)
        for name, strength in extra.items() if isinstance(extra, Mapping) else [(name, 1.0) for name in extra]:
            try:
                added = check_strength(strength)
            except ValueError as error:
                raise PolicyError(f"adapter {safe_repr(name)}: {error}") from None
            if not isinstance(name, str) or added > max(entry.forget.get(name, 0.0), entry.may_add.get(name, 0.0)):
                raise NotAllowed(
                    f"requests of tenant '{tenant}' may add {_listed(entry.may_add)}, found {safe_repr(name)} at "
                    f"strength {added:g}: leave it out, or ask the operator to allow it (`unlearn-peft tenant allow`)"
                )
            forget[name] = max(forget.get(name, 0.0), added)
        return forget

    def _entry(self, tenant: str) -> TenantEntry:
        if tenant not in self.tenants:
            raise PolicyError(f"unknown tenant {safe_repr(tenant)}")
        return self.tenants[tenant]


class PolicySource(Protocol):
    """A file or a store that holds the current policy. Safe for many threads."""

    def current(self) -> Policy:
        """Return the current policy. It may wait for a disk or a database: from asyncio, call it in a thread.

        Raises:
            PolicyError: there is none that may still be used.
        """

    @property
    def problem(self) -> str | None:
        """Why the newest version is not in use, or None."""


@runtime_checkable
class KeyUses(Protocol):
    """A policy source that keeps when keys were last used."""

    def note_uses(self, uses: Mapping[str, str]) -> None:
        """Keep times (UTC, ISO 8601) by the keys' sha256.

        Raises:
            PolicyError: it cannot.
        """


def make_policy(values: Any, origin: str, folder: Path | None = None) -> Policy:
    """Validate a mapping as a policy; relative adapter paths start at `folder`.

    Raises:
        PolicyError: naming `origin` and everything that is wrong, but no API key.
    """
    if not isinstance(values, Mapping):
        raise PolicyError(f"{origin} holds {_kind(values)}, expected a mapping with 'adapters' and 'tenants'")
    try:
        content = Content.model_validate(values, context={"folder": folder} if folder else None)
    except ValidationError as error:
        problems = [line for item in error.errors() for line in _describe(dict(item)).splitlines()]
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        lines = without_keys("\n".join(f"  - {line}" for line in problems[:20]))
        raise PolicyError(f"{origin} cannot be used:\n{lines}{more}") from None
    version = hashlib.sha256(json.dumps(content.model_dump(), sort_keys=True).encode()).hexdigest()
    owners = {digest: tenant for tenant, entry in content.tenants.items() for digest in entry.keys}
    return Policy(content.adapters, content.tenants, version, owners)


def _listed(strengths: Mapping[str, float], limit: int = 20) -> str:
    """Return adapters and their greatest strengths in words."""
    named = [f"'{name}' up to strength {strength:g}" for name, strength in list(strengths.items())[:limit]]
    return ", ".join(named) + ", and others" * (len(strengths) > limit) or "no adapters"


@lru_cache(maxsize=1000)
def _trust(trusted: tuple[tuple[str, str], ...]) -> Trust:
    """Return the same object for the same keys: it caches which signatures are valid."""
    from ...adapters.trust import Trust

    return Trust({name: pem.encode() for name, pem in trusted})


def new_key() -> str:
    """Return a fresh API key with 256 random bits."""
    return f"uf-{secrets.token_urlsafe(32)}"


def without_keys(text: str) -> str:
    """Return a message without the API keys and digests in it, which may stand where a name should."""
    return _SECRET.sub("<a key>", text)


def key_digest(api_key: str) -> str:
    """Return the sha256 of an API key, in hex: all that a policy holds of it."""
    return hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).hexdigest()


def _describe(item: dict[str, Any]) -> str:
    """Describe an error of pydantic without the value: it may be an API key in the wrong place."""
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    if parts[2:3] == ["keys"]:  # by the digits that logs have
        parts[3:4] = [digest[:KEY_ID] for digest in parts[3:4]]
    where = ".".join(parts)
    if item["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"adapters": AdapterEntry, "tenants": TenantEntry}
        known = models.get(parts[0], Content) if len(parts) > 1 else Content
        known = KeyEntry if len(parts) > 4 and parts[2] == "keys" else known
        return f"unknown key {safe_repr(where)}{did_you_mean(parts[-1], known.model_fields)}"
    if item["type"] == "missing":
        return f"{safe_repr(where)} is missing" + (" (write [] for nothing)" if parts[-1] == "forget" else "")
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"{safe_repr(where)}: {message}" if where else message
    expected = {"string_type": "text (put it in quotes)", "tuple_type": "a list", "bool_type": "true or false"}
    return f"{safe_repr(where)}: expected {expected.get(item['type'], 'a mapping')}, found {_kind(item['input'])}"


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
