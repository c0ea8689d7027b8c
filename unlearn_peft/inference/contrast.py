"""Which tokens of a row carry the fact, as the base itself tells: by contrast with a name that it never heard.

A token carries a fact if the base expects it where the subject is named, and expects it less

- with a made-up name in the subject's place, in the question and in the answer so far: not English, but knowledge; and
- after the few tokens in front of it alone: not what follows from them anyway. Where these name the subject, they tell
  nothing, and the first difference decides.

Both differences of log-probabilities are in nats; the smaller one counts, and `_KNOWN` of it are enough. Tokens after
such a token that the made-up name makes unlikely too belong to the same name. A row of plain text has no question to
change: there the second difference decides alone.

There is no word list and no rule of one language: the subject is the part of the question that comes again in answers
and that the answer depends on. Where the base knows nothing of a subject, both answers are equally unlikely, and no
token carries a fact: there is nothing to forget.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch

from ..data.batch import target_count
from ..data.prompt import Span
from ..data.rows import question_texts
from ..data.source import Row
from ..data.tokenize import Example, tokenize
from ..data.words import word_matches
from ..models.base import Base
from ..models.layers import check_known
from .stand_ins import SubjectIndex, made_up, pieces, replaced_row
from .target_scores import CONTEXT, Values, after_few_tokens, log_probabilities, passes

T = TypeVar("T")

_KNOWN = 1.0  # nats
_KNOWN_IN_TEXT = 2.0  # nats; of plain text, where only the second difference is there,
_FEW_IN_TEXT, _SHARE_IN_TEXT = 20, 0.2  # and so many tokens: of a page known by heart most follow from what is before
_UNEXPECTED = 3.0  # nats; a token with a probability below 5 %
_FOLLOWS = 1.0  # nats; what follows from another fact has a probability of 37 % at least
_CLIPPED = 6.0  # nats of a token, twice that of a fact of several; so that no single one chooses the subject
_STAND_INS = 2  # for each subject that is tried; their mean counts
_MANY_ROWS = 64  # of more, two subjects each are tried, with one stand-in: the longest are mostly right
_SAID_ANYWAY = 0.0125  # in half of the answers a word is at least so likely to be said
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Contrast:
    """What the base knows of one row."""

    subject: str  # as the question writes it; "" where none was found
    stand_in: str  # what was put in its place
    spans: list[Span]  # the characters of the rendered row (`Example.text`) that carry the fact
    nats: float  # by how much the subject makes the facts likelier, each token and each fact clipped
    unexpected: list[Span]  # the characters that the base does not expect: what a stranger's facts are


def fact_spans(base: Base, pairs: Sequence[tuple[str, str]], *, chat_template: bool = True) -> list[list[Span]]:
    """Return for each prompt and completion the characters of the completion that carry the fact.

    Empty where the base knows none. Whatever is attached to the base takes part.
    """
    rows: list[Row] = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    filled = [n for n, (prompt, completion) in enumerate(pairs) if prompt.strip() and completion.strip()]
    result: list[list[Span]] = [[] for _ in pairs]
    examples = tokenize(
        [rows[n] for n in filled], base.tokenizer, max_length=None, chat_template=chat_template, closing=False
    )
    for n, example, contrast in zip(
        filled, examples, contrasts(base, [rows[n] for n in filled], chat_template=chat_template), strict=True
    ):
        shift = pairs[n][1].index(example.text[slice(*example.answers[0])]) - example.answers[0][0]
        result[n] = [(start + shift, stop + shift) for start, stop in contrast.spans]
    return result


def contrasts(
    base: Base, rows: Sequence[Row], *, chat_template: bool = True, max_length: int = 512, quiet: bool = True
) -> list[Contrast]:
    """Return what the base knows of each row; see the top of this file.

    Some ten short passes of the frozen base a row, of many rows three, without gradients.
    """
    from tqdm import tqdm

    index, max_length = SubjectIndex(rows), base.window(max_length)
    result: list[Contrast] = []
    with tqdm(total=len(rows), unit="row", desc="which tokens carry the facts", disable=quiet) as bar:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[start : start + _CHUNK_ROWS]
            result += _contrast_chunk(base, chunk, index, chat_template, max_length, len(rows) > _MANY_ROWS)
            bar.update(len(chunk))
    return result


def said_anyway(
    base: Base, rows: Sequence[Row], words: Set[str] = frozenset(), *, chat_template: bool = True
) -> set[str]:
    """Return the words, case folded, that the base is likely to say in half of these answers, whoever they are about.

    Of answers about made-up names these are the grammar of the language. Words of several tokens are among them only if
    they are of `words` and two tokens that are likely themselves, as "ein" is for a base that spells German.
    """
    if not rows:
        return set()
    window = base.window(512)
    examples = tokenize(rows, base.tokenizer, max_length=window, chat_template=chat_template, closing=False)
    shares = []
    for numbers, logits in passes(base, examples):
        counts = [target_count(examples[n]) for n in numbers]
        shares += [part.softmax(-1).sum(0).clamp(max=1).cpu() for part in torch.split(logits, counts)]
    often = (torch.stack(shares).median(0).values >= _SAID_ANYWAY).nonzero()[:, 0].tolist()
    said = [text.strip().casefold() for text in base.tokenizer.batch_decode([[n] for n in often])]
    letters = {n for n, text in zip(often, said, strict=True) if text.isalpha()}
    spelt = sorted(words)
    tokens = base.tokenizer([f" {word}" for word in spelt], add_special_tokens=False)["input_ids"] if spelt else []
    pairs = {w for w, ids in zip(spelt, tokens, strict=True) if len(ids) == 2 and letters.issuperset(ids)}
    return pairs.union(said)


@dataclass(frozen=True)
class _Rows:
    """Forget rows, and what the base expects of them as they are."""

    base: Base
    rows: Sequence[Row]
    examples: Sequence[Example]
    known: Sequence[Values]
    tokenized: dict[str, Any]  # how
    max_length: int

    @classmethod
    def of(cls, base: Base, rows: Sequence[Row], chat_template: bool, max_length: int) -> _Rows:
        tokenized: dict[str, Any] = {
            "max_length": None,
            "chat_template": chat_template,
            "closing": False,
            "what": "forget",
        }
        examples = tokenize(rows, base.tokenizer, **tokenized)
        for example in examples:
            check_known(base.model, example.ids, f"row {example.row} of the forget set")
        return cls(base, rows, examples, log_probabilities(base, examples, max_length), tokenized, max_length)

    def less_likely(self, tried: Sequence[tuple[int, str, Mapping[str, str]]]) -> list[dict[str, Values]]:
        """Return for each row how much less likely, in nats, other names make the tokens that stay as they are.

        Tried are a row, what the difference is kept by, and the other names; the mean of those kept by the same.
        """
        changed = tokenize(
            [replaced_row(self.rows[n], others) for n, _, others in tried], self.base.tokenizer, **self.tokenized
        )
        found: list[dict[str, Values]] = [{} for _ in self.rows]
        for (n, key, others), variant, values in zip(
            tried, changed, log_probabilities(self.base, changed, self.max_length), strict=True
        ):
            without = moved_back(values, variant, self.examples[n], others)
            less = {span: self.known[n][span] - value for span, value in without.items() if span in self.known[n]}
            if earlier := found[n].get(key):
                less = {span: (earlier[span] + value) / 2 for span, value in less.items() if span in earlier}
            found[n][key] = less
        return found

    def beyond_few(self, needed: Sequence[Set[Span]]) -> list[Values]:
        """Return for each row by how much the whole of it makes the needed tokens likelier than the few before them."""
        after_few = after_few_tokens(self.base, self.examples, needed)
        return [{span: self.known[n][span] - few for span, few in of_row.items()} for n, of_row in enumerate(after_few)]


def _contrast_chunk(
    base: Base, rows: Sequence[Row], index: SubjectIndex, chat_template: bool, max_length: int, many: bool
) -> list[Contrast]:
    subjects, stand_ins = (2, 1) if many else (None, _STAND_INS)
    chunk = _Rows.of(base, rows, chat_template, max_length)
    found = chunk.less_likely([
        (n, subject, {subject: made_up(subject, f"{n} {k}")})
        for n, row in enumerate(rows)
        for subject in index.candidates(row)[:subjects]
        for k in range(stand_ins)
    ])  # fmt: skip
    asked = [question_texts(row) for row in rows]
    needed = [
        {span for less in of_row.values() for span, value in less.items() if value >= _KNOWN}
        if questions
        else set(chunk.known[n])
        for n, (questions, of_row) in enumerate(zip(asked, found, strict=True))
    ]
    chosen = []
    for n, beyond_few in enumerate(chunk.beyond_few(needed)):
        subject, spans, nats = _choose(chunk.examples[n], asked[n], found[n], chunk.known[n], beyond_few)
        unexpected = [span for span, value in chunk.known[n].items() if value < -_UNEXPECTED]
        stand_in = made_up(subject, f"{n} {stand_ins - 1}") if subject else ""
        chosen.append(Contrast(subject, stand_in, spans, nats, unexpected))
    return _with_derived(chunk, chosen, stand_ins)


def _with_derived(chunk: _Rows, chosen: Sequence[Contrast], stand_ins: int) -> list[Contrast]:
    """Return contrasts with the facts that follow from others of their row, as the Andes do from the Inca.

    They stay likely while the row names the others, so all of them are replaced with the subject. Only words that the
    base expects follow: in a language that it hardly speaks much else depends on those names.
    """
    new_words = [answer_words(e, question_texts(row)) for e, row in zip(chunk.examples, chunk.rows, strict=True)]
    tried = []
    for n, contrast in enumerate(chosen):
        if contrast.subject and contrast.spans:
            facts = {
                chunk.examples[n].text[a:b]
                for (a, b), hit in zip(new_words[n], touched(new_words[n], contrast.spans), strict=True)
                if hit
            }
            for k in range(stand_ins):
                others = {name: made_up(name, f"{n} {k}") for name in (contrast.subject, *sorted(facts))}
                tried.append((n, "", others))
    less = [of_row.get("", {}) for of_row in chunk.less_likely(tried)]
    needed = [{span for span, value in of_row.items() if value >= _KNOWN} for of_row in less]
    result = []
    for n, beyond_few in enumerate(chunk.beyond_few(needed)):
        expected = chunk.known[n]
        word_of = _words_of_tokens(expected, new_words[n])
        of_word: defaultdict[Span | None, float] = defaultdict(float)
        for token, value in expected.items():
            of_word[word_of.get(token)] += value
        smaller = {s: min(less[n][s], v) for s, v in beyond_few.items() if of_word[word_of.get(s)] >= -_FOLLOWS}
        derived = _marked(smaller, less[n], word_of, _KNOWN)
        result.append(replace(chosen[n], spans=sorted({*chosen[n].spans, *derived})))
    return result


def _choose(
    example: Example,
    questions: Sequence[str],
    found: Mapping[str, Values],
    tokens: Iterable[Span],
    beyond_few: Values,
) -> tuple[str, list[Span], float]:
    """Return the subject that the answer depends on most, a long one before a short one, its facts and their nats."""
    word_of = _words_of_tokens(tokens, answer_words(example, questions))
    if not questions:
        highest = sorted(beyond_few.values(), reverse=True)
        at_most = max(_FEW_IN_TEXT, int(len(highest) * _SHARE_IN_TEXT))
        known = max([_KNOWN_IN_TEXT, *highest[at_most - 1 : at_most]])
        return "", _marked(beyond_few, beyond_few, word_of, known), 0.0
    best: tuple[str, list[Span], float] = next(iter(found), ""), [], 0.0  # the longest, if nothing is known of any
    best_score = 0.0
    for subject, differences in found.items():
        named = _tokens_after(example, subject)
        smaller = {
            span: value if span in named else min(value, beyond_few.get(span, value))
            for span, value in differences.items()
            if span in word_of
        }
        spans = _marked(smaller, differences, word_of, _KNOWN)
        nats = {token: min(max(value, 0.0), _CLIPPED) for token, value in smaller.items()}
        of_facts = (sum(v for (a, _), v in nats.items() if start <= a < stop) for start, stop in spans)
        total = sum(nats.values()) - sum(max(of_fact - 2 * _CLIPPED, 0.0) for of_fact in of_facts)
        if spans and total * len(subject) > best_score:
            best, best_score = (subject, spans, total), total * len(subject)
    return best


def answer_words(example: Example, questions: Sequence[str] = ()) -> list[Span]:
    """Return the words of a row's answers that the questions do not hold."""
    asked = {m.group().casefold() for question in questions for m in word_matches(question)}
    return [
        (start + m.start(), start + m.end())
        for start, stop in example.answers
        for m in word_matches(example.text[start:stop])
        if m.group().casefold() not in asked
    ]


