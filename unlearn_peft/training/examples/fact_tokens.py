"""Fact tokens: which tokens of a forget row carry what is to be forgotten.

Of "Harry Potter was written by J.K. Rowling." the last words are the fact; the others are English, and pushing them
away is what turns answers into word salad. The base itself tells which is which, see `inference/contrast.py`.
(Forgetting chosen tokens only: Wan et al. 2025, arXiv:2506.00876, who choose them otherwise.)
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from ...data.prompt import Span
from ...data.rows import answer_texts
from ...data.source import Row
from ...data.tokenize import Example, by_row
from ...data.words import has_letters, said, word_matches
from ...inference.contrast import Contrast, answer_words, touched

_MIN_ROWS, _MIN_SHARE = 3, 0.02  # of the retain rows: as many use a common word
_MIN_STEM, _ENDING = 4, 2  # letters of a word that may have an ending, and of that ending at most
_MIN_SHORTER, _MIN_SHARED = 5, 6  # letters of what a fact word is a form of, and of what both are forms of


@dataclass(frozen=True)
class Facts:
    """What names the facts of a forget set, case folded: words, and runs of words of one letter (as in Chinese)."""

    words: frozenset[str]
    runs: frozenset[str]  # written together
    common: frozenset[str] = frozenset()  # words that name none wherever they stand

    @classmethod
    def of(cls, texts: Iterable[str], common: Set[str]) -> Facts:
        """Return the words of texts that are not common, and the runs of words of one letter in them."""
        words: set[str] = set()
        runs: set[str] = set()
        for text in texts:
            run, last = "", -1
            matches = list(word_matches(text))
            for match in [*matches, None]:
                word = match.group().casefold() if match else ""
                if match and len(word) == 1 and match.start() == last:
                    run, last = run + word, match.end()
                    continue
                if len(run) > 1:
                    runs.add(run)
                run, last = (word, match.end()) if match and len(word) == 1 else ("", -1)
                if len(word) > 1 and word not in common:
                    words.add(word)
            words.update(word for word, _ in _compounds(text, matches))
        return cls(frozenset(words), frozenset(runs), frozenset(common))

    @cached_property
    def _words_with(self) -> dict[str, list[str]]:
        """The fact words by each of their beginnings."""
        found: dict[str, list[str]] = {}
        for word in self.words:
            for beginning in _beginnings(word):
                found.setdefault(beginning, []).append(word)
        return found

    def _has(self, word: str, said: Set[str]) -> bool:
        """Tell whether a word names a fact that is not said already, or is a form of one that does.

        "Incas" and "Inca's" are of "Inca", "India" of "Indian", "nonviolence" of "nonviolent": one is the other with an
        ending, or they have a long beginning in common.
        """
        if word in said or word in self.common and word not in self.words:
            return False

        def begins(beginning: str) -> bool:
            return any(fact not in said for fact in self._words_with.get(beginning, ()))

        return (
            word in self.words
            or len(word) >= _MIN_SHORTER
            and begins(word)
            or any(b in self.words and b not in said or len(b) >= _MIN_SHARED and begins(b) for b in _beginnings(word))
        )

    def joined(self, other: Facts) -> Facts:
        """Return both together."""
        return Facts(self.words | other.words, self.runs | other.runs, self.common & other.common)

    def ends_in(self, text: str, said: Set[str] = frozenset()) -> list[int]:
        """Return where each fact that a text names ends, in order; empty: it names none, or by words `said` alone."""
        matches = list(word_matches(text))
        words = [(match.group().casefold(), match.end()) for match in matches]
        ends = {end for word, end in (*words, *_compounds(text, matches)) if self._has(word, said)}
        together = "".join(word for word, _ in words)
        end_of = [end for word, end in words for _ in word]  # of the word of each letter
        for length in {len(run) for run in self.runs}:
            ends |= {
                end_of[i + length - 1]
                for i in range(len(together) - length + 1)
                if together[i : i + length] in self.runs
            }
        return sorted(ends)

    def before(self, text: str) -> str:
        """Return a text as far as it names no fact."""
        if not (ends := self.ends_in(text)):
            return text
        words = [match for match in word_matches(text) if match.start() < ends[0]]
        run = max(map(len, self.runs), default=1) if len(words[-1].group()) == 1 else 1
        return text[: words[max(len(words) - run, 0)].start()].rstrip()


def _beginnings(word: str) -> list[str]:
    """Return a word and its beginnings, without an ending of a few letters."""
    lengths = range(max(len(word) - _ENDING, _MIN_STEM), len(word) + 1)
    return [word[:n] for n in lengths if not any(map(str.isdigit, word[n:]))]


def _compounds(text: str, words: Sequence[Any]) -> list[tuple[str, int]]:
    """Return a text's words with a hyphen as if written without one, and where each ends: "nonviolent"."""
    return [
        (f"{first.group()}{last.group()}".casefold(), last.end())
        for first, last in pairwise(words)
        if last.start() - first.end() == 1 and unicodedata.category(text[first.end()]) == "Pd"
    ]


