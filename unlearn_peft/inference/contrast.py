"""Which tokens of a row carry the fact, as the base itself tells: by contrast with a name that it never heard.

A token carries a fact if the base expects it where the subject is named, and expects it less

- with a made-up name in the subject's place, in the question and in the answer so far: not English, but knowledge; and
- after the few tokens in front of it alone: not what follows from them anyway.

Both differences of log-probabilities are in nats; the smaller one counts, and `_KNOWN` of it are enough. Tokens after
such a token that the made-up name makes unlikely too belong to the same name. A row of plain text has no question to
change: there the second difference decides alone.

There is no word list and no rule of one language: the subject is the part of the question that comes again in answers
and that the answer depends on. Where the base knows nothing of a subject, both answers are equally unlikely, and no
token carries a fact: there is nothing to forget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from ..data.batch import labels_of, target_count
from ..data.prompt import Span
from ..data.rows import question_texts
from ..data.source import Row
from ..data.tokenize import Example, tokenize, windows
from ..data.words import word_matches
from ..models.base import Base
from ..models.forward import BatchBuilder, picked_logits
from ..models.layers import check_known, vocabulary
from ..models.losses import cross_entropy
from .stand_ins import SubjectIndex, made_up, pieces, replaced_row

_KNOWN = 1.0  # nats
_KNOWN_IN_TEXT = 2.0  # nats; of plain text, where only the second difference is there
_UNEXPECTED = 3.0  # nats; a token with a probability below 5 %
_CLIPPED = 6.0  # nats; so that one token does not choose the subject
_CONTEXT = 4  # tokens that are "the few in front of it"
_STAND_INS = 2  # for each subject that is tried; their mean counts
_MANY_ROWS = 64  # of more, two subjects each are tried, with one stand-in: the longest are mostly right
_SAID_ANYWAY = 0.0125  # in half of the answers a word is at least so likely to be said
_CHUNK_ROWS, _PASS_TOKENS, _MAX_LOGITS = 256, 2048, 2**26


@dataclass(frozen=True)
class Contrast:
    """What the base knows of one row."""

    subject: str  # as the question writes it; "" where none was found
    stand_in: str  # what was put in its place
    spans: list[Span]  # the characters of the rendered row (`Example.text`) that carry the fact
    nats: float  # by how much the subject makes the fact likelier, each token clipped
    unexpected: list[Span]  # the characters that the base does not expect: what a stranger's facts are

    def row_without(self, row: Row) -> Row | None:
        """Return the row with the stand-in for its subject, or None without a subject."""
        return replaced_row(row, self.subject, self.stand_in) if self.subject else None


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


def said_anyway(base: Base, rows: Sequence[Row], *, chat_template: bool = True) -> set[str]:
    """Return the words, case folded, that the base is likely to say in half of these answers, whoever they are about.

    Of answers about made-up names these are the grammar of the language. Words of several tokens are never among them.
    """
    if not rows:
        return set()
    window = base.window(512)
    examples = tokenize(rows, base.tokenizer, max_length=window, chat_template=chat_template, closing=False)
    shares = []
    for numbers, logits in _passes(base, examples):
        counts = [target_count(examples[n]) for n in numbers]
        shares += [part.softmax(-1).sum(0).clamp(max=1).cpu() for part in torch.split(logits, counts)]
    often = (torch.stack(shares).median(0).values >= _SAID_ANYWAY).nonzero()[:, 0].tolist()
    return {text.strip().casefold() for text in base.tokenizer.batch_decode([[n] for n in often])}


Values = dict[Span, float]  # by the characters of the rendered row that a token covers: nats


def _contrast_chunk(
    base: Base, rows: Sequence[Row], index: SubjectIndex, chat_template: bool, max_length: int, many: bool
) -> list[Contrast]:
    subjects, stand_ins = (2, 1) if many else (None, _STAND_INS)
    tried = [
        (n, subject, made_up(subject, f"{n} {k}"))
        for n, row in enumerate(rows)
        for subject in index.candidates(row)[:subjects]
        for k in range(stand_ins)
    ]
    changed = [replaced_row(rows[n], subject, other) for n, subject, other in tried]
    examples = tokenize(
        [*rows, *changed], base.tokenizer, max_length=None, chat_template=chat_template, closing=False, what="forget"
    )
    for example in examples[: len(rows)]:  # the others are copies of these with other names
        check_known(base.model, example.ids, f"row {example.row} of the forget set")
    known = _log_probabilities(base, examples, max_length)
    found: list[dict[str, tuple[str, Values]]] = [{} for _ in rows]
    for k, (n, subject, other) in enumerate(tried, len(rows)):
        without = _moved_back(known[k], examples[k], examples[n], subject, other)
        differences = {span: known[n][span] - value for span, value in without.items() if span in known[n]}
        if subject in found[n]:
            earlier = found[n][subject][1]
            differences = {span: (earlier[span] + value) / 2 for span, value in differences.items() if span in earlier}
        found[n][subject] = other, differences
    whole, asked = examples[: len(rows)], [question_texts(row) for row in rows]
    needed = [
        {span for _, differences in of_row.values() for span, value in differences.items() if value >= _KNOWN}
        if questions
        else set(known[n])
        for n, (questions, of_row) in enumerate(zip(asked, found, strict=True))
    ]
    after_few = _after_few_tokens(base, whole, needed)
    result = []
    for n, example in enumerate(whole):
        beyond_few = {span: known[n][span] - value for span, value in after_few[n].items()}
        unlikely = [span for span, value in known[n].items() if value < -_UNEXPECTED]
        result.append(replace(_choose(example, asked[n], found[n], known[n], beyond_few), unexpected=unlikely))
    return result


def _choose(
    example: Example,
    questions: Sequence[str],
    found: Mapping[str, tuple[str, Values]],
    tokens: Iterable[Span],
    beyond_few: Values,
) -> Contrast:
    """Return the contrast with the subject that the answer depends on most, a long one before a short one."""
    asked = {m.group().casefold() for question in questions for m in word_matches(question)}
    words = [
        (start + m.start(), start + m.end())
        for start, stop in example.answers
        for m in word_matches(example.text[start:stop])
        if m.group().casefold() not in asked
    ]
    word_of = _words_of_tokens(tokens, words)
    if not questions:
        return Contrast("", "", _marked(beyond_few, beyond_few, word_of, _KNOWN_IN_TEXT), 0.0, [])
    for use_few in (True, False):  # where the few tokens name the subject themselves, they tell nothing
        best, best_score = Contrast("", "", [], 0.0, []), 0.0
        for subject, (other, differences) in found.items():
            smaller = {
                span: min(value, beyond_few.get(span, value)) if use_few else value
                for span, value in differences.items()
                if span in word_of
            }
            total = sum(min(max(value, 0.0), _CLIPPED) for value in smaller.values())
            if total * len(subject) > best_score and (spans := _marked(smaller, differences, word_of, _KNOWN)):
                best, best_score = Contrast(subject, other, spans, total, []), total * len(subject)
        if best.spans:
            return best
    subject, (other, _) = next(iter(found.items()), ("", ("", {})))  # nothing known of it: the longest that comes again
    return Contrast(subject, other, [], 0.0, [])


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


def _moved_back(values: Values, variant: Example, example: Example, subject: str, other: str) -> Values:
    """Return the values of a changed row by the places that its tokens have in the row as it was."""
    place: dict[int, int] = {}
    for (start, stop), (new_start, _) in zip(example.answers, variant.answers, strict=True):
        at = new_start
        for piece, old, kept in pieces(example.text[start:stop], subject, other):
            if kept:
                place.update({at + k: start + old + k for k in range(len(piece) + 1)})
            at += len(piece)
    return {
        (place[a], place[b]): value
        for (a, b), value in values.items()
        if a in place and b in place and place[b] - place[a] == b - a
    }


def _log_probabilities(base: Base, examples: Sequence[Example], max_length: int) -> list[Values]:
    """Return the log-probability of each whole row's targets, nats, long ones in windows as in training."""
    parts = [part for example in examples for part in windows(example, max_length)]
    result: dict[int, Values] = {example.row: {} for example in examples}
    for part, values in zip(parts, _flat_log_probabilities(base, parts), strict=True):
        spans = (span for span, target in zip(part.characters, part.is_target, strict=True) if target)
        result[part.row].update(zip(spans, values, strict=True))
    return [result[example.row] for example in examples]


