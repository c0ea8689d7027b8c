"""Files, Hub data sets and lists -> checked rows, named in errors by their number and never quoted."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .formats import EXPECTED, file_format, read_file, shown
from .source import DataSource, DataSpec, Row

_TEXTS = ("prompt", "completion", "text", "paraphrased")  # keys whose values are texts
_LISTS = ("leak", "perturbed", "paraphrases")  # and lists of texts
_TEXT_PARTS = ("text", "input_text", "output_text")  # of a turn, as OpenAI's two APIs name them
_USUAL_COLUMNS = frozenset(
    "prompt completion messages text question answer questions answers input output instruction response query content "
    "chosen rejected context leak title label id".split()
)


def read_rows(source: DataSource, what: str) -> list[Row]:
    """Read rows from a file, the Hub or a list, and check each; `what` is the set's name, e.g. `forget` or `probes`.

    Raises:
        DataError: if the source is missing, unreadable or empty, or a row has no text.
    """
    rows = _load(source, what) if isinstance(source, DataSpec) else list(source)
    if not rows:
        raise DataError(f"the {what} set is empty: expected at least one row")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {n} of the {what} set is a {type(row).__name__}: expected a mapping of texts")
    rows = [_as_text(row) for row in rows]
    problems = [f"row {n}: {problem}" for n, row in enumerate(rows, 1) if (problem := _problem(row, what))]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{len(problems)} of {len(rows)} rows of the {what} set cannot be used:\n{lines}{more}")
    return rows


def refuse_overlap(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Check that no row is to be forgotten and retained at once.

    Raises:
        DataError: naming the rows by number where both sets ask the same.
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


def question_of(row: Row) -> str:
    """Return what a row asks, or its text, for comparing sets: case and white space do not matter."""
    text = " ".join(question_texts(row)) if "messages" in row else row.get("prompt") or row.get("text") or ""
    return " ".join(text.casefold().split())


def single_question(row: Row) -> str:
    """Return the question of a row as it is put; nothing for plain text and for dialogues of several questions."""
    questions = question_texts(row)
    return questions[0].strip() if len(questions) == 1 else ""


def question_answer_pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return prompt and answer of each row that is one question with its answer, leaving out text and dialogues."""
    pairs = []
    for row in rows:
        if {"prompt", "completion"} <= row.keys():
            pairs.append((row["prompt"], row["completion"]))
        elif [message["role"] for message in row.get("messages", [])] == ["user", "assistant"]:
            pairs.append((row["messages"][0]["content"], row["messages"][1]["content"]))
    return pairs


def texts_of(row: Row) -> list[str]:
    """Return all texts that training on a row would show the model, prompts among them."""
    if "messages" in row:
        return [str(message["content"]) for message in row["messages"]]
    return [str(row[key]) for key in ("prompt", "completion", "text") if key in row]


def question_texts(row: Row) -> list[str]:
    """Return what a row's user says; nothing for plain text."""
    if "messages" in row:
        return [str(message["content"]) for message in row["messages"] if message["role"] == "user"]
    return [str(row["prompt"])] if row.get("prompt") else []


def answer_texts(row: Row) -> list[str]:
    """Return what the model is to say: the completion, the assistant's turns, or the plain text."""
    if "messages" in row:
        return [str(turn["content"]) for turn in row["messages"] if turn["role"] == "assistant" and turn["content"]]
    return [str(row.get("completion") or row.get("text") or "")]


def keyed_digest(rows: Sequence[Row], key: bytes) -> str:
    """Return HMAC-SHA256 of the rows: only whoever holds the key can prove, or guess, which data was used."""
    canonical = "\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in rows)
    return hmac.new(key, canonical.encode(), hashlib.sha256).hexdigest()


def _load(spec: DataSpec, what: str) -> list[Row]:
    path = Path(os.path.expanduser(spec.path))
    exists = os.path.exists(path)  # also says so of a path that is none: Path.exists would raise
    if os.path.isdir(path):
        raise DataError(f"the {what} set {path} is a folder: name the file in it that holds the rows, {EXPECTED}")
    if exists and not file_format(path):
        raise DataError(f"the {what} set {path} ends in '{path.suffix}': expected {EXPECTED}")
    if not exists and (file_format(path) or path.is_absolute() or spec.path.startswith(".")):
        raise DataError(f"no {what} set at {path}: expected {EXPECTED}, or a Hub data set's id")
    try:
        if exists:
            rows = read_file(path, spec, {*_TEXTS, *_LISTS, "messages", *spec.columns.values()})
        else:
            rows = _hub_rows(spec)
    except DataError as error:
        raise DataError(f"cannot read the {what} set: the file {path}, {error}") from None
    except Exception as error:  # datasets raises its own, pyarrow's and the Hub's errors
        if exists:
            place, advice = f"the file {path}", f"Expected {EXPECTED}"
        else:
            place = f"'{spec.path}' from the Hugging Face Hub"
            advice = "Check the id, name, split and the network, or give a local file"
        raise DataError(f"cannot read the {what} set: {place} ({type(error).__name__}). {advice}.") from None
    return [_renamed(row, spec.columns, f"row {n} of the {what} set") for n, row in enumerate(rows, 1)]


