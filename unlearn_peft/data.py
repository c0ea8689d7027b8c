"""Forget and retain rows -> token ids, with a mask of the tokens that the losses are about.

Rows come as `prompt`/`completion`, `messages` or `text`, from jsonl, csv, parquet or Hub data sets. No error
or log line of this file ever quotes a row: rows are named by their number.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .recipe import DataSource, DataSpec

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ANCHORS = Path(__file__).parent / "anchors.jsonl"
_NO_NAMES = set("who what which where when why how the a an in on it is name complete tell give write".split())
_USUAL_COLUMNS = frozenset(
    "prompt completion messages text question answer questions answers input output instruction response query content "
    "chosen rejected context leak title label id".split()
)
logger = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row as tokens; `is_target[t]` says whether the losses count token t (never the first)."""

    ids: list[int]
    is_target: list[bool]
    truncated: bool = False
    words: list[str] | None = None  # the word that each token is a part of, case folded; "" for none
    specific: list[bool] | None = None  # of the targets, those that carry the fact (see specific.py); None: all
    refusal: Example | None = None  # the same question answered by a refusal (see refusals.py)


def read_rows(source: DataSource, what: str) -> list[Row]:
    """Read rows from a file, the Hub or a list, and check that each can be used.

    Args:
        source: where the rows are.
        what: `forget`, `retain`, `probes` or `neighbours`; named in errors.

    Raises:
        DataError: if the source is missing, unreadable or empty, or a row has no text.
    """
    rows = _load(source, what) if isinstance(source, DataSpec) else [dict(row) for row in source]
    if not rows:
        raise DataError(f"the {what} set is empty: expected at least one row")
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    problems = [f"row {n}: {problem}" for n, row in enumerate(rows, 1) if (problem := _problem(row, what))]
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{len(problems)} of {len(rows)} rows of the {what} set cannot be used:\n{shown}{more}")
    return rows


def anchors(forget: Sequence[Row], *never: Sequence[Row]) -> list[Row]:
    """Return the package's own rows on the wide world, without those that share a name with a forget row.

    A retain set that an erasure request comes with is often small and all about one thing; these rows hold the
    rest of the model where it is. Rows that `never` may be trained on are left out too.
    """
    rows: list[Row] = [json.loads(line) for line in _ANCHORS.read_text(encoding="utf-8").splitlines()]
    names = {name for row in forget for name in names_in(json.dumps(row, ensure_ascii=False))}
    asked = {question_of(row) for rows_ in never for row in rows_}
    return [row for row in rows if not names & names_in(" ".join(row.values())) and question_of(row) not in asked]