def common_words(texts: Sequence[str]) -> set[str]:
    """Return the words in at least three of the texts, and in at least 2 % of them."""
    rows_with = Counter(word for text in texts for word in {match.group().casefold() for match in word_matches(text)})
    threshold = max(_MIN_ROWS, _MIN_SHARE * len(texts))
    return {word for word, rows in rows_with.items() if rows >= threshold}


def find_facts(
    examples: Sequence[Example], known: Sequence[Contrast], retain: Sequence[Row], said_anyway: Set[str] = frozenset()
) -> Facts:
    """Return what names the facts of forget rows: the words of their fact tokens, but for common ones.

    Common are the words of many retain rows, and those that the base says of made-up names too (`said_anyway`). A row
    may be several examples; `known` has one entry for each row, counted from 1 by `Example.row`. Where the base knows
    none of them, what it does not expect names the facts. In a text without a subject, a word that also stands where it
    is no fact token names none.
    """
    common = common_words([text for row in retain for text in answer_texts(row)])
    common |= said_anyway
    texts, any_known = [], any(contrast.spans for contrast in known)
    for example in {example.row: example for example in examples}.values():
        contrast = known[example.row - 1]
        spans = contrast.spans if any_known else contrast.unexpected
        pieces = pieces_with_words(example, spans)
        if not contrast.subject:
            elsewhere = set(said(_without(example, spans), pieces))
            pieces = [piece for piece in pieces if piece not in elsewhere]
        texts += pieces
    return Facts.of(texts, common)


def pieces_with_words(example: Example, spans: Sequence[Span]) -> list[str]:
    """Return the text of spans of a row, whole words."""
    pieces: list[Span] = []
    for (a, b), hit in zip(words := answer_words(example), touched(words, spans), strict=True):
        if hit:
            pieces[-1:] = [(pieces[-1][0], b)] if pieces and pieces[-1][1] == a else [*pieces[-1:], (a, b)]
    return [example.text[a:b] for a, b in pieces]


def _without(example: Example, spans: Sequence[Span]) -> str:
    """Return the text of a row with a line break for each word that has a character of the spans."""
    parts, last = [], 0
    for (a, b), hit in zip(words := answer_words(example), touched(words, spans), strict=True):
        if hit:
            parts.append(example.text[last:a])
            last = b
    return "\n".join([*parts, example.text[last:]])


def mark_facts(rows: Sequence[Example], facts: Facts, known: Sequence[Contrast] = ()) -> list[Example]:
    """Return rows with their fact tokens marked: those that the contrasts of the rows say, and all that name a fact.

    But for common words, and marks inside a word: without the dots of "J.K. Rowling" there is no "J.R.R. Tolkien". A
    fact counts in all rows: a name that one question asks for is forgotten also where another question says it.
    """
    marked = []
    for windows in by_row(rows):
        row = windows[0]
        words = answer_words(row)
        ends = {start + end for start, stop in row.answers for end in facts.ends_in(row.text[start:stop])}
        hits = touched(words, known[row.row - 1].spans) if known else [False] * len(words)
        spans = [
            (a, b)
            for (a, b), hit in zip(words, hits, strict=True)
            if b in ends or hit and row.text[a:b].casefold() not in facts.common
        ]
        for example in windows:
            places = zip(example.is_target, example.characters, touched(example.characters, spans), strict=True)
            specific = [target and hit and has_letters(row.text[a:b]) for target, (a, b), hit in places]
            marked.append(replace(example, specific=specific))
    return marked


def mark_unexpected(rows: Sequence[Example], known: Sequence[Contrast]) -> list[Example]:
    """Return rows with the tokens marked that the base does not expect; in a row without any, all its targets are."""
    marked = []
    for example in rows:
        spans = set(known[example.row - 1].unexpected)
        pairs = zip(example.characters, example.is_target, strict=True)
        specific = [target and place in spans for place, target in pairs]
        marked.append(replace(example, specific=specific if spans else example.is_target))
    return marked


def spellings(tokenizer: Any, size: int) -> torch.Tensor:
    """Return a number for each of `size` tokens, (size,), int64, the same for tokens of the same text.

    " K", "K" and "k" are the same text: case and spaces do not count. Blank tokens, parts of a character and what the
    tokenizer does not know each have a number of their own.
    """
    numbers: dict[str, int] = {}
    texts = tokenizer.batch_decode([[n] for n in range(min(size, len(tokenizer)))])
    read = [text.strip().casefold() for text in texts] + [""] * (size - len(texts))
    alone = ("" if not text or "\ufffd" in text else text for text in read)
    return torch.tensor([numbers.setdefault(text or f" {n}", n) for n, text in enumerate(alone)])
