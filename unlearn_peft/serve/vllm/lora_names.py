"""The name under which vLLM is asked for a set of adapters; it has the set's digest, and so each version its own name.

vLLM asks a resolver once for a name and keeps the result (OpenAIServingModels.lora_requests), and its prefix cache is
keyed by that name and the path that it got: a tenant's name alone would go on meaning what it first meant, whatever the
policy says later.

    set:acme=0.5+hp=1@DIGEST     adapters of the policy, with strengths; set:@DIGEST is the empty set
    tenant:NAME@DIGEST           what the policy has a tenant forget; NAME@DIGEST is the same

Whoever resolves the name computes the digest (`set_digest`) again and refuses if the policy now gives another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from ...errors import PolicyError

_PART = re.compile(r"([A-Za-z0-9._-]{1,64})=([0-9.e+-]{1,32})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_LENGTH = 16_384  # characters


@dataclass(frozen=True)
class SetName:
    """A tenant's set, or these adapters, in the version with this digest."""

    digest: str
    tenant: str | None
    forget: Mapping[str, float]

    def __str__(self) -> str:
        if self.tenant is not None:
            return f"tenant:{self.tenant}@{self.digest}"
        parts = "+".join(f"{name}={strength!r}" for name, strength in sorted(self.forget.items()))
        return f"set:{parts}@{self.digest}"


def parse_set_name(text: str) -> SetName:
    """Read a set's name; a PolicyError if it is malformed, or has no digest."""
    target, at, digest = text.rpartition("@")
    if len(text) > MAX_LENGTH or not at or not _DIGEST.fullmatch(digest):
        raise PolicyError(
            "expected a set's name with its digest, set:ADAPTER=STRENGTH+...@SHA256 or TENANT@SHA256: without it, a "
            "changed policy would not be noticed"
        )
    if not target.startswith("set:"):
        return SetName(digest, target.removeprefix("tenant:"), {})
    forget: dict[str, float] = {}
    for part in re.split(r"\+(?=[^+=]*=)", target.removeprefix("set:")) if target != "set:" else ():
        match = _PART.fullmatch(part)
        try:
            strength = float(match[2]) if match else 0.0
        except ValueError:
            strength = 0.0
        if match is None or not isfinite(strength) or strength <= 0 or match[1] in forget:
            raise PolicyError("a set's name lists its adapters once each, as ADAPTER=STRENGTH joined by '+'")
        forget[match[1]] = strength
    return SetName(digest, None, forget)


def set_digest(parts: Iterable[tuple[str, float]]) -> str:
    """Return a digest that is equal if and only if contents (each a sha256) and strengths are, in any order."""
    text = json.dumps(["unlearn_peft set 1", sorted((content, float(strength)) for content, strength in parts)])
    return hashlib.sha256(text.encode()).hexdigest()
