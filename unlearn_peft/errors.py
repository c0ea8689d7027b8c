"""Every error that a user can meet, in one tree. Each message says what was found, what was expected, what to do.

UnlearnError
 ├─ RecipeError        a recipe or an override that cannot be used
 ├─ BaseModelError     a base model that cannot be found, read or used
 ├─ DataError          forget, retain or probe rows that cannot be used
 ├─ AdapterError       an adapter that cannot be read, trusted or attached
 ├─ TrustError         a key that cannot be used, or what signs and verifies is missing
 ├─ OutputError        a place that cannot be written to
 ├─ PolicyError        who must have what forgotten: it cannot be told, or not be changed so
 └─ TrainingError      a run that cannot go on
     └─ Interrupted    a run that was asked to stop, and saved where it was
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

_SHOWN_ALIKE = 5
_VARIES = re.compile(r"'[^']*'|\d+")  # names and numbers, in what is said of many tensors


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


class TrustError(UnlearnError):
    """A key that cannot be used, or the library that signs and verifies is missing."""


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


def safe_repr(value: object, limit: int = 80) -> str:
    """Return a foreign value in ASCII, a text in quotes; cut short and without what a terminal would obey."""
    if isinstance(value, str):
        return ascii(value if len(value) <= limit else value[:limit] + "...")
    text = ascii(value)
    return text if len(text) <= limit else text[:limit] + "..."


def refuse(what: str, problems: Sequence[str], advice: str = "") -> NoReturn:
    """Raise one AdapterError that tells all problems.

    Raises:
        AdapterError: always; in one line where there is one problem.
    """
    if len(problems) == 1:
        raise AdapterError(f"{what}: {problems[0]}" + (f". {advice}" if advice else ""))
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_VARIES.sub("", problem), []).append(problem)
    lines = []
    for alike in kinds.values():
        lines += [f"  - {problem}" for problem in alike[:_SHOWN_ALIKE]]
        if len(alike) > _SHOWN_ALIKE:
            lines.append(f"  - ... and {len(alike) - _SHOWN_ALIKE} more like this")
    raise AdapterError("\n".join([f"{what}:", *lines, *([advice] if advice else [])]))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 300 characters of it."""
    return (str(error).strip().splitlines() or ["no details"])[0][:300]
