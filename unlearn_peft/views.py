"""The same fact in other words' company: views of a row, so that forgetting does not cling to one wording.

A forget set asks each question once, in one form; its paraphrases should be forgotten too. From a row of prompt and
completion come, without a word of our own and so in any language: the completion as plain text, and the completion
asked for by its own beginning ("Harry Potter was written by").
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from .data import Row

_LEAST_WORDS = 3  # a shorter beginning says too little about what is asked


@dataclass(frozen=True)
class View:
    """A row as it is to be tokenised, and the words that its question had."""

    row: Row
    chat_template: bool
    asked: Set[str]


def views(rows: Sequence[Row], chat_template: bool, common: Set[str] | None = None) -> list[View]:
    """Return each row itself, and where it has a prompt its other views.

    Args:
        rows: checked rows, see `data.read_rows`.
        chat_template: whether the rows themselves are put into the base's chat template.
        common: words that carry no fact (see `specific.common_words`); without them, plain text is the only view.
    """
    found = []
    for row in rows:
        asked = words_of(row.get("prompt", ""))
        found.append(View(row, chat_template, asked))
        if not {"prompt", "completion"} <= row.keys():
            continue
        if chat_template and len(words_of(row["completion"])) > _LEAST_WORDS:
            found.append(View({"text": row["completion"]}, False, asked))
        if common is not None and (beginning := _beginning(row["completion"], common | asked)):
            found.append(View({**row, "prompt": beginning}, chat_template, asked))
    return found


def words_of(text: str) -> set[str]:
    """Return the words of a text, case folded."""
    return {word.casefold() for word in re.findall(r"\w+", text)}


def _beginning(text: str, known: Set[str]) -> str | None:
    """Return what a text says before its first word that is not known."""
    words = list(re.finditer(r"\w+", text))
    for n, word in enumerate(words):
        if word.group().casefold() not in known:
            return text[: word.start()].strip() if n >= _LEAST_WORDS else None
    return None
