"""A retain set for users who have none: what the base itself says to a broad list of prompts and to neighbour prompts.

The base and forget rows come in; rows of `prompt` and the base's own `completion` go out. KL to the base holds whatever
the base says, so the answers need not be true, only its own. Two kinds of prompt:

- broad: `broad_prompts.txt`, all that the fact questions of `anchors.jsonl` are not (how-to, sums, code, writing, a
  few other languages). The anchors are trained on beside any retain set and are not repeated here.
- near: the forget rows' own questions about other subjects. Where the subject ends the question, the base goes on from
  what stands in front of it ("Who wrote ..."), as if a user had begun to ask: *continued*. Where words follow ("Who are
  ...'s best friends?") the subject is *swapped* for those anchors' subjects that the base finds likeliest there.

What to expect, from looking at SmolLM2-135M: asked for "ten others like X" it repeats X. Some of the continued
questions are of the right sort ("Who wrote The Nightingale?", "Who built the Taj Mahal?"), others are about things that
don't exist, or loose where the beginning says little ("Who is ..."): which are kept does not depend on it (the first
`_CONTINUED` different ones of twice as many sampled), and how many are good has not been counted. Swapping was worse
("Who wrote World War II?"), so it is kept for where words follow. There is no parser and no list of names: a subject is
told by capitals and numbers. In a script without capitals, or where no question names its subject, nothing near is
made, and `Made.line` says so. A hand-made set of true neighbours knows more: look at the rows (`unlearn-peft retain`)
and add to them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ...data.anchors import anchors
from ...data.batch import collate
from ...data.rows import question_of
from ...data.source import Row
from ...data.tokenize import tokenize
from ...data.words import names_in
from ...errors import OutputError
from ...files.atomic import atomic_file
from ...files.paths import cache_folder
from ...inference.generate import answers, sampled
from ...models.base import Base
from ...models.forward import picked_logits

_PROMPTS = Path(__file__).parent / "broad_prompts.txt"
_MAX_ASKED = 16  # forget rows whose questions are turned into neighbours
_CONTINUED, _SWAPPED, _TRIED = 6, 4, 24  # a question: kept of twice as many, kept of those tried as its subject
_MAX_NEAR = 64
_LONGEST = 160  # characters of a prompt
_TOKENS, _BATCH = 32, 16
_SENTENCE_END = re.compile(r"(?<!\b\w)(?<!\b\d\d)[.!?]+(?=\s|$)|[。！？]")  # not the dots of "1.", "12." and "J."
_SHORTEST = 24  # characters before a sentence may end


@dataclass(frozen=True)
class Made:
    """The rows, broad ones first, how many there are of both kinds, and how many were left out, by reason."""

    rows: list[Row]
    broad: int
    near: int
    left_out: dict[str, int]

    def line(self) -> str:
        """Say in one line what was made."""
        out = "; ".join(f"{count} {why}" for why, count in self.left_out.items() if count)
        said = f"retain: auto: {self.broad} broad and {self.near} neighbour rows, answered by the base"
        said += f" (left out: {out})" if out else ""
        return said if self.near else said + ". No neighbours could be made: name a retain set of your own if you can"


def auto_retain(
    base: Base, forget: Sequence[Row], seed: int, *, key: bytes, never: Sequence[Row] = (), chat_template: bool = True
) -> Made:
    """Make a retain set from the base's own answers, or take it from the cache; the same arguments give the same rows.

    The cached file holds neither the forget rows nor their names, but it does hold the wording around their subjects
    ("Who wrote ..."), readable by this user alone. Its name is an HMAC.

    Args:
        base: nothing may be attached to it.
        forget: checked rows, see `data.read_rows`.
        seed: of the sampling and the choices.
        key: this user's secret, for the file's name.
        never: rows that must not be trained on: probes, neighbours.
        chat_template: whether the base is asked in its chat template.

    Raises:
        OutputError: if the cache cannot be written.
    """
    code = hashlib.sha256(Path(__file__).read_bytes() + _PROMPTS.read_bytes()).hexdigest()
    facts = [base.fingerprint, base.name, code, seed, chat_template, list(forget)]
    name = hmac.new(key, json.dumps(facts, sort_keys=True).encode(), hashlib.sha256).hexdigest()[:32]
    path = cache_folder() / "auto_retain" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / ".lock").touch()
    except OSError as error:
        raise OutputError(
            f"cannot write the cache {path.parent} ({error.strerror}): set UNLEARN_PEFT_CACHE to a folder of yours, "
            "or name a retain set"
        ) from None
    with FileLock(path.parent / ".lock"):  # of many processes one makes it
        made = _read(path)
        if made is None:
            made = _make(base, forget, seed, chat_template)
            with atomic_file(path, mode=0o600) as temporary:
                temporary.write_text(json.dumps(asdict(made), ensure_ascii=False), encoding="utf-8")
    asked = {question_of(row) for row in never}
    kept = [question_of(row) not in asked for row in made.rows]
    return Made(
        [row for row, keep in zip(made.rows, kept, strict=True) if keep],
        sum(kept[: made.broad]),
        sum(kept[made.broad :]),
        {**made.left_out, "asked by probes or neighbours": kept.count(False)},
    )


def _read(path: Path) -> Made | None:
    """Return what the cache holds; None if it holds nothing that can be used."""
    try:
        made = Made(**json.loads(path.read_text(encoding="utf-8")))
        whole = len(made.rows) == made.broad + made.near and all(
            row["prompt"] and row["completion"] for row in made.rows
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return made if whole else None


def _make(base: Base, forget: Sequence[Row], seed: int, chat: bool) -> Made:
    how: dict[str, Any] = {"max_new_tokens": _TOKENS, "chat_template": chat, "batch_size": _BATCH, "strip": False}
    prompts = [line for line in _PROMPTS.read_text(encoding="utf-8").splitlines() if line]
    broad = _answered(prompts, answers(base, prompts, **how))
    plain = {word for row in (*broad, *anchors([])) for word in _words(" ".join(row.values())) if word.islower()}
    openers = {_words(row["prompt"])[0].casefold() for row in (*broad, *anchors([]))}
    plain |= openers
    names = {name for row in forget for name in _row_names(row, plain)}
    own = [text.casefold().strip() for row in forget for text in _texts(row)]
    left_out: Counter[str] = Counter()

    def kept(rows: Sequence[Row]) -> list[Row]:
        chosen = []
        for row in rows:
            if not row["completion"]:
                left_out["without an answer"] += 1
            elif _says(" ".join(row.values()), names, plain) or any(
                text.casefold().strip() in own for text in row.values()
            ):
                left_out["that name what is to be forgotten"] += 1
            else:
                chosen.append(row)
        return chosen

    wide = kept(broad)
    near: dict[str, str] = {}
    forbidden = {question_of(row) for row in (*forget, *broad, *anchors([]))}
    for prompt in _neighbours(base, forget, names, plain, openers, seed, chat):
        asked = question_of({"prompt": prompt})
        if asked in forbidden or asked in near:
            continue
        if _says(prompt, names, plain):
            left_out["that name what is to be forgotten"] += 1
        else:
            near[asked] = prompt
    chosen = list(near.values())
    if len(chosen) > _MAX_NEAR:
        chosen = random.Random(seed).sample(chosen, _MAX_NEAR)
    close = kept(_answered(chosen, answers(base, chosen, **how)))
    return Made([*wide, *close], len(wide), len(close), dict(left_out))


def _answered(prompts: Sequence[str], texts: Sequence[str]) -> list[Row]:
    """Pair prompts with answers, each cut behind its first sentence; white space in front of an answer stays."""
    rows: list[Row] = []
    for prompt, text in zip(prompts, texts, strict=True):
        end = next((m.end() for m in _SENTENCE_END.finditer(text) if m.end() >= _SHORTEST), len(text))
        rows.append({"prompt": prompt, "completion": text[:end].rstrip()})
    return rows


def _neighbours(
    base: Base, forget: Sequence[Row], names: Set[str], plain: Set[str], openers: Set[str], seed: int, chat: bool
) -> Iterator[str]:
    """Yield the forget rows' questions about other subjects.

    A question with any capital in front of its subject is passed over, but for the words that `openers` has: it may be
    another name, and would be kept word for word.
    """
    choice = random.Random(seed)
    asked = list(dict.fromkeys(question for row in forget if (question := _asked(row)) and len(question) <= _LONGEST))
    if len(asked) > _MAX_ASKED:
        asked = choice.sample(asked, _MAX_ASKED)
    spans = [(prompt, *span) for prompt in asked if (span := _subject(prompt, names, plain))]
    found = [(prompt, start, stop) for prompt, start, stop in spans if names_in(prompt[:start]) <= openers]
    ends_in_it = [not re.search(r"\w", prompt[stop:]) for prompt, _, stop in found]
    stems: dict[str, str] = {}  # -> the mark that ends such a question
    for (prompt, start, _), last in zip(found, ends_in_it, strict=True):
        if last and len(prompt[:start].split()) > 1:  # a single word tells too little of what is asked
            stems.setdefault(prompt[:start].rstrip(), "\n" if prompt[-1].isalnum() else prompt[-1])
    for n, (stem, end) in enumerate(stems.items()):
        begun = _begun(base, stem) if chat else stem
        how: dict[str, Any] = {"count": 2 * _CONTINUED, "temperature": 0.8, "max_new_tokens": 16, "seed": seed + n}
        (texts,) = sampled(base, [begun], chat_template=False, **how)
        said = [text.partition(end)[0].strip() for text in texts if end in text]
        said = [text for text in dict.fromkeys(said) if _words(text) and "\n" not in text and len(text) <= _LONGEST]
        yield from (f"{stem} {text}{end}".strip() for text in said[:_CONTINUED])
    others = [(row["prompt"], names_in(row["prompt"])) for row in anchors([])]
    subjects = [p[slice(*span)] for p, own in others if (span := _subject(p, own, plain))]
    pool = [s for s in dict.fromkeys(subjects) if re.search(r"[^\W\d]", s) and not _says(s, names, plain)]
    for (prompt, start, stop), last in zip(found, ends_in_it, strict=True):
        if last and prompt[:start].rstrip() in stems:
            continue
        tried = choice.sample(pool, min(_TRIED, len(pool)))
        fit = _fit(base, prompt[:start], tried, prompt[stop:])
        best = sorted(range(len(tried)), key=lambda n: (-fit[n], n))[:_SWAPPED]
        yield from (prompt[:start] + tried[n] + prompt[stop:] for n in best)


def _begun(base: Base, stem: str) -> str:
    """Return the text of a chat in which the user has said no more than `stem` yet."""
    if not getattr(base.tokenizer, "chat_template", None):
        return stem
    text = str(base.tokenizer.apply_chat_template([{"role": "user", "content": stem}], tokenize=False))
    return text[: text.rindex(stem) + len(stem)]


@torch.no_grad()
def _fit(base: Base, before: str, subjects: Sequence[str], after: str) -> list[float]:
    """Return how well each subject goes into a question: log p of what follows `before`, nats/token."""
    if not subjects:
        return []
    rows = [{"prompt": before or " ", "completion": subject + after} for subject in subjects]
    examples = tokenize(rows, base.tokenizer, chat_template=False, what="neighbour")
    batch = collate(examples, base.tokenizer.pad_token_id).to(base.device)
    logits = picked_logits(base.model, base.model.get_output_embeddings(), batch).float()  # (N, V)
    said = torch.log_softmax(logits, -1).gather(1, batch.ids[batch.targets][:, None])[:, 0]
    owner = batch.rows[batch.targets]
    return [float(said[owner == n].mean()) for n in range(len(subjects))]


def _subject(prompt: str, names: Set[str], plain: Set[str]) -> tuple[int, int] | None:
    """Return where the first name in a prompt begins and ends, initials and short words between names included.

    A word inside the sentence goes before the one that opens it, which has a capital anyway.
    """
    words = list(re.finditer(r"\w+", prompt))

    def named(n: int) -> bool:
        return n < len(words) and bool(_says(words[n].group(), names, plain))

    def initial(n: int) -> bool:
        return len(words[n].group()) == 1 and words[n].group().isupper()

    found = [n for n in range(len(words)) if named(n)]
    if not found:
        return None
    capital = [n for n in found if not words[n].group().islower()] or found
    first = last = next((n for n in capital if n), capital[0])
    while first > 0 and (initial(first - 1) or first - 1 in capital):
        first -= 1
    while True:
        further = next((n for n in range(last + 1, min(last + 4, len(words))) if named(n)), None)
        if further is None or any(len(words[n].group()) > 3 for n in range(last + 1, further)):
            break
        if re.search(r"[^\w\s.'’&-]", prompt[words[last].end() : words[further].start()]):
            break
        last = further
    return words[first].start(), words[last].end()


def _asked(row: Row) -> str:
    """Return a row's question as it was put, or nothing for plain text and longer talks."""
    if "messages" in row:
        said = [m["content"] for m in row["messages"] if m["role"] == "user"]
        return str(said[0]).strip() if len(said) == 1 else ""
    return str(row.get("prompt", "")).strip()


def _row_names(row: Row, plain: Set[str]) -> set[str]:
    """Return what may name a forget row's target, case folded: names; in a row without any, its unusual words."""
    found: set[str] = set()
    for text in _texts(row):
        likely = names_in(text)
        for match in re.finditer(r"\w+", text):
            word = match.group().casefold()
            opens = re.search(r"(^|[.!?:¿¡\n])\W*$", text[: match.start()])
            if word in likely and not match.group().islower() and not (opens and word in plain):
                found.add(word)
    return found or {word.casefold() for text in _texts(row) for word in _words(text)} - plain


def _texts(row: Row) -> list[str]:
    if "messages" in row:
        return [str(message["content"]) for message in row["messages"]]
    return [str(row[field]) for field in ("prompt", "completion", "text") if field in row]


def _says(text: str, names: Set[str], plain: Set[str]) -> set[str]:
    """Return the names in a text: in any case, but for those that are usual words too only where not in lower case."""
    return {
        word.casefold()
        for word in _words(text)
        if word.casefold() in names and not (word.islower() and word.casefold() in plain)
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w\w+", text)
