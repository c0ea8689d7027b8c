"""Files, Hub data sets and lists -> checked rows, named in errors by their number and never quoted."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
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


def question_of(row: Row) -> str:
    """What a row asks, for comparing sets: case and white space do not matter."""
    if "messages" in row:
        asked = " ".join(str(m["content"]) for m in row["messages"] if m["role"] == "user")
    else:
        asked = row.get("prompt") or row.get("text") or ""
    return " ".join(asked.casefold().split())
