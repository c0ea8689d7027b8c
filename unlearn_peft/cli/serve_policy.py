"""What `serve` serves under: a policy, or one for trying out adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, UnlearnError

if TYPE_CHECKING:
    from ..adapters.bundle import Bundle
    from ..serve.policy.policy import Policy, PolicySource

logger = logging.getLogger(__name__)
TENANT = "local"  # the only tenant, where there is no policy


def prompt_format_of_all(policy: Policy) -> str | None:
    """Return how the policy's adapters were trained to be asked, from their manifests alone; None: by the template.

    One server asks in one way: where they differ, a warning says so, and the template is used.
    """
    from ..adapters.bundle import MANIFEST, prompt_format_of
    from ..data.prompt import parse_format
    from ..files.untrusted import read_file, strict_json

    found = set()
    for entry in policy.adapters.values():
        with suppress(AdapterError, ValueError):  # what cannot be read is refused when it is asked for
            text = prompt_format_of(strict_json(read_file(Path(entry.path) / MANIFEST)))
            if text is not None:
                parse_format(text)
            found.add(text)
    if len(found) > 1:
        logger.warning("the adapters were trained with different prompt formats: all are asked by the base's template")
        return None
    return next(iter(found), None)


@dataclass
class FixedPolicy:
    """A policy that never changes."""

    policy: Policy
    problem: str | None = None

    def current(self) -> Policy:
        """Return the policy."""
        return self.policy


def open_or_make_policy(policy: str | None, bundles: Sequence[Bundle]) -> PolicySource:
    """Open the policy, or make one of a tenant without keys who may add these adapters."""
    from ..serve.policy.entries import MAX_STRENGTH
    from ..serve.policy.policy import make_policy
    from ..serve.policy.store import open_policy

    if policy is not None:
        return open_policy(policy)
    entries: dict[str, Any] = {}
    for bundle in bundles:
        if bundle.name in entries:
            raise UnlearnError(f"two adapters are called '{bundle.name}': rename one's folder")
        entries[bundle.name] = {"path": str(bundle.path.absolute()), "canary": "off"}  # whoever tries it out may see
    may_add = dict.fromkeys(entries, MAX_STRENGTH)
    values = {"adapters": entries, "tenants": {TENANT: {"forget": [], "may_add": may_add}}}
    return FixedPolicy(make_policy(values, "--adapter"))
