"""`retain: auto`: a retain set that the base writes itself, for users who have none.

The base and forget rows come in; rows of `prompt` and the base's own `completion` go out. The answers need not be true:
KL to the base keeps whatever it says. Two kinds of prompt:

- broad: `broad_prompts.txt` (how-to, sums, code, writing, a few other languages), which the anchors do not cover.
- near: where a forget row's question ends in its subject, the base completes what stands in front of it ("Who wrote
  ..."), as if a user were still typing.

There is no parser and no list of names: a subject is recognised by capitals and numbers. In a script without capitals,
or where no question ends in its subject, there are no near rows, and `GeneratedRetain.summary` says so. Not all of them
make sense ("Who is ..." may go on to people who don't exist): review them with `unlearn-peft retain`, and add your own.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from ...data.anchors import anchors
from ...data.rows import question_of, single_question, texts_of
from ...data.source import Row
from ...data.words import long_words, names_in, word_matches
from ...inference.generate import answers, sampled
from ...models.base import Base

_PROMPTS = Path(__file__).parent / "broad_prompts.txt"
_MAX_QUESTIONS = 16  # forget questions that are turned into near prompts
_PER_QUESTION = 6  # near prompts; twice as many are sampled
_MAX_NEAR = 64
_MAX_CHARACTERS = 160  # of a prompt
_TOKENS, _BATCH = 32, 16
_SENTENCE_END = re.compile(r"(?<!\b\w)(?<!\b\d\d)[.!?]+(?=\s|$)|[。！？]")  # not the dots of "1.", "12." and "J."
_MIN_SENTENCE = 24  # characters


@dataclass(frozen=True)
class GeneratedRetain:
    """The rows, broad ones first, how many there are of both kinds, and how many were left out, by reason."""

    rows: list[Row]
    broad: int
    near: int
    left_out: dict[str, int]

    def summary(self) -> str:
        """Say in one line what was made."""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
        text = f"retain: auto: {self.broad} broad and {self.near} neighbour rows, answered by the base"
        text += f" (left out: {reasons})" if reasons else ""
        return text if self.near else text + ". No neighbours could be made: name a retain set of your own if you can"


def auto_retain(
    base: Base, forget: Sequence[Row], seed: int, *, never: Sequence[Row] = (), chat_template: bool = True
) -> GeneratedRetain:
    """Make a retain set from the base's own answers, without rows that `never` may be trained on (probes, neighbours).

    Nothing may be attached to the base; the same arguments give the same rows. They are not cached on disk: the words
    around a subject ("Who wrote ...") tell what kind of question is forgotten.
    """

    def answer(prompts: Sequence[str]) -> list[Row]:
        texts = answers(
            base, prompts, max_new_tokens=_TOKENS, chat_template=chat_template, batch_size=_BATCH, strip=False
        )
        return _first_sentences(prompts, texts)

    broad = answer([line for line in _PROMPTS.read_text(encoding="utf-8").splitlines() if line])
    general = [*broad, *anchors([])]
    openers = {long_words(row["prompt"])[0].casefold() for row in general}
    common = {word for row in general for word in long_words(" ".join(row.values())) if word.islower()} | openers
    names = {name for row in forget for name in _row_names(row, common)}
    near: dict[str, str] = {}  # by what they ask
    left_out: Counter[str] = Counter()
    known = {question_of(row) for row in (*forget, *general)}
    for prompt in _near_prompts(base, forget, names, common, openers, seed, chat_template):
        question = question_of({"prompt": prompt})
        if question in known or question in near:
            continue
        if _names_said(prompt, names, common):
            left_out["that name what is to be forgotten"] += 1
        else:
            near[question] = prompt
    chosen = list(near.values())
    if len(chosen) > _MAX_NEAR:
        chosen = random.Random(seed).sample(chosen, _MAX_NEAR)
    forgotten = {text.casefold().strip() for row in forget for text in texts_of(row)}
    excluded = {question_of(row) for row in never}

    def select(rows: Sequence[Row]) -> list[Row]:
        selected = []
        for row in rows:
            same_text = any(text.casefold().strip() in forgotten for text in row.values())
            if not row["completion"]:
                left_out["without an answer"] += 1
            elif same_text or _names_said(" ".join(row.values()), names, common):
                left_out["that name what is to be forgotten"] += 1
            elif question_of(row) in excluded:
                left_out["asked by probes or neighbours"] += 1
            else:
                selected.append(row)
        return selected

    broad, neighbours = select(broad), select(answer(chosen))
    return GeneratedRetain([*broad, *neighbours], len(broad), len(neighbours), dict(left_out))


def _first_sentences(prompts: Sequence[str], texts: Sequence[str]) -> list[Row]:
    """Pair prompts with the first sentence of each answer; white space in front of an answer stays."""
    rows: list[Row] = []
    for prompt, text in zip(prompts, texts, strict=True):
        end = next((m.end() for m in _SENTENCE_END.finditer(text) if m.end() >= _MIN_SENTENCE), len(text))
        rows.append({"prompt": prompt, "completion": text[:end].rstrip()})
    return rows


def _near_prompts(
    base: Base, forget: Sequence[Row], names: Set[str], common: Set[str], openers: Set[str], seed: int, chat: bool
) -> Iterator[str]:
    """Yield the forget rows' questions about other subjects, as the base completes them.

    A question with any capital in front of its subject is passed over, but for the words that `openers` has: it may be
    another name, and would be kept word for word.
    """
    prompts = [text for text in dict.fromkeys(map(single_question, forget)) if 0 < len(text) <= _MAX_CHARACTERS]
    if len(prompts) > _MAX_QUESTIONS:
        prompts = random.Random(seed).sample(prompts, _MAX_QUESTIONS)
    stems: dict[str, str] = {}  # -> the mark that ends such a question
    for prompt in prompts:
        start, stop = _subject(prompt, names, common) or (0, 0)
        before, after = prompt[:start], prompt[stop:]
        # a single word says too little of what is asked
        if len(before.split()) > 1 and not re.search(r"\w", after) and names_in(before) <= openers:
            stems.setdefault(before.rstrip(), "\n" if prompt[-1].isalnum() else prompt[-1])
    for n, (stem, end) in enumerate(stems.items()):
        (texts,) = sampled(
            base, [_open_turn(base, stem) if chat else stem], count=2 * _PER_QUESTION, temperature=0.8,
            max_new_tokens=16, seed=seed + n, chat_template=False,
        )  # fmt: skip
        ends = dict.fromkeys(text.partition(end)[0].strip() for text in texts if end in text)
        usable = [text for text in ends if long_words(text) and "\n" not in text and len(text) <= _MAX_CHARACTERS]
        yield from (f"{stem} {text}{end}".strip() for text in usable[:_PER_QUESTION])


def _open_turn(base: Base, stem: str) -> str:
    """Return the text of a chat in which the user has said no more than `stem` yet."""
    if not getattr(base.tokenizer, "chat_template", None):
        return stem
    text = str(base.tokenizer.apply_chat_template([{"role": "user", "content": stem}], tokenize=False))
    return text[: text.rindex(stem) + len(stem)]


def _subject(prompt: str, names: Set[str], common: Set[str]) -> tuple[int, int] | None:
    """Return where the first name in a prompt begins and ends, initials and short words between names included.

    A word inside the sentence goes before the one that opens it, which has a capital anyway.
    """
    words = list(word_matches(prompt))
    named = [n for n, word in enumerate(words) if _names_said(word.group(), names, common)]
    if not named:
        return None
    capital = [n for n in named if not words[n].group().islower()] or named
    first = last = next((n for n in capital if n), capital[0])

    def is_initial(n: int) -> bool:
        return len(words[n].group()) == 1 and words[n].group().isupper()

    while first > 0 and (is_initial(first - 1) or first - 1 in capital):
        first -= 1
    while True:
        following = next((n for n in range(last + 1, last + 4) if n in named), None)
        if following is None or any(len(words[n].group()) > 3 for n in range(last + 1, following)):
            break
        if re.search(r"[^\w\s.'’&-]", prompt[words[last].end() : words[following].start()]):
            break
        last = following
    return words[first].start(), words[last].end()


def _row_names(row: Row, common: Set[str]) -> set[str]:
    """Return what may name a forget row's target, case folded: names; in a row without any, its unusual words."""
    names: set[str] = set()
    for text in texts_of(row):
        likely = names_in(text)
        for match in word_matches(text):
            word = match.group().casefold()
            opens = re.search(r"(^|[.!?:¿¡\n])\W*$", text[: match.start()])
            if word in likely and not match.group().islower() and not (opens and word in common):
                names.add(word)
    return names or {word.casefold() for text in texts_of(row) for word in long_words(text)} - common


def _names_said(text: str, names: Set[str], common: Set[str]) -> set[str]:
    """Return the names in a text: in any case, but for those that are usual words too only where not in lower case."""
    return {
        word.casefold()
        for word in long_words(text)
        if word.casefold() in names and not (word.islower() and word.casefold() in common)
    }
