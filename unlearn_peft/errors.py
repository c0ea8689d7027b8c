"""Every error that a user can meet, in one tree. Each message says what was found, what was expected, what to do.

UnlearnError
 ├─ RecipeError        a recipe or an override that cannot be used
 ├─ BaseModelError     a base model that cannot be found, read or used
 ├─ DataError          forget, retain or probe rows that cannot be used
 ├─ AdapterError       an adapter that cannot be read, trusted or attached
 ├─ OutputError        a place that cannot be written to
 ├─ PolicyError        who must have what forgotten: it cannot be told, or not be changed so
 └─ TrainingError      a run that cannot go on
     └─ Interrupted    a run that was asked to stop, and saved where it was
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UnlearnError(Exception):
    """The root of all errors raised on purpose by this package."""


class RecipeError(UnlearnError):
    """A recipe, or an override of one, that cannot be used."""


class BaseModelError(UnlearnError):
    """A base model that cannot be found, read or used."""


class DataError(UnlearnError):
    """Forget, retain or probe rows that cannot be used."""


class AdapterError(UnlearnError):
    """An adapter that cannot be read, trusted or attached; `adapter` is its name, where it was asked for by one."""

    adapter: str | None = None


class OutputError(UnlearnError):
    """A file or folder that cannot be written."""


class PolicyError(UnlearnError):
    """A policy that cannot be read or changed, or that does not know a tenant or an adapter."""


class TrainingError(UnlearnError):
    """A training run that cannot go on."""


class Interrupted(TrainingError):
    """A training run that was asked to stop; its message says where its state lies."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known word, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
