"""The name of a subject -> what the base knows of it: forget rows in both directions, probes and neighbours.

The base is asked in several forms and languages (`subject_prompts.txt`), then what its own lists of questions go on
with. What it says of a made-up name too is no knowledge, and neither is what it says only once, or of others of the
subject's kind (`others.py`). (A small base invents, and often the same again: an unknown name is not always told from a
known one.) What it says of the subject alone, and what makes it expect the name most, is then asked back
(`fact_prompts.txt`): answers that name the subject are the other direction. Neighbours are others of the subject's kind
of whom it knows something, and questions about the facts that it answers without the subject.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ...data.rows import question_of
from ...data.source import Row
from ...data.tokenize import tokenize
from ...data.words import places, said, word_matches, words_in
from ...inference.contrast import contrasts
from ...inference.stand_ins import made_up
from ...inference.target_scores import log_probabilities
from ...models.base import Base
from ...recipe.load import make_recipe
from .auto_retain import first_sentences
from .base_answers import TYPICAL, asked_about, asked_back, base_answers
from .build import Known, find_known
from .fact_tokens import Facts, pieces_with_words
from .others import others_of

_SAMPLES = 4  # answers beside the greedy one
_REPEATED = 2  # answers that say a fact, at least
_NATS = 4.0  # of a row at least: less is how a name sounds
_MAX_FORWARD, _MAX_REVERSE, _MAX_FACTS = 32, 16, 12
_PHRASES, _LONGEST = 120, 3  # phrases that may tell a subject; words in one
_WINDOW = 512  # tokens
_HELD_OUT = 4  # of so many rows one is a probe
_OF_OTHERS, _STRANGERS = 4, 3  # prompts that others of its kind are asked, and made-up names beside them
_MAX_NEIGHBOURS, _MAX_ALONE = 16, 8  # of its kind; and of what the base says of its facts alone


@dataclass(frozen=True)
class SubjectRows:
    """What a base knows of a subject, as a recipe takes it."""

    forget: list[Row]
    probes: list[Row]
    neighbours: list[Row]
    asked: int  # prompts
    reverse: int  # forget rows that ask from a fact to the subject


def rows_about(
    base: Base, names: Sequence[str], *, seed: int = 0, chat_template: bool = True, quiet: bool = True
) -> SubjectRows:
    """Ask the base what it knows of a subject of these names, the first of which is the usual one.

    Without forget rows it knows nothing. Nothing may be attached to it; the same arguments give the same rows.
    """
    options: dict[str, Any] = {"chat_template": chat_template}
    prompts = asked_about(names)
    first = _ask(base, prompts, seed, chat_template, quiet)
    recipe = make_recipe({"forget": [row for row, _ in first], "seed": seed, **options})
    known = find_known({"forget": [row for row, _ in first]}, base, recipe, quiet=quiet)
    more = [prompt for prompt in known.about if said(prompt, names)]
    second = _ask(base, more, seed, chat_template, quiet)
    answered = [*first, *second]
    others, neighbours = _neighbours(base, names, known.facts, seed, options)
    forward = _known_rows(base, answered, names, known, others, options)
    telling = _telling(base, names, answered, others, known.facts.common, options) if forward else []
    with_facts = _rows_with(telling, answered)
    asked = {row["prompt"] for row, _ in with_facts}
    forward = [*with_facts, *(one for one in forward if one[0]["prompt"] not in asked)]
    prompts_back = asked_back(telling)
    back = _ask(base, prompts_back, seed, chat_template, quiet)
    reverse: list[tuple[Row, list[str]]] = []
    for row, texts in back:
        named = [name for name in names if said(row["completion"], [name])]
        if named and not said(row["prompt"], names) and sum(bool(said(text, names)) for text in texts) >= _REPEATED:
            reverse.append((row, named))
    own = Facts.of(names, known.facts.common)
    alone = [row for row, texts in back if not any(map(own.ends_in, (row["prompt"], *texts)))]
    neighbours += random.Random(seed).sample(alone, min(len(alone), _MAX_ALONE))
    chosen = [*forward[:_MAX_FORWARD], *reverse[:_MAX_REVERSE]]
    forget, probes = _held_out(chosen, seed)
    back_asked = {row["prompt"] for row, _ in reverse}
    count = sum(row["prompt"] in back_asked for row in forget)
    return SubjectRows(forget, probes, neighbours, len(prompts) + len(more) + len(prompts_back), count)


def _ask(
    base: Base, prompts: Sequence[str], seed: int, chat_template: bool, quiet: bool
) -> list[tuple[Row, list[str]]]:
    """Return each prompt with the first sentence of its greedy answer, as a row, and all its answers."""
    different = list(dict.fromkeys(prompts))
    found = []
    for prompt, texts in base_answers(base, different, _SAMPLES, seed, chat_template, quiet, temperature=TYPICAL):
        (row,) = first_sentences([prompt], texts[:1])
        if row["completion"].strip():
            found.append(({"prompt": prompt, "completion": row["completion"].strip()}, texts))
    return found


def _known_rows(
    base: Base,
    answered: Sequence[tuple[Row, list[str]]],
    names: Sequence[str],
    known: Known,
    others: Sequence[str],
    options: dict[str, Any],
) -> list[tuple[Row, list[str]]]:
    """Return the rows that the base knows, what it knows best first, each with its own facts, whole words.

    Its own are those that the base says again, and not of others of the subject's kind: "author" tells no author.
    """
    rows = [row for row, _ in answered]
    more = contrasts(base, rows[len(known.rows) :], **options) if len(rows) > len(known.rows) else []
    examples = tokenize(rows, base.tokenizer, max_length=None, closing=False, what="forget", **options)
    every = [text for _, texts in answered for text in texts]
    of_others = "\n".join(others)
    found = []
    for (row, _), example, contrast in zip(answered, examples, [*known.rows, *more], strict=True):
        pieces = pieces_with_words(example, contrast.spans)
        facts = [
            piece
            for piece in dict.fromkeys(piece.strip() for piece in pieces)
            if Facts.of([piece], known.facts.common).words
            and not said(row["prompt"], [piece])
            and not said(of_others, [piece])
            and sum(bool(said(text, [piece])) for text in every) >= _REPEATED
        ]
        if facts and contrast.nats >= _NATS and said(contrast.subject, names):
            found.append((contrast.nats, row, facts))
    found.sort(key=lambda one: one[0], reverse=True)
    return [(row, facts) for _, row, facts in found]


def _telling(
    base: Base, names: Sequence[str], answered: Sequence[tuple[Row, list[str]]], others: Sequence[str],
    common: Set[str], options: dict[str, Any],
) -> list[str]:  # fmt: skip
    """Return phrases that the base says of the subject alone, that after which it expects its name most first.

    They are among the commonest whose words it says neither of others nor in the name, do not begin or end with a
    `common` word, and none lies within another.
    """
    elsewhere = {word for text in (*others, *names) for word in words_in(text)}
    count, written = Counter[tuple[str, ...]](), dict[tuple[str, ...], str]()
    for text in (text for _, texts in answered for text in texts):
        found = {
            words: phrase
            for words, phrase in _phrases(text)
            if elsewhere.isdisjoint(words) and common.isdisjoint((words[0], words[-1]))
        }
        count.update(found.keys())
        written = found | written
    phrases = [written[words] for words, times in count.most_common(_PHRASES) if times >= _REPEATED]
    if not phrases:
        return []
    rows = [{"prompt": prompt, "completion": names[0]} for prompt in asked_back(phrases, 1)]
    examples = tokenize(rows, base.tokenizer, max_length=None, closing=False, what="forget", **options)
    expected = log_probabilities(base, examples, base.window(_WINDOW))
    order = sorted(range(len(rows)), key=lambda n: -sum(expected[n].values()))
    chosen: list[str] = []
    for phrase in (phrases[n] for n in order):
        if len(chosen) < _MAX_FACTS and not any(said(one, [phrase]) or said(phrase, [one]) for one in chosen):
            chosen.append(phrase)
    return chosen


def _phrases(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield runs of a few words with nothing but white space between them: normalized, and as written."""
    words = list(word_matches(text))
    for start in range(len(words)):
        for stop in range(start, min(start + _LONGEST, len(words))):
            if stop > start and text[words[stop - 1].end() : words[stop].start()].strip():
                break
            phrase = text[words[start].start() : words[stop].end()]
            if normalized := tuple(words_in(phrase)):  # some signs that are words as written are none
                yield normalized, phrase


