"""The words of a text in any script, and texts in one spelling for comparing.

Words are told by Unicode's default segmentation (UAX #29), through `regex`, which transformers needs anyway. In a
script without spaces, such as Chinese or Thai, that makes each letter, with its marks, a word of its own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

import regex

_LETTER = regex.compile(r"\X")  # with its marks
_BREAK = regex.compile(r"(?V1)(?w)\b")
_SEGMENT = regex.compile(r"(?w)\b.+?\b", regex.DOTALL)
_SPOKEN = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_UNSEEN = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_APOSTROPHE = regex.compile("[`\u00b4\u02b9\u02bb\u02bc\u2018\u2019\u201b\u2032\uff07]")
_DASH = regex.compile(r"[\p{Pd}\u2212]")
_SEPARATORS = r"[ \-/.,'()\u00b7]{0,3}"  # between two digits of one number, in a normalized text
_NUMBER = regex.compile(rf"\d(?:{_SEPARATORS}\d)+")
_MIN_DIGITS = 4  # of a number whose separators do not matter: a list "1, 2" is not 12


def normalize(text: str) -> str:
    """Return a text in one spelling, for comparing: NFKC, case folded, digits as 0 to 9, white space as one space.

    Typographic apostrophes and dashes become ' and -; what cannot be seen, such as a soft hyphen, is left out.
    """
    return "".join(piece for piece, _, _ in _pieces(text))


def word_matches(text: str) -> Iterator[regex.Match[str]]:
    """Find each word of a text, with its place and as it is written."""
    return (match for match in _SEGMENT.finditer(text) if has_letters(match.group()))


def has_letters(text: str) -> bool:
    """Tell whether a text has a letter, a mark of one or a digit."""
    return _SPOKEN.search(text) is not None


def segments(text: str) -> list[str]:
    """Return the words and the marks of a text, normalized, in order."""
    return [part for part in _BREAK.split(normalize(text)) if part.strip()]


def word_runs(text: str) -> list[list[str]]:
    """Return the words of a text, normalized, in runs that nothing divides: one word, or in Chinese a clause.

    What an apostrophe, a hyphen or a full stop joins is several runs.
    """
    return [[word for word in _BREAK.split(run) if word] for run in _SPOKEN.findall(normalize(text))]


def words_in(text: str) -> list[str]:
    """Return the words of a text, normalized, in order."""
    return [word for run in word_runs(text) for word in run]


def said(text: str, phrases: Sequence[str]) -> list[str]:
    """Return the phrases that a text says, wherever they stand in it, in whatever spelling (see `normalize`).

    White space may stand where a phrase has a word's end, and in numbers of four digits or more any separator:
    "0221 / 123456" says "0221-123456", and "1 000 000" says "1,000,000".
    """
    normalized = normalize(text)
    return [phrase for phrase in phrases if (pattern := _pattern(phrase)) and pattern.search(normalized)]


def places(text: str, phrases: Sequence[str]) -> list[tuple[int, int]]:
    """Return where a text says any of the phrases, as `said` finds them: characters from and to, in order, apart."""
    pieces = _pieces(text)
    normalized = "".join(piece for piece, _, _ in pieces)
    spans = [(start, end) for piece, start, end in pieces for _ in piece]  # of each normalized character
    apart: list[tuple[int, int]] = []
    for start, end in sorted(
        (spans[match.start()][0], spans[match.end() - 1][1])
        for phrase in phrases
        if (pattern := _pattern(phrase))
        for match in pattern.finditer(normalized)
    ):
        if apart and start < apart[-1][1]:
            start, end = apart[-1][0], max(end, apart.pop()[1])
        apart.append((start, end))
    return apart


def _pieces(text: str) -> list[tuple[str, int, int]]:
    """Return each letter of a text, normalized, and where it stands; white space together, what is unseen not at all.

    A letter at a time, so that a place in the normalized text tells the place in the text.
    """
    pieces: list[tuple[str, int, int]] = []
    for match in _LETTER.finditer(text):
        piece = _letter(match.group())
        start, end = match.span()
        if piece == " " and pieces and pieces[-1][0] == " ":
            start = pieces.pop()[1]
        if piece:
            pieces.append((piece, start, end))
    return pieces


@lru_cache(maxsize=2**14)
def _letter(letter: str) -> str:
    if letter.isspace():
        return " "
    letter = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", letter).casefold())
    letter = "".join(str(unicodedata.decimal(c, c)) for c in _UNSEEN.sub("", letter))
    return str(_DASH.sub("-", _APOSTROPHE.sub("'", letter)))


@lru_cache(maxsize=2**12)
def _pattern(phrase: str) -> regex.Pattern[str] | None:
    """Return what finds a phrase in a normalized text; None for a phrase in which nothing can be seen."""
    normalized = normalize(phrase)
    parts, at = [], 0
    for number in _NUMBER.finditer(normalized):
        digits = [regex.escape(c) for c in number.group() if c.isdigit()]
        if len(digits) >= _MIN_DIGITS:
            plain, apart = _plain(number.group()), _SEPARATORS.join(digits)
            parts += [_plain(normalized[at : number.start()]), rf"(?:{plain}|(?<!\d){apart}(?!\d))"]
            at = number.end()
    return regex.compile("".join([*parts, _plain(normalized[at:])])) if normalized.strip() else None


def _plain(text: str) -> str:
    """Return a pattern for a part of a phrase: its own white space, and such as may stand between two words."""
    pattern = ""
    for part in _BREAK.split(text):
        if part.isspace():
            pattern += " "
        elif part:
            pattern += (" ?" if pattern and pattern[-1] != " " else "") + regex.escape(part)
    return pattern
