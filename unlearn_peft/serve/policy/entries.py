"""What a policy holds, validated: adapters, tenants, and the names, strengths, digests and keys in them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, StrictBool, ValidationInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator, field_validator, model_validator

from ...errors import PolicyError, TrustError, did_you_mean, safe_repr

_NAME = re.compile(r"(?!.*\.\.)(?!\.$)[A-Za-z0-9._-]{1,64}")
MAX_STRENGTH = 16.0  # far beyond what still gives text; more could overflow
_STRENGTHS = f"a number above 0, at most {MAX_STRENGTH:g} (1 is as trained)"
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
QUOTAS = ("requests", "tokens")
_SPAN = re.compile(r"([0-9]{1,5})([dh])")
_QUOTA = re.compile(r"[1-9][0-9]{0,14}/(second|minute|hour|day)")
SCOPES = ("add", "logprobs", "playground")
CANARIES = ("refuse", "warn", "off")
_PATHS = {"path": "an adapter directory", "probes": "a file of probes"}
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


def check_strength(value: object) -> float:
    """Return a strength.

    Raises:
        ValueError: it is no number in the range of strengths.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 < value <= MAX_STRENGTH:
            return float(value)
        raise ValueError(f"the strength is {safe_repr(value)}, expected {_STRENGTHS}")
    raise ValueError(f"expected a strength: {_STRENGTHS}")


