"""Who must have what forgotten: adapters, tenants, what each tenant has forgotten, and the keys that name a tenant.

A tenant may also name the public keys that it trusts: then no adapter is applied for it that none of them has signed.

A mapping comes in, from a YAML file (`policy_file.py`) or a database (`store.py`); a frozen `Policy` goes out, asked
for anew at every request.

Whatever is wrong is refused as a whole, so that nobody is served under half a policy.
"""

from __future__ import annotations

import hashlib
import hmac
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

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ...errors import PolicyError, TrustError, did_you_mean, safe_repr

if TYPE_CHECKING:
    from ...adapters.trust import Trust


_NAME = re.compile(r"(?!.*\.\.)(?!\.$)[A-Za-z0-9._-]{1,64}")
MAX_STRENGTH = 16.0  # far beyond what still gives text; more could overflow
_STRENGTHS = f"a number above 0, at most {MAX_STRENGTH:g} (1 is as trained)"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_PEM = re.compile(r"\s*-----BEGIN PUBLIC KEY-----\s([A-Za-z0-9+/=\s]{1,2000})-----END PUBLIC KEY-----\s*")


def check_name(name: str) -> str:
    """Return the name of a tenant or an adapter, if it can be one.

    Raises:
        ValueError: it is used in paths, URLs and logs, so that only plain characters are allowed.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{safe_repr(name)} is no name: expected 1 to 64 letters, digits, '.', '_' or '-', and no '..' among them"
        )
    return name


def _check_strength(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 < value <= MAX_STRENGTH:
            return float(value)
        raise ValueError(f"the strength is {safe_repr(value)}, expected {_STRENGTHS}")
    raise ValueError(f"expected a strength: {_STRENGTHS}")


def _check_digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):  # never shown: it may be a key, put here by mistake
        raise ValueError("expected a sha256: 64 hexadecimal digits")
    return text.lower()


@lru_cache(maxsize=1000)
def _check_public_key(text: str) -> str:
    """Return a public key in PEM in one form, checked as far as what is installed can do it.

    Where nothing can verify (inside vLLM, say), the policy still serves those who trust no keys; others are refused.
    """
    if "PRIVATE KEY" in text:
        raise ValueError("this is a private key: those sign, and stay secret. Give the public one (.pub)")
    if not (found := _PEM.fullmatch(text)):
        raise ValueError(
            "expected one public key in PEM (-----BEGIN PUBLIC KEY-----...), itself and not its file's name, since all "
            "servers must have the same: `unlearn-peft tenant trust` takes files"
        )
    lines = textwrap.wrap("".join(found[1].split()), 64)
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


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterEntry(_Frozen):
    """Where an adapter lies, and what it must be: `sha256` is its `Bundle.identity`, or None for any."""

    path: str
    sha256: Digest | None = None

    @field_validator("path")
    @classmethod
    def _resolve(cls, path: str, info: ValidationInfo) -> str:
        if not path or not path.isprintable():
            raise ValueError("expected the path of an adapter directory")
        return str(Path((info.context or {}).get("folder", ""), path))


class TenantEntry(_Frozen):
    """What a tenant must have forgotten (adapter -> strength), and the sha256 of each of its API keys.

    `trusted_keys` are public keys in PEM, by the name that is told: an adapter is applied for this tenant only if one
    of them has signed it. None: the tenant asks for no signature.
    """

    forget: dict[Name, Strength]
    keys: tuple[Digest, ...] = ()
    trusted_keys: dict[Name, PublicKey] | None = None

    @field_validator("forget", mode="before")
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


class Policy(_Frozen):
    """One version of who must have what forgotten. It never changes; ask its source for the current one."""

    adapters: dict[Name, AdapterEntry]
    tenants: dict[Name, TenantEntry]
    _version: str = PrivateAttr()
    _keys: tuple[tuple[str, str], ...] = PrivateAttr()  # digest, tenant

    @model_validator(mode="after")
    def _check_references(self) -> Policy:
        problems, owners = [], dict[str, str]()
        for tenant, entry in self.tenants.items():
            for name in entry.forget:
                if name not in self.adapters:
                    near = did_you_mean(name, self.adapters)
                    problems.append(f"tenant '{tenant}' forgets '{name}', which is not among the adapters{near}")
            for digest in entry.keys:
                if digest in owners:
                    problems.append(f"tenants '{owners[digest]}' and '{tenant}' have the same key: one key, one tenant")
                owners[digest] = tenant
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def model_post_init(self, context: Any) -> None:
        """Compute what is asked for at every request."""
        content = json.dumps(self.model_dump(), sort_keys=True)
        self._version = hashlib.sha256(content.encode()).hexdigest()
        self._keys = tuple(sorted((digest, tenant) for tenant, entry in self.tenants.items() for digest in entry.keys))

    @property
    def version(self) -> str:
        """The sha256 of the content, in hex: equal if and only if the content is."""
        return self._version

    def tenant_of(self, api_key: str) -> str | None:
        """Return whose key this is, or None. All keys are compared, in a time that does not tell which one fits."""
        digest, found = key_digest(api_key), None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def trust_of(self, tenant: str) -> Trust | None:
        """Return whose signatures alone the adapters of a tenant's requests may bear; None: it asks for none.

        Raises:
            PolicyError: unknown tenant.
        """
        if tenant not in self.tenants:
            raise PolicyError(f"unknown tenant {safe_repr(tenant)}")
        trusted = self.tenants[tenant].trusted_keys
        return None if trusted is None else _trust(tuple(sorted(trusted.items())))

    def forget_of(self, tenant: str, extra: Mapping[str, float] | Sequence[str] = ()) -> dict[str, float]:
        """Return what must be forgotten for a request of this tenant: adapter -> strength.

        Args:
            tenant: its name.
            extra: what the request asks for itself. It can add an adapter or raise a strength, never lower or
                remove one: the greater strength counts.

        Raises:
            PolicyError: unknown tenant or adapter, or a strength that is none. Adapters of others are not suggested.
        """
        if tenant not in self.tenants:
            raise PolicyError(f"unknown tenant {safe_repr(tenant)}")
        if isinstance(extra, str) or not isinstance(extra, (Mapping, Sequence)):
            raise PolicyError("expected a list of adapters, or a mapping of adapters to strengths")
        forget = dict(self.tenants[tenant].forget)
        asked = extra.items() if isinstance(extra, Mapping) else [(name, 1.0) for name in extra]
        for name, strength in asked:
            if not isinstance(name, str) or name not in self.adapters:
                raise PolicyError(f"unknown adapter {safe_repr(name)}")
            try:
                forget[name] = max(forget.get(name, 0.0), _check_strength(strength))
            except ValueError as error:
                raise PolicyError(f"adapter '{name}': {error}") from None
        return forget


class PolicySource(Protocol):
    """Where the current policy comes from: a file or a store. Safe for many threads."""

    def current(self) -> Policy:
        """Return the current policy. It may wait for a disk or a database: from asyncio, call it in a thread.

        Raises:
            PolicyError: there is none that may still be used.
        """
        ...

    @property
    def problem(self) -> str | None:
        """Why the newest version is not in use, or None."""
        ...


def make_policy(values: Any, origin: str, folder: Path | None = None) -> Policy:
    """Validate a mapping as a policy.

    Raises:
        PolicyError: naming `origin` and all that is wrong, but no key.
    """
    if not isinstance(values, Mapping):
        raise PolicyError(f"{origin} holds {_kind(values)}, expected a mapping with 'adapters' and 'tenants'")
    try:
        return Policy.model_validate(values, context={"folder": folder} if folder else None)
    except ValidationError as error:
        problems = [line for item in error.errors() for line in _describe(dict(item)).splitlines()]
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        told = "\n".join(f"  - {line}" for line in problems[:20])
        raise PolicyError(f"{origin} cannot be used:\n{told}{more}") from None


@lru_cache(maxsize=1000)
def _trust(trusted: tuple[tuple[str, str], ...]) -> Trust:
    """One object for the same keys: it remembers which signatures held."""
    from ...adapters.trust import Trust

    return Trust({name: pem.encode() for name, pem in trusted})


def new_key() -> str:
    """Return a fresh API key with 256 random bits."""
    return f"uf-{secrets.token_urlsafe(32)}"


def key_digest(api_key: str) -> str:
    """Return what a policy holds of an API key: its sha256, in hex."""
    return hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).hexdigest()


def _describe(item: dict[str, Any]) -> str:
    """Say what is wrong, without the value: it may be a key, put at the wrong place."""
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    where = ".".join(parts)
    if item["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"adapters": AdapterEntry, "tenants": TenantEntry}
        known = models.get(parts[0], Policy) if len(parts) > 1 else Policy
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
