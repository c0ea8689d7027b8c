"""A file of rows as people have them (jsonl, json, csv, tsv, xlsx, parquet) -> its rows, with each text as one sees it.

Tables have no types here: `007`, `NA` and `1997-06-26` stay what is written. What does not fit is an error that names
its line or row, and nothing is left out but empty lines. Errors never quote a row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Sequence, Set
from datetime import date, datetime, time, timedelta
from numbers import Number
from pathlib import Path
from typing import Any

from ..errors import DataError
from .source import DataSpec, Row

_JSON, _TABLE = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
FORMATS = (*_JSON, *_TABLE, ".xlsx", ".parquet")
EXPECTED = "a .jsonl, .json, .csv, .tsv, .xlsx or .parquet file (each also as .gz)"
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_FIXED = re.compile(r"(?P<width>0+)(?:\.(?P<decimals>0+))?(?P<percent>%?)")  # number formats that say all of a number


def file_format(path: Path) -> str | None:
    """Return the ending that says how a file is written, or None if that is none of `FORMATS`."""
    ending = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    return ending if ending in FORMATS else None


def read_file(path: Path, spec: DataSpec, texts: Set[str]) -> list[Row]:
    """Read all rows of a file; `texts` names the columns that are read as text, whatever a table holds there.

    Raises:
        DataError: naming the line or row that cannot be read.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if not data.strip():
        return []
    ending = file_format(path)
    if ending == ".parquet":
        return _parquet(data, texts)
    if ending == ".xlsx":
        return _excel(data, spec.name, texts)
    text = _decoded(data, spec.encoding)
    return _json(text, texts) if ending in _JSON else _csv(text, "\t" if ending == ".tsv" else ",")


