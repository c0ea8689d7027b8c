"""Every error that a user can meet, in one tree. Each message says what was found, what was expected, what to do.

UnlearnError
 ├─ RecipeError        a recipe or an override that cannot be used
 ├─ BaseModelError     a base model that cannot be found, read or used
 ├─ DataError          forget, retain or probe rows that cannot be used
 │   └─ UnknownSubject  a subject that the base shows no knowledge of
 ├─ AdapterError       an adapter that cannot be read, trusted or attached
 ├─ TrustError         a key that cannot be used, or the signing library is missing
 ├─ OutputError        a file or folder that cannot be written
 ├─ PolicyError        a policy that cannot be read or changed, or an unknown tenant or adapter
 └─ TrainingError      a run that cannot go on
     └─ Interrupted    a run that was asked to stop and saved its state
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

_MAX_ALIKE = 5  # problems of one kind that are listed
_STEERING = re.compile("[\0-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # all but the tab
_VARIABLE_PART = re.compile(r"'[^']*'|\d+")  # names and numbers: problems that differ in these only are of one kind


class UnlearnError(Exception):
    """The root of all errors raised on purpose by this package."""


class RecipeError(UnlearnError):
    """A recipe, or an override of one, that cannot be used."""


class BaseModelError(UnlearnError):
    """A base model that cannot be found, read or used."""


class DataError(UnlearnError):
    """Forget, retain or probe rows that cannot be used."""


class UnknownSubject(DataError):
    """A subject that the base shows no knowledge of: there is nothing to forget."""


class AdapterError(UnlearnError):
    """An adapter that cannot be read, trusted or attached; `adapter` is its name, where it was requested by name."""

    adapter: str | None = None


class TrustError(UnlearnError):
    """A key that cannot be used, or the library that signs and verifies is missing."""


class OutputError(UnlearnError):
    """A file or folder that cannot be written."""


class PolicyError(UnlearnError):
    """A policy that cannot be read or changed, or that does not know a tenant or an adapter.

    `public` is what those outside are told: no paths, no hosts.
    """

    public: str = "there is no valid policy"


class TrainingError(UnlearnError):
    """A training run that cannot go on."""


class Interrupted(TrainingError):
    """A training run that was asked to stop; its message says where its state is."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known word, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def safe_repr(value: object, limit: int = 80) -> str:
    """Return an untrusted value as short ASCII without control characters; a string in quotes."""
    if isinstance(value, str):
        return ascii(value if len(value) <= limit else value[:limit] + "...")
    try:
        text = ascii(value)
    except ValueError:  # a number of thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."


def printable(text: str, *, lines: bool = True) -> str:
    """Return a text of others with what could steer a terminal written as JSON escapes it.

    So are characters that reverse the direction of others, since they show a text other than it is; without `lines`
    also the ends of lines, so that one field cannot look like several.
    """
    return _STEERING.sub(lambda found: found[0] if lines and found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def refuse(subject: str, problems: Sequence[str], advice: str = "") -> NoReturn:
    """Raise one AdapterError that lists all problems, similar ones together; a single problem stays in one line.

    Raises:
        AdapterError: always.
    """
    if len(problems) == 1:
        raise AdapterError(f"{subject}: {problems[0]}" + (f". {advice}" if advice else ""))
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_VARIABLE_PART.sub("", problem), []).append(problem)
    lines = [f"{subject}:"]
    for alike in kinds.values():
        lines += [f"  - {problem}" for problem in alike[:_MAX_ALIKE]]
        if len(alike) > _MAX_ALIKE:
            lines.append(f"  - ... and {len(alike) - _MAX_ALIKE} more like this")
    raise AdapterError("\n".join([*lines, *([advice] if advice else [])]))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 300 characters of it."""
    return (str(error).strip().splitlines() or ["no details"])[0][:300]
