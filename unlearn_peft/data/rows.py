"""Files, Hub data sets and lists -> checked rows, named in errors by their number and never quoted."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..errors import DataError
from .source import DataSource, DataSpec, Row

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_USUAL_COLUMNS = frozenset(
    "prompt completion messages text question answer questions answers input output instruction response query content "
    "chosen rejected context leak title label id".split()
)


def read_rows(source: DataSource, what: str) -> list[Row]:
    """Read rows from a file, the Hub or a list, and check each; `what` is the set's name, e.g. `forget` or `probes`.

    Raises:
        DataError: if the source is missing, unreadable or empty, or a row has no text.
    """
    rows = _load(source, what) if isinstance(source, DataSpec) else [dict(row) for row in source]
    if not rows:
        raise DataError(f"the {what} set is empty: expected at least one row")
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
        return [str(message["content"]) for message in row["messages"] if message["role"] == "assistant"]
    return [str(row.get("completion") or row.get("text") or "")]


def keyed_digest(rows: Sequence[Row], key: bytes) -> str:
    """Return HMAC-SHA256 of the rows: only whoever holds the key can prove, or guess, which data was used."""
    canonical = "\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    return hmac.new(key, canonical.encode(), hashlib.sha256).hexdigest()


def _load(spec: DataSpec, what: str) -> list[Row]:
    path = Path(spec.path)
    file_format = _FILE_FORMATS.get(path.suffix.lower())
    if file_format and not path.is_file():
        raise DataError(f"no {what} set at {path}: expected a .jsonl, .csv or .parquet file, or a Hub data set's id")
    if path.is_file() and not file_format:
        raise DataError(f"the {what} set {path} ends in '{path.suffix}': expected .jsonl, .json, .csv or .parquet")
    if path.is_file() and path.stat().st_size == 0:
        return []
    try:
        if file_format == "json":
            rows = _json_rows(path)
        elif file_format == "csv":
            rows = _csv_rows(path)
        else:
            rows = _table_rows(spec, path if file_format else None)
    except DataError as error:
        raise DataError(f"cannot read the {what} set: the file {path}, {error}") from None
    except Exception as error:  # datasets raises its own, pyarrow's and the Hub's errors
        if file_format:
            place, advice = f"the file {path}", "Expected one JSON object a line (or a csv or parquet table)"
        else:
            place = f"'{spec.path}' from the Hugging Face Hub"
            advice = "Check the id, name, split and the network, or give a local file"
        raise DataError(f"cannot read the {what} set: {place} ({type(error).__name__}). {advice}.") from None
    for ours, theirs in spec.columns.items():
        for row in rows:
            if theirs not in row:
                raise DataError(f"the {what} set has no column '{theirs}': it has {_columns(row)}")
            row[ours] = row.pop(theirs)
    return rows


def _json_rows(path: Path) -> list[Row]:
    """Read an object a line, or one list of objects; a text stays the text that it is, whatever it looks like."""
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        if first.startswith("["):
            values = list(enumerate(json.load(file), 1))
        else:
            values = []
            for n, line in enumerate(file, 1):
                if line.strip():
                    try:
                        values.append((n, json.loads(line)))
                    except ValueError:
                        raise DataError(f"line {n}: no JSON. Expected one JSON object a line") from None
    for n, value in values:
        if not isinstance(value, dict):
            raise DataError(f"line {n}: expected a JSON object, found {type(value).__name__}")
    return [value for _, value in values]


def _csv_rows(path: Path) -> list[Row]:
    """Read a table; every field is text, also `NA`, `True` and `0042`, and an empty one is none."""
    csv.field_size_limit(2**31 - 1)  # a page of a book is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    if wrong := [n for n, row in enumerate(rows, 1) if None in row]:
        raise DataError(f"row {wrong[0]}: more fields than the header has. Put texts that hold commas in quotes")
    return [{key: value or None for key, value in row.items()} for row in rows]


def _table_rows(spec: DataSpec, path: Path | None) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    if path:
        # streamed: a copy of the forget set in a cache on disk would outlive the request to erase it
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    else:
        table = datasets.load_dataset(spec.path, spec.name, split=spec.split)
    return [dict(row) for row in table]


def _as_text(row: Row) -> Row:
    """Leave out what is empty, and take numbers and dates as the texts that they are written as."""
    kinds = (int, float, Decimal, date)  # a datetime is a date
    return {
        key: str(value) if key in ("prompt", "completion", "text") and isinstance(value, kinds) else value
        for key, value in row.items()
        if value is not None and value == value  # nan, in a table's empty field, equals nothing
    }


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
    """List a row's columns; unusual names are only counted: in a table without a header they are the user's text."""
    columns = sorted(_USUAL_COLUMNS & row.keys())
    if other := len(row) - len(columns):
        columns.append(f"{other} with other names")
    return ", ".join(columns) or "nothing"