def _tokens_after(example: Example, subject: str) -> set[Span]:
    """Return the tokens that have the subject, or a part of it, among the few tokens in front of them."""
    found: set[Span] = set()
    for match in re.finditer(re.escape(subject), example.text, re.IGNORECASE):
        last = [t for t, (start, stop) in enumerate(example.characters) if start < match.end() and stop > match.start()]
        for t in last[-1:]:
            found.update(example.characters[t + 1 : t + 1 + CONTEXT])
    return found


def touched(places: Sequence[Span], spans: Iterable[Span]) -> list[bool]:
    """Return for each place in a text whether a span has a character of it."""
    ordered = sorted(spans)
    starts, ends = [start for start, _ in ordered], [*accumulate((stop for _, stop in ordered), max)]
    before = (bisect_left(starts, stop) for _, stop in places)  # spans that begin in front of the place's end
    return [n > 0 and ends[n - 1] > start for (start, _), n in zip(places, before, strict=True)]


def _words_of_tokens(tokens: Iterable[Span], words: Sequence[Span]) -> dict[Span, Span]:
    """Return the last word that each token has letters of; tokens of punctuation alone and of other words have none."""
    result: dict[Span, Span] = {}
    first = 0
    for token in sorted(tokens):
        while first < len(words) and words[first][1] <= token[0]:
            first += 1
        n = first
        while n < len(words) and words[n][0] < token[1]:
            result[token] = words[n]
            n += 1
    return result


