"""The three states that a base is measured in: before, with, and after its adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..adapters.bundle import Bundle
from ..adapters.trust import Trust
from ..errors import AdapterError
from ..inference.attach import attached, forgetting
from ..inference.bank import Bank
from ..models.base import Base

logger = logging.getLogger(__name__)
STATES = ("before", "with", "after")
T = TypeVar("T")


def check_adapters(
    base: Base, adapters: Sequence[str | Path | Bundle], strength: float | Sequence[float], trust: Trust | None
) -> list[tuple[Bundle, float]]:
    """Attach the adapters once and take them off: refused, they are so now and not after minutes of measuring.

    Each comes back as it was read, to be attached again without its files, with its strength.

    Raises:
        AdapterError: if something is attached already, or an adapter is refused.
    """
    if attached(base):
        raise AdapterError("adapters are attached already: detach them, so that 'before' is the base")
    bundles = [Bank.of(base).read(adapter, trust) for adapter in adapters]
    if any(bundle.prompt_format != base.prompt_format for bundle in bundles):
        logger.warning("The base is asked by another prompt format than in training: set base.prompt_format")
    with forgetting(base, *bundles, strength=strength):
        return list(zip(bundles, attached(base).values(), strict=True))


def in_each_state(base: Base, adapters: Sequence[tuple[Bundle, float]], measure: Callable[[str], T]) -> dict[str, T]:
    """Return what `measure` gives in each state; `adapters` are from `check_adapters`, off again at the end."""
    results = {"before": measure("before")}
    with forgetting(base, *(bundle for bundle, _ in adapters), strength=[factor for _, factor in adapters]):
        results["with"] = measure("with")
    return {**results, "after": measure("after")}
