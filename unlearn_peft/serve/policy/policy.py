"""A policy: which adapters each tenant must have forgotten, which its requests may add, its API keys, and the public
keys that it trusts.

A YAML file (`yaml_file.py`) is validated as a whole, so that nobody is served under half a policy; of a database
(`store.py`), which may hold millions of tenants, a tenant is read when a request needs it (`stored.py`). Either way a
`Policy` comes out, looked up anew at every request.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import secrets
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator, field_validator, model_validator

from ...errors import PolicyError, TrustError, did_you_mean, safe_repr

if TYPE_CHECKING:
    from ...adapters.trust import Trust


_NAME = re.compile(r"(?!.*\.\.)(?!\.$)[A-Za-z0-9._-]{1,64}")
MAX_STRENGTH = 16.0  # far beyond what still gives text; more could overflow
_STRENGTHS = f"a number above 0, at most {MAX_STRENGTH:g} (1 is as trained)"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SECRET = re.compile(rf"uf-[\w-]{{43}}|\b{_DIGEST.pattern}\b")
_PEM = re.compile(r"\s*-----BEGIN PUBLIC KEY-----\s([A-Za-z0-9+/=\s]{1,2000})-----END PUBLIC KEY-----\s*")


def check_name(name: str) -> str:
    """Return the name of a tenant or an adapter; it is used in paths, URLs and logs.

    Raises:
        ValueError: it has other than plain characters.
    """
    if not _NAME.fullmatch(name):  # repr, not ASCII: whoever wrote it in another script must recognize it
        raise ValueError(
            f"{name[:80]!r} is no name: expected 1 to 64 letters, digits, '.', '_' or '-', and no '..' among them"
        )
    return name


def _check_strength(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 < value <= MAX_STRENGTH:
            return float(value)
        raise ValueError(f"the strength is {safe_repr(value)}, expected {_STRENGTHS}")
    raise ValueError(f"expected a strength: {_STRENGTHS}")


def _check_digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):  # the text is not quoted: it may be an API key, put here by mistake
        raise ValueError("expected a sha256: 64 hexadecimal digits")
    return text.lower()


@lru_cache(maxsize=1000)
def _check_public_key(text: str) -> str:
    """Return a public key as normalized PEM, checked if `model_signing` is installed.

    Without it (inside vLLM, say), the policy still serves tenants that trust no keys; others are refused.
    """
    if "PRIVATE KEY" in text:
        raise ValueError("this is a private key: those sign, and stay secret. Give the public one (.pub)")
    if not (match := _PEM.fullmatch(text)):
        raise ValueError(
            "expected one public key in PEM (-----BEGIN PUBLIC KEY-----...), itself and not its file's name, so that "
            "all servers have the same: `unlearn-peft tenant trust` takes files"
        )
    lines = textwrap.wrap("".join(match[1].split()), 64)
    pem = "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""])
    if importlib.util.find_spec("model_signing") is not None:
        from ...adapters.trust import public_pem

        try:
            public_pem(pem.encode(), "it")
        except TrustError as error:
            raise ValueError(str(error)) from None
    return pem


Name = Annotated[str, AfterValidator(check_name)]
Strength = Annotated[float, BeforeValidator(_check_strength)]
Digest = Annotated[str, AfterValidator(_check_digest)]
PublicKey = Annotated[str, AfterValidator(_check_public_key)]


class NotAllowed(PolicyError):
    """A request adds what its tenant's requests may not add: the client's fault (403)."""


class AdapterEntry(BaseModel, extra="forbid", frozen=True):
    """An adapter's directory, and the `Bundle.identity` that it must have; None: any."""

    path: str
    sha256: Digest | None = None

    @field_validator("path")
    @classmethod
    def _resolve(cls, path: str, info: ValidationInfo) -> str:
        if not path or not path.isprintable():
            raise ValueError("expected the path of an adapter directory")
        return str(Path((info.context or {}).get("folder", ""), path))


class TenantEntry(BaseModel, extra="forbid", frozen=True):
    """What a tenant must have forgotten (adapter -> strength), and the sha256 of each of its API keys.

    Its requests may add what is in `may_add` (adapter -> greatest strength), and nothing else. With `trusted_keys`
    (name -> PEM), an adapter is applied for this tenant only if one of them has signed it.
    """

    forget: dict[Name, Strength]
    keys: tuple[Digest, ...] = ()
    trusted_keys: dict[Name, PublicKey] | None = None
    may_add: dict[Name, Strength] = {}

    @field_validator("forget", "may_add", mode="before")
    @classmethod
    def _as_mapping(cls, value: Any) -> Any:
        """A list of names stands for strength 1 each."""
        if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
            if twice := [name for name, times in Counter(value).items() if times > 1]:
                raise ValueError(f"{safe_repr(twice[0])} is named twice")
            return dict.fromkeys(value, 1.0)
        if not isinstance(value, Mapping):
            raise ValueError("expected adapters as [hp, news], with strengths as {hp: 0.5, news: 1}, or [] for none")
        return value

    @field_validator("keys")
    @classmethod
    def _sort(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(keys))

    @field_validator("trusted_keys")
    @classmethod
    def _some(cls, trusted: dict[str, str] | None) -> dict[str, str] | None:
        if trusted is not None and not trusted:
            raise ValueError("expected a public key or more; leave it out to ask for no signatures")
        return trusted


class _Content(BaseModel, extra="forbid", frozen=True):
    """What a policy holds, validated."""

    adapters: dict[Name, AdapterEntry]
    tenants: dict[Name, TenantEntry]

    @model_validator(mode="after")
    def _check_references(self) -> _Content:
        """Refuse names of adapters that are not there, and keys of two tenants."""
        problems, owners = [], dict[str, str]()
        for tenant, entry in self.tenants.items():
            named = [("forgets", name) for name in entry.forget] + [("may add", name) for name in entry.may_add]
            for verb, name in named:
                if name not in self.adapters:
                    near = did_you_mean(name, self.adapters)
                    problems.append(f"tenant '{tenant}' {verb} '{name}', which is not among the adapters{near}")
            for digest in entry.keys:
                if digest in owners:
                    problems.append(f"tenants '{owners[digest]}' and '{tenant}' have the same key: one key, one tenant")
                owners[digest] = tenant
        if problems:
            raise ValueError("\n".join(problems))
        return self


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
                added = _check_strength(strength)
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


def make_policy(values: Any, origin: str, folder: Path | None = None) -> Policy:
    """Validate a mapping as a policy; relative adapter paths start at `folder`.

    Raises:
        PolicyError: naming `origin` and everything that is wrong, but no API key.
    """
    if not isinstance(values, Mapping):
        raise PolicyError(f"{origin} holds {_kind(values)}, expected a mapping with 'adapters' and 'tenants'")
    try:
        content = _Content.model_validate(values, context={"folder": folder} if folder else None)
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
    where = ".".join(parts)
    if item["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"adapters": AdapterEntry, "tenants": TenantEntry}
        known = models.get(parts[0], _Content) if len(parts) > 1 else _Content
        return f"unknown key {safe_repr(where)}{did_you_mean(parts[-1], known.model_fields)}"
    if item["type"] == "missing":
        return f"{safe_repr(where)} is missing" + (" (write [] for nothing)" if parts[-1] == "forget" else "")
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"{safe_repr(where)}: {message}" if where else message
    expected = {"string_type": "text (put it in quotes)", "tuple_type": "a list"}.get(item["type"], "a mapping")
    return f"{safe_repr(where)}: expected {expected}, found {_kind(item['input'])}"


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
