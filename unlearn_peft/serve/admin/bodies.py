"""Bodies of the admin port: what changes it takes, and what it says of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from ..policy.entries import MAX_STRENGTH, Name

FilePath = Annotated[str, Field(min_length=1, max_length=4096)]
Word = Annotated[str, Field(max_length=200)]  # such a bound also refuses half of a character


class Reason(BaseModel, extra="forbid"):
    """The reason of a change, for the history."""

    why: str = Field("", max_length=2000)


class NewTenant(Reason):
    """A tenant that forgets nothing and has no key yet."""

    name: Name


class Strength(Reason):
    """How strongly; 1 is as trained."""

    strength: float = Field(1.0, gt=0, le=MAX_STRENGTH)


class NewAdapter(Reason):
    """An adapter's directory, the same on every server; its content is pinned."""

    path: FilePath
    sha256: str | None = Field(None, description="The expected one, as `unlearn-peft inspect` prints it.")
    probes: FilePath | None = Field(
        None,
        description="What must not come back: a file of JSON lines with prompt and leak. Left out: as before; without "
        "one, PATH.probes.jsonl, if it is there.",
    )
    canary: Word | None = Field(
        None, description="What happens to a set in which a probe does: refuse, warn or off. Left out: as before."
    )


class KeySettings(Reason):
    """Of a new API key; without any it has no name, never ends, and may do everything."""

    name: Word | None = Field(None, description="A name, by which it can be revoked.")
    expires: Word | None = Field(
        None, description="When it ends: after a span such as 90d or 12h, or a time (UTC) such as 2027-01-31."
    )
    scopes: list[Word] | None = Field(
        None,
        max_length=16,
        description="What it may do beside asking: add, logprobs, playground. []: nothing; left out: all.",
    )


class Quotas(Reason):
    """Quotas such as 60/minute (or second, hour, day); null removes one, one that is left out stays."""

    requests: Word | None = None
    tokens: Word | None = Field(None, description="Read and generated.")


class PrefixCache(Reason):
    """Whether what a tenant's prompts begin with is kept for its next ones."""

    on: bool


class TrustedKeys(Reason):
    """Public keys in PEM, by name."""

    keys: dict[str, str] = Field(min_length=1, max_length=64)


class Done(BaseModel):
    """A change that was made."""

    revision: int = Field(description="Of the store, as the history counts.")


class Registered(Done):
    """An adapter that is in the policy now."""

    sha256: str = Field(description="What is pinned.")
    note: str | None = Field(None, description="Why its canary has no effect, where it has none.")


class NewKey(BaseModel):
    """An API key. It is not shown again."""

    key: str
    sha256: str