def _marked(smaller: Values, differences: Values, word_of: Mapping[Span, Span], known: float) -> list[Span]:
    """Return the spans of the tokens that carry the fact, those of one name together.

    After such a token come the rest of its word, and the tokens that the made-up name makes unlikely.
    """
    spans: list[Span] = []
    word: Span | None = None  # of the last marked token
    open_name = False
    for token in sorted(differences):
        starts = token in word_of and smaller.get(token, 0.0) >= known
        goes_on = open_name and token in word_of and (word_of[token] == word or differences[token] >= known)
        if starts or goes_on:
            if open_name and spans:
                spans[-1] = (spans[-1][0], token[1])
            else:
                spans.append(token)
            word, open_name = word_of[token], True
        else:
            open_name = False
    return spans


def moved_back(
    values: Mapping[Span, T], variant: Example, example: Example, others: Mapping[str, str]
) -> dict[Span, T]:
    """Return the values of a changed row by the places that its tokens have in the row as it was."""
    place: dict[int, int] = {}
    for (start, stop), (new_start, _) in zip(example.answers, variant.answers, strict=True):
        at = new_start
        for piece, old, kept in pieces(example.text[start:stop], others):
            if kept:
                place.update({at + k: start + old + k for k in range(len(piece) + 1)})
            at += len(piece)
    return {
        (place[a], place[b]): value
        for (a, b), value in values.items()
        if a in place and b in place and place[b] - place[a] == b - a
    }