def shown(value: Any) -> Any:
    """Return a scalar as the text that a file or table shows for it; anything else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")  # what is no text is refused later, with its row
    if isinstance(value, datetime) and value.time() == time() and value.tzinfo is None:
        value = value.date()
    return str(value) if isinstance(value, (Number, date, time, timedelta)) else value


def _decoded(data: bytes, encoding: str | None) -> str:
    name = encoding or json.detect_encoding(data)  # tells UTF-8, 16 and 32 apart, with a mark in front or without
    try:
        text = data.decode(name).removeprefix("\ufeff")
    except LookupError:
        raise DataError(f"there is no encoding '{name}': expected a name such as cp1252 or utf-16") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        advice = "Save the file as UTF-8 (Excel: 'CSV UTF-8'), or say what it is, e.g. encoding: cp1252"
        raise DataError(f"line {line}: this is no {name.upper()} text. {advice}") from None
    if "\0" in text:
        raise DataError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1}: this is no text but binary data")
    return text


class _Written(float):
    """A number of a JSON file that is shown as it is written there: 1e5, 12.50."""

    def __new__(cls, text: str) -> _Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def _json(text: str, texts: Set[str]) -> list[Row]:
    """Read one object a line, or one list of objects, which may be the only list in an object."""

    def pairs(items: Sequence[tuple[str, Any]]) -> Row:
        row = dict(items)
        if len(row) < len(items):
            raise ValueError("one key stands twice in one object")
        return row

    decoder = json.JSONDecoder(
        object_pairs_hook=pairs, parse_float=_Written, parse_constant=lambda name: None if name == "NaN" else name
    )
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # no JSON string holds them as they are
    values: list[tuple[int, Any]] = []
    at, line = 0, 1
    while start := re.compile(r"\s*(?=\S)").match(text, at):
        line += text.count("\n", at, start.end())
        at = start.end()
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            n = error.lineno if text[at] == "[" else line  # of a list's fault; an object a line is named by its own
            raise DataError(f"line {n}: no JSON. Expected one JSON object a line, or one list of objects") from None
        except (ValueError, RecursionError) as error:  # its message quotes nothing
            raise DataError(f"line {line}: {error}") from None
        values.append((line, value))
        line += text.count("\n", at, end)
        at = end
    if len(values) == 1 and isinstance(values[0][1], dict) and not texts & values[0][1].keys():
        lists = [value for value in values[0][1].values() if isinstance(value, list)]
        if len(lists) > 1:
            raise DataError(f"an object with {len(lists)} lists: expected one list of rows")
        values = [(1, lists[0])] if lists else values
    rows: list[Row] = []
    for line, value in values:
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                place = f"row {len(rows) + 1}" if isinstance(value, list) else f"line {line}"
                raise DataError(f"{place}: expected a JSON object, found {type(item).__name__}")
            rows.append(item)
    return rows


def _csv(text: str, usual: str) -> list[Row]:
    """Read a table; its header tells what separates the fields, and whether a space follows that."""
    csv.field_size_limit(2**31 - 1)  # a page of a book is one field
    text = re.sub(r'\A"?sep=.?"?(?=\r?\n)', "", text)  # Excel's own

    def header(separator: str) -> list[str]:
        return next(filter(_says, csv.reader(io.StringIO(text, newline=""), delimiter=separator)), [])

    separator = max(_SEPARATORS, key=lambda one: (len(header(one)), one == usual))
    spaced = any(name.startswith(" ") for name in header(separator)[1:])
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=spaced)
    rows: list[list[str]] = []
    while True:
        place = f"row {len(rows)} (line {reader.line_num + 1})"
        try:
            record = next(reader, None)
        except csv.Error:
            advice = 'A text in quotes ends with a quote, and a quote inside it is written twice: ""'
            raise DataError(f"{place}: its quotes do not match. {advice}") from None
        if record is None:
            return _table(rows)
        if not _says(record):
            continue
        if rows and len(record) != len(rows[0]):
            advice = f"Put texts that hold a {_SEPARATORS[separator]} or a new line in quotes"
            more = "more" if len(record) > len(rows[0]) else "fewer"
            raise DataError(f"{place}: {more} fields than the header has ({len(record)}, {len(rows[0])}). {advice}")
        rows.append(record)


def _excel(data: bytes, sheet: str | None, texts: Set[str]) -> list[Row]:
    try:
        import openpyxl
    except ImportError:
        raise DataError("which needs openpyxl: pip install 'unlearn-peft[excel]', or save the sheet as csv") from None
    book = openpyxl.load_workbook(io.BytesIO(data), data_only=True)
    sheets = [one for one in book.worksheets if any(map(_says, one.iter_rows(values_only=True)))]
    if sheet is not None:
        sheets = [one for one in sheets if one.title == sheet]
    if len(sheets) > 1:
        raise DataError(f"{len(sheets)} of its sheets hold something: say which by name: NAME")
    if not sheets:
        if sheet is None:
            return []
        raise DataError("no sheet of that name holds something")
    rows: list[list[str | None]] = []
    for cells in sheets[0].iter_rows():
        exact = [not rows or (rows[0][n] or "").strip() in texts for n in range(len(cells))]
        try:
            row = list(map(_cell_text, cells, exact))
        except ValueError as error:
            raise DataError(f"row {len(rows)} (line {cells[0].row}): {error}") from None
        if _says(row):
            rows.append(row)
    return _table(rows)


def _cell_text(cell: Any, exact: bool) -> str | None:
    """Return what a cell shows; dates as ISO 8601 has them. `exact`: refuse what cannot be told."""
    value, form = cell.value, str(cell.number_format)
    if cell.data_type == "e" and exact:
        raise ValueError("a cell with an error of Excel's")
    if isinstance(value, bool):
        return str(value).upper()
    if not isinstance(value, (int, float)):
        return None if value is None else str(shown(value))
    if fixed := _FIXED.fullmatch(form):
        width, places = len(fixed["width"]), len(fixed["decimals"] or "")
        number = value * 100 if fixed["percent"] else value
        return f"{number:0{width + places + bool(places)}.{places}f}{fixed['percent']}"
    if form not in ("General", "@") and exact:
        raise ValueError("a number in a format of its own. Make the cell a text, or give it the format General")
    return f"{value:.15g}"  # as many digits as Excel has


def _parquet(data: bytes, texts: Set[str]) -> list[Row]:
    import pyarrow
    from pyarrow import compute, parquet

    table = parquet.read_table(pyarrow.BufferReader(data))
    for n, field in enumerate(table.schema):
        if field.name in texts and pyarrow.types.is_floating(field.type):  # 0.1 of 32 bits is 0.1, and 1997.0 is 1997
            column = table.column(n)
            shown = compute.if_else(compute.is_nan(column), None, column.cast(pyarrow.string()))
            table = table.set_column(n, field.name, shown)
    return list(table.to_pylist())


def _table(rows: Sequence[Sequence[str | None]]) -> list[Row]:
    """Return the rows below a header; a column without a name is left out if it is empty, or the first: an index."""
    if not rows:
        return []
    names = [(name or "").strip() for name in rows[0]]
    for n, name in enumerate(names):
        if name and name in names[:n]:
            raise DataError(f"columns {names.index(name) + 1} and {n + 1} have the same name: rename one")
        for number, row in enumerate(rows[1:], 1):
            if n and not name and (row[n] or "").strip():
                raise DataError(f"row {number}: a text in column {n + 1}, which has no name in the header")
    return [{name: value or None for name, value in zip(names, row, strict=True) if name} for row in rows[1:]]


def _says(record: Sequence[Any]) -> bool:
    """Return whether any field of a row holds more than white space."""
    return any(value is not None and str(value).strip() for value in record)