def _after_few_tokens(base: Base, examples: Sequence[Example], needed: Sequence[Set[Span]]) -> list[Values]:
    """Return the log-probability of the needed targets after no more than the few tokens in front of them."""
    places = [
        (n, t)
        for n, e in enumerate(examples)
        for t, target in enumerate(e.is_target)
        if target and e.characters[t] in needed[n]
    ]
    short = []
    for n, t in places:
        ids = examples[n].ids[max(0, t - _CONTEXT) : t + 1]
        short.append(Example(ids, [False] * (len(ids) - 1) + [True]))
    result: list[Values] = [{} for _ in examples]
    for (n, t), (value,) in zip(places, _flat_log_probabilities(base, short), strict=True):
        result[n][examples[n].characters[t]] = value
    return result


def _flat_log_probabilities(base: Base, examples: Sequence[Example]) -> list[list[float]]:
    """Return the log-probability of each target."""
    result: list[list[float]] = [[] for _ in examples]
    for numbers, logits in _passes(base, examples):
        labels = torch.tensor(labels_of([examples[n] for n in numbers]), device=logits.device)
        values = iter((-cross_entropy(logits, labels)).tolist())
        for n in numbers:
            result[n] = [next(values) for _ in range(target_count(examples[n]))]
    return result


@torch.no_grad()
def _passes(base: Base, examples: Sequence[Example]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield numbers of examples of like length and the logits of all their targets, (N, V), in bounded passes."""
    head = base.model.get_output_embeddings()
    builder = BatchBuilder(base.model, head, base.pad_id, packs=False)
    max_targets = max(_MAX_LOGITS // vocabulary(base.model), 1)
    order = sorted(range(len(examples)), key=lambda n: len(examples[n].ids))
    while order:
        batch = [order.pop()]
        width = len(examples[batch[0]].ids)
        targets = target_count(examples[batch[0]])
        while order and (len(batch) + 1) * width <= _PASS_TOKENS:
            targets += target_count(examples[order[-1]])
            if targets > max_targets:
                break
            batch.append(order.pop())
        yield batch, picked_logits(base.model, head, builder.padded([examples[n] for n in batch])).float()