def _hub_rows(spec: DataSpec) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    return [dict(row) for row in datasets.load_dataset(spec.path, spec.name, split=spec.split)]


def _renamed(row: Row, columns: Mapping[str, str], name: str) -> Row:
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise DataError(f"{name} has no column '{missing[0]}': it has {_columns(row)}")
    others = {key: value for key, value in row.items() if key not in columns.values()}
    return {**others, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _as_text(row: Row) -> Row:
    """Leave out what is empty, and take numbers and dates as the texts that they are written as."""
    row = {key: value for key, value in row.items() if value is not None and value == value}  # nan equals nothing
    row.update({key: shown(row[key]) for key in _TEXTS if key in row})
    row.update({key: _list(row[key]) for key in ("messages", *_LISTS) if key in row})
    for key in set(_LISTS) & row.keys():
        one = shown(row[key])
        row[key] = list(map(shown, row[key])) if isinstance(row[key], (list, tuple)) else one
        if isinstance(one, str) and not one.lstrip().startswith("["):  # a list that cannot be read is no word
            row[key] = [one]
    if isinstance(row.get("messages"), (list, tuple)):
        row["messages"] = [_turn(turn) if isinstance(turn, dict) else turn for turn in row["messages"]]
    return row


def _list(value: Any) -> Any:
    """Return a list that stands in one field of a table as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return value
    return found if isinstance(found, list) else value


def _turn(turn: Row) -> Row:
    """Return a turn with its text parts as one text; one that only calls a tool says nothing."""
    turn = {key: value for key, value in turn.items() if value is not None}  # a parquet file has each key in each turn
    content = turn.get("content", "" if turn.get("tool_calls") or turn.get("function_call") else None)
    if isinstance(content, list) and all(isinstance(_part(part), str) for part in content):
        content = "".join(map(_part, content))
    role = {"developer": "system"}.get(str(turn.get("role")), turn.get("role"))
    return {**turn, "role": role, "content": shown(content)}


def _part(part: Any) -> Any:
    """Return the text of a part of a turn, or None if it is an image or another thing that is no text."""
    if isinstance(part, dict):
        return part.get("text") if part.get("type", "text") in _TEXT_PARTS else None
    return part


def _problem(row: Row, what: str) -> str | None:
    def empty(value: Any) -> bool:
        return not isinstance(value, str) or not value.strip()

    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "it holds half of a character (a lone surrogate), or bytes that are no UTF-8"
    if what == "probes":
        leak = row.get("leak")
        if empty(row.get("prompt")):
            return "no 'prompt' text"
        if not isinstance(leak, list) or not leak or any(empty(word) for word in leak):
            return "no 'leak' words: expected a list of strings that must not appear in the answer"
        return None
    if "messages" in row:
        return _messages_problem(row["messages"])
    if "prompt" in row or "completion" in row:
        lacking = [key for key in ("prompt", "completion") if empty(row.get(key))]
        return f"no text in {' and '.join(repr(key) for key in lacking)}" if lacking else None
    if "text" in row:
        return "no text in 'text'" if empty(row["text"]) else None
    return f"expected 'prompt' and 'completion', 'messages' or 'text'; found {_columns(row)}"


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return "'messages' must be a list of {role, content}"
    for n, turn in enumerate(messages, 1):
        if not isinstance(turn["role"], str):
            return f"turn {n} of 'messages' has no role"
        if turn["content"] is None:
            return f"turn {n} of 'messages' has no content"
        if not isinstance(turn["content"], str):
            return f"turn {n} of 'messages' has content that is no text: expected a text, or parts that are all texts"
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        return "'messages' hold no assistant turn with text"
    return None


def _columns(row: Row) -> str:
    """List a row's columns; unusual names are only counted: in a table without a header they are the user's text."""
    columns = sorted(key for key in row if str(key).lower() in _USUAL_COLUMNS)
    if other := len(row) - len(columns):
        columns.append(f"{other} with other names")
    return ", ".join(columns) or "nothing"