def check_quota(value: object) -> str:
    """Return a quota.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not _QUOTA.fullmatch(value):
        raise ValueError("expected a quota such as 60/minute: a number in a second, minute, hour or day")
    return value


def _check_digest(text: str) -> str:
    if not DIGEST.fullmatch(text):  # the text is not quoted: it may be an API key, put here by mistake
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
Strength = Annotated[float, BeforeValidator(check_strength)]
Quota = Annotated[str, BeforeValidator(check_quota)]
Digest = Annotated[str, AfterValidator(_check_digest)]
PublicKey = Annotated[str, AfterValidator(_check_public_key)]


def _check_canary(value: object) -> object:
    value = "off" if value is False else value  # as YAML reads a bare `off`
    if value is not None and value not in CANARIES:
        raise ValueError(f"expected {', '.join(CANARIES[:-1])} or {CANARIES[-1]}")
    return value


class AdapterEntry(BaseModel, extra="forbid", frozen=True):
    """An adapter's directory, and the `Bundle.identity` that it must have; None: any.

    `probes` is the file of its probes, else PATH.probes.jsonl is, if it is there. `canary` says what happens to a set
    in which they leak (see `serve/canary.py`); None: it is refused.
    """

    path: str
    sha256: Digest | None = None
    probes: str | None = None
    canary: Annotated[str | None, BeforeValidator(_check_canary)] = None

    @field_validator("path", "probes")
    @classmethod
    def _resolve(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None:
            return None
        if not path or not path.isprintable():
            raise ValueError(f"expected the path of {_PATHS[str(info.field_name)]}")
        return str(Path((info.context or {}).get("folder", ""), path))

    @property
    def probes_path(self) -> Path | None:
        """Where its probes lie; None: it has none. Looks for a file."""
        beside = Path(f"{self.path}.probes.jsonl")  # never in the folder, which is published
        return Path(self.probes) if self.probes is not None else beside if beside.is_file() else None


def parse_time(value: object) -> str:
    """Return a time in UTC, ISO 8601, of a text or what YAML makes of one; without a zone it is UTC, a date its start.

    Raises:
        ValueError: it is no time.
    """
    try:
        text = value.isoformat() if isinstance(value, date) else value
        if not isinstance(text, str):
            raise ValueError
        time = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
        time = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
        return time.astimezone(timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        raise ValueError("expected a time such as 2027-01-31 or 2027-01-31T12:00:00+00:00") from None


def parse_end(value: object) -> str:
    """Return a time as `parse_time` does, also of a span from now such as 90d or 12h.

    Raises:
        PolicyError: it is neither.
    """
    if not isinstance(value, str) or not (span := _SPAN.fullmatch(value)):
        try:
            return parse_time(value)
        except ValueError as error:
            raise PolicyError(f"expires is {safe_repr(value)}: {error}, or a span such as 90d or 12h") from None
    length = timedelta(**{"days" if span[2] == "d" else "hours": int(span[1])})
    return parse_time(_now() + length)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _check_scopes(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or any(scope not in SCOPES for scope in value):
        raise ValueError(f"expected a list of {', '.join(SCOPES)}, or [] for none")
    return tuple(sorted(set(value)))


class KeyEntry(BaseModel, extra="forbid", frozen=True):
    """What is known of an API key: a name, when it ends (UTC), and what it may do beside asking.

    `scopes` are `add` (adapters to the tenant's set), `logprobs` and `playground` (the page's own routes); None: all.
    """

    name: Name | None = None
    expires: Annotated[str | None, BeforeValidator(lambda value: None if value is None else parse_time(value))] = None
    scopes: Annotated[
        tuple[str, ...] | None, BeforeValidator(lambda value: None if value is None else _check_scopes(value))
    ] = None

    @property
    def expired(self) -> bool:
        """Whether it is over."""
        return self.expires is not None and _now() >= datetime.fromisoformat(self.expires)


class TenantEntry(BaseModel, extra="forbid", frozen=True):
    """What a tenant must have forgotten (adapter -> strength), and its API keys, by their sha256.

    Its requests may add what is in `may_add` (adapter -> greatest strength), and nothing else. With `trusted_keys`
    (name -> PEM), an adapter is applied for this tenant only if one of them has signed it.
    """

    forget: dict[Name, Strength]
    keys: dict[Digest, KeyEntry] = {}
    trusted_keys: dict[Name, PublicKey] | None = None
    may_add: dict[Name, Strength] = {}
    quotas: dict[str, Quota] = {}  # of "requests" and of "tokens", see `serve/quotas.py`
    prefix_cache: StrictBool = True  # whether what its prompts begin with may be kept for its next ones

    def cache_salt(self, tenant: str, wanted: str | None) -> str | None:
        """Return what requests must share to share what their prompts begin with: their tenant, and what they want."""
        if not self.prefix_cache:
            return None
        return hashlib.sha256(json.dumps([tenant, wanted]).encode()).hexdigest()

    @field_validator("quotas")
    @classmethod
    def _known_kinds(cls, quotas: dict[str, str]) -> dict[str, str]:
        if unknown := quotas.keys() - set(QUOTAS):
            raise ValueError(f"{safe_repr(min(unknown))} is no quota: expected {' or '.join(QUOTAS)}")
        return dict(sorted(quotas.items()))

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

    @field_validator("keys", mode="before")
    @classmethod
    def _by_digest(cls, value: Any) -> Any:
        """A list of digests stands for keys without settings. No text is quoted: it may be an API key."""
        if not isinstance(value, (list, tuple, Mapping)):
            raise ValueError("expected a list of sha256, or a mapping of each to its name, expires and scopes")
        if wrong := [
            n for n, digest in enumerate(value, 1) if not isinstance(digest, str) or not DIGEST.fullmatch(digest)
        ]:
            raise ValueError(f"number {wrong[0]} is no sha256: expected 64 hexadecimal digits")
        digests = [digest.lower() for digest in value]
        if len(set(digests)) < len(digests):
            raise ValueError("a key stands there twice")
        settings = list(value.values()) if isinstance(value, Mapping) else [{}] * len(digests)
        return dict(sorted(zip(digests, (entry or {} for entry in settings), strict=True), key=lambda item: item[0]))

    @field_validator("trusted_keys")
    @classmethod
    def _some(cls, trusted: dict[str, str] | None) -> dict[str, str] | None:
        if trusted is not None and not trusted:
            raise ValueError("expected a public key or more; leave it out to ask for no signatures")
        return trusted


class Content(BaseModel, extra="forbid", frozen=True):
    """What a policy holds, validated."""

    adapters: dict[Name, AdapterEntry]
    tenants: dict[Name, TenantEntry]

    @model_validator(mode="after")
    def _check_references(self) -> Content:
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