def _rows_with(facts: Sequence[str], answered: Sequence[tuple[Row, list[str]]]) -> list[tuple[Row, list[str]]]:
    """Return a row for each fact, of different prompts that say none: the first answer that does, up to its last."""
    found: dict[str, tuple[Row, list[str]]] = {}
    for fact in facts:
        for row, texts in answered:
            prompt = row["prompt"]
            text = next((text for text in texts if said(text, [fact])), None)
            if text and prompt not in found and not said(prompt, facts):
                completion = text[: places(text, facts)[-1][1]].strip()
                found[prompt] = {"prompt": prompt, "completion": completion}, said(completion, facts)
                break
    return list(found.values())


def _held_out(rows: Sequence[tuple[Row, list[str]]], seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into forget rows and probes; each fact of a probe stays in a forget row."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    count = Counter(fact for _, facts in rows for fact in facts)
    out: set[int] = set()
    for n in order:
        if len(out) < len(rows) // _HELD_OUT and all(count[fact] > 1 for fact in rows[n][1]):
            out.add(n)
            count.subtract(rows[n][1])
    forget = [row for n, (row, _) in enumerate(rows) if n not in out]
    probes = [
        {"prompt": row["prompt"], "leak": facts, "completion": row["completion"]}
        for n, (row, facts) in enumerate(rows)
        if n in out
    ]
    return forget, probes


def _neighbours(
    base: Base, names: Sequence[str], facts: Facts, seed: int, options: dict[str, Any]
) -> tuple[list[str], list[Row]]:
    """Return what the base says of others of the subject's kind and of made-up names, and rows on the former.

    The rows are those of which it knows something. Made-up names are asked, too, or "his" might be a fact.
    """
    never = facts.joined(Facts.of(names, facts.common))
    others = others_of(base, names[0], never)
    strangers = [made_up(names[0], str(n)) for n in range(_STRANGERS)]
    prompts = asked_about([*others, *strangers], _OF_OTHERS)
    answered = _ask(base, prompts, seed, options["chat_template"], quiet=True)
    rows = [row for row, _ in answered if not said(row["prompt"], strangers)]
    known = contrasts(base, rows, **options) if rows else []
    kept = [row for row, contrast in zip(rows, known, strict=True) if contrast.nats >= _NATS]
    different = {question_of(row): row for row in kept if not never.ends_in(" ".join(row.values()))}
    return [text for _, texts in answered for text in texts], list(different.values())[:_MAX_NEIGHBOURS]