def refuse_overlap(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Check that nothing is to be forgotten and retained at once.

    Raises:
        DataError: naming the rows by number where both sets ask the same thing.
    """
    seen = {question_of(row): n for n, row in enumerate(forget, 1)}
    pairs = [(seen[key], n) for n, row in enumerate(retain, 1) if (key := question_of(row)) in seen]
    if pairs:
        named = ", ".join(f"forget row {f} = retain row {r}" for f, r in pairs[:5])
        more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise DataError(
            f"the forget and retain sets overlap ({named}{more}): the same prompt cannot be forgotten and kept. "
            "Remove these rows from one of the two."
        )


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int = 512,
    train_on: str = "completion",
    chat_template: bool = True,
    closing: bool = True,
    what: str = "data",
) -> list[Example]:
    """Turn rows into token ids and target masks.

    The whole row is tokenised at once, as the model would meet it, and tokens are matched to the completion by
    their character offsets. A token that spans the border between prompt and completion is a target: it
    carries a part of the answer.

    Args:
        rows: checked rows, see `read_rows`.
        tokenizer: the base's; its chat template is used for `messages`, and for `prompt`/`completion` unless
            `chat_template` is False or it has none.
        max_length: longer rows are cut on the right, and counted in a warning.
        train_on: `completion`, or `all` to count prompt tokens too.
        chat_template: see above.
        closing: whether the end-of-turn marker counts. It should on the retain side (where to stop is worth
            keeping) and should not on the forget side (a model that forgets how to stop writes word salad).
        what: named in warnings and errors.

    Raises:
        DataError: if a row has no target token left after cutting, or the template rewrites earlier turns.
    """
    examples = []
    for n, row in enumerate(rows, 1):
        text, spans = _render(row, tokenizer, chat_template, closing, n, what)
        example = _encode(text, spans, tokenizer, max_length, train_on)
        if not any(example.is_target):
            why = f"cut at max_length={max_length}, " if example.truncated else ""
            raise DataError(
                f"row {n} of the {what} set has no token to learn from ({why}{len(example.ids)} tokens): "
                "raise max_length or shorten the prompt"
            )
        examples.append(example)
    cut = sum(example.truncated for example in examples)
    if cut:
        logger.warning(
            "%d of %d rows of the %s set are longer than %d tokens and were cut",
            cut,
            len(rows),
            what,
            max_length,
        )
    return examples


def chat_prompt(prompt: str, tokenizer: Any, chat_template: bool = True) -> str:
    """Return the text after which the model is to answer `prompt`."""
    if not chat_template or not getattr(tokenizer, "chat_template", None):
        return prompt
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    )


def keyed_digest(rows: Sequence[Row], key: bytes) -> str:
    """Return HMAC-SHA256 of the rows: whoever holds the key can prove which data was used, nobody else can guess."""
    canonical = "\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    return hmac.new(key, canonical.encode(), hashlib.sha256).hexdigest()


def _load(spec: DataSpec, what: str) -> list[Row]:
    import datasets

    path = Path(spec.path)
    file_format = _FILE_FORMATS.get(path.suffix.lower())
    if file_format and not path.is_file():
        raise DataError(f"no {what} set at {path}: expected a .jsonl, .csv or .parquet file, or a Hub data set's id")
    if path.is_file() and not file_format:
        raise DataError(f"the {what} set {path} ends in '{path.suffix}': expected .jsonl, .json, .csv or .parquet")
    if path.is_file() and path.stat().st_size == 0:
        return []
    datasets.disable_progress_bars()
    try:
        if file_format:
            # streamed: a copy of the forget set in a cache on disk would outlive the request to erase it
            table = datasets.load_dataset(file_format, data_files=str(path), split="train", streaming=True)
        else:
            table = datasets.load_dataset(spec.path, spec.name, split=spec.split)
        rows = [dict(row) for row in table]
    except Exception as error:  # datasets raises its own, pyarrow's and the Hub's errors
        place = f"the file {path}" if file_format else f"'{spec.path}' from the Hugging Face Hub"
        expected = (
            "Expected one JSON object a line (or a csv or parquet table)."
            if file_format
            else "Check the id, name, split and the network, or give a local file."
        )
        raise DataError(f"cannot read the {what} set: {place} ({type(error).__name__}). {expected}") from None
    for ours, theirs in spec.columns.items():
        for row in rows:
            if theirs not in row:
                raise DataError(f"the {what} set has no column '{theirs}': it has {_columns(row)}")
            row[ours] = row.pop(theirs)
    return rows


def _problem(row: Row, what: str) -> str | None:
    def empty(value: Any) -> bool:
        return not isinstance(value, str) or not value.strip()

    if what == "probes":
        leak = row.get("leak")
        if empty(row.get("prompt")):
            return "no 'prompt' text"
        if not isinstance(leak, list) or not leak or any(empty(word) for word in leak):
            return "no 'leak' words: expected a list of strings that must not appear in the answer"
        return None
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            return "'messages' must be a list of {role, content}"
        if not any(m["role"] == "assistant" and not empty(m["content"]) for m in messages):
            return "'messages' hold no assistant turn with text"
        return None
    if "prompt" in row or "completion" in row:
        lacking = [key for key in ("prompt", "completion") if empty(row.get(key))]
        return f"no text in {' and '.join(repr(key) for key in lacking)}" if lacking else None
    if "text" in row:
        return "no text in 'text'" if empty(row["text"]) else None
    return f"expected 'prompt' and 'completion', 'messages' or 'text'; found {_columns(row)}"


def _columns(row: Row) -> str:
    """Tell a row's columns; names that are not usual ones are only counted: a table without a header has text there."""
    usual = sorted(_USUAL_COLUMNS & row.keys())
    other = len(row) - len(usual)
    return ", ".join([*usual, *([f"{other} with other names"] if other else [])]) or "nothing"


def names_in(text: str) -> set[str]:
    """Return the words of a text that may name the target, case folded: those with a capital, and numbers.

    In a script without capitals it is every word: too many rather than too few.
    """
    return {word.casefold() for word in re.findall(r"\w\w+", text) if not word.islower()} - _NO_NAMES


def question_of(row: Row) -> str:
    """What a row asks, for comparing sets: case and white space do not matter."""
    if "messages" in row:
        asked = " ".join(str(m["content"]) for m in row["messages"] if m["role"] == "user")
    else:
        asked = row.get("prompt") or row.get("text") or ""
    return " ".join(asked.casefold().split())


Span = tuple[int, int]


def _render(row: Row, tokenizer: Any, chat_template: bool, closing: bool, n: int, what: str) -> tuple[str, list[Span]]:
    """Return the row's whole text and the character spans of its targets."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if "messages" in row or ("prompt" in row and chat_template and has_template):
        if not has_template:
            raise DataError(
                f"row {n} of the {what} set holds 'messages', but the base's tokenizer has no chat template: "
                "use 'prompt' and 'completion', or an instruction-tuned base"
            )
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return _render_chat(messages, tokenizer, closing, n, what)
    if "prompt" in row:
        return row["prompt"] + row["completion"], [(len(row["prompt"]), len(row["prompt"]) + len(row["completion"]))]
    return row["text"], [(0, len(row["text"]))]


def _render_chat(messages: Sequence[Row], tokenizer: Any, closing: bool, n: int, what: str) -> tuple[str, list[Span]]:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        content = message["content"].strip()
        start = whole.find(content, len(before))
        if not whole.startswith(before) or start < 0:
            raise DataError(
                f"row {n} of the {what} set: the chat template rewrites turn {i + 1}, so its tokens cannot be "
                "told apart. Give the row as 'prompt' and 'completion' with chat_template: false."
            )
        end = start + len(content)
        marker = tokenizer.eos_token or ""
        if closing and marker and whole.startswith(marker, end):
            end += len(marker)
        spans.append((start, end))
    return whole, spans


def _encode(text: str, spans: Sequence[Span], tokenizer: Any, max_length: int, train_on: str) -> Example:
    # A rendered template already holds its special tokens; plain text gets the tokenizer's own (a BOS, say).
    bos = getattr(tokenizer, "bos_token", None)
    add_special = not (bos and text.startswith(bos))
    coded = tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    if train_on == "all":
        is_target = [end > start for start, end in offsets]
    else:
        is_target = [any(start < right and end > left for left, right in spans) for start, end in offsets]
    is_target[:1] = [False] * len(is_target[:1])  # nothing precedes the first token that could predict it
    words = _words(text, offsets[:max_length])
    return Example(ids[:max_length], is_target[:max_length], truncated=len(ids) > max_length, words=words)


def _words(text: str, offsets: Sequence[Span]) -> list[str]:
    """Return the last word that each token has a part in."""
    at = [""] * len(text)
    for match in re.finditer(r"\w+", text):
        at[match.start() : match.end()] = [match.group().casefold()] * (match.end() - match.start())
    return [next((word for word in reversed(at[start:end]) if word), "") for start, end in offsets]
