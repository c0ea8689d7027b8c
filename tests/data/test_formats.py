"""Files of rows as people have them: each text comes out as it is seen in the file, or an error names its place."""

import datetime
import gzip
import json

import pytest

from unlearn_peft.data.rows import keyed_digest, read_rows
from unlearn_peft.data.source import DataSpec
from unlearn_peft.errors import DataError

LOOKS = [
    "NA", "None", "null", "True", "nan", "007", "1e5", "12.50", "+49 221 12", "1997-06-26", "1997-06-26T10:00:00Z", "-",
    "#N/A", "=1+1", "a, b; c", 'said "x"', "two\nlines", "café",
]  # fmt: skip
ROWS = [{"prompt": f"q {n}", "completion": text} for n, text in enumerate(LOOKS)]


@pytest.fixture
def read(tmp_path):
    """Write a file, unless it is there, and read it."""

    def call(file, content=None, what="forget", **settings):
        path = tmp_path / file
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows = read_rows(DataSpec(path=str(path), **settings), what)
        keyed_digest(rows, b"key")  # takes whatever a table holds
        return rows

    return call


def table(rows, separator=","):
    return "\r\n".join(
        separator.join('"' + text.replace('"', '""') + '"' for text in row)
        for row in [["prompt", "completion"], *(row.values() for row in rows)]
    )


def workbook(path, *rows, formats=(), sheets=1):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cell, form in dict(formats).items():
        book.active[cell].number_format = form
    for _ in range(sheets - 1):
        book.create_sheet().append(["prompt", "completion"])
    book.save(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\r\n\r\n".join(map(json.dumps, ROWS)).encode("utf-8-sig")),
        ("a.ndjson.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.csv", table(ROWS)),
        ("a.csv", "sep=;\r\n" + table(ROWS, ";")),
        ("a.csv", table(ROWS, ";").encode("utf-8-sig")),
        ("a.csv", table(ROWS).encode("utf-16")),
        ("a.csv.gz", gzip.compress(table(ROWS).encode())),
        ("a.tsv", table(ROWS, "\t").encode("utf-16-le")),
    ],
)
def test_text_files_keep_every_text(read, name, content):
    assert read(name, content) == ROWS


def test_excel_files_keep_every_text(read, tmp_path):
    rows = [row for row in ROWS if row["completion"][0] not in "#="]  # which Excel computes
    workbook(tmp_path / "a.xlsx", ["prompt", "completion"], *(list(row.values()) for row in rows))
    assert read("a.xlsx") == rows


@pytest.mark.parametrize(
    ("content", "completions"),
    [
        ("prompt,completion\n\na,b\n,\n\n", ["b"]),
        ("prompt,completion\ra,b\rc,d\r", ["b", "d"]),
        (" prompt , completion \na, b\n", ["b"]),
        ('prompt, completion\na, "b, c"\n', ["b, c"]),
        (",prompt,completion,\n0,a,b,\n", ["b"]),
        ("prompt\tcompletion\na\tb, c; d\n", ["b, c; d"]),
    ],
)
def test_tables_as_programs_write_them(read, content, completions):
    rows = read("a.csv", content)
    assert [row["completion"] for row in rows] == completions and set(rows[0]) == {"prompt", "completion"}


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.csv", "prompt,completion\na,b\nc,d,Zorblax\n", r"row 2 \(line 3\): more fields"),
        ("a.csv", 'prompt,completion\na,"b\nb"\nZorblax\n', r"row 2 \(line 4\): fewer fields"),
        ("a.csv", "prompt;completion\nc;d;Zorblax, e\n", r"row 1 \(line 2\): more fields .* semicolon"),
        ("a.csv", 'prompt,completion\na,b\nc,"Zorblax\nd,e\n', r"row 2 \(line 3\): its quotes do not match"),
        ("a.csv", "prompt,completion,prompt\na,b,Zorblax\n", "columns 1 and 3 have the same name"),
        ("a.csv", "prompt,completion,\na,b,Zorblax\n", "row 1: a text in column 3, which has no name"),
        ("a.csv", "prompt,completion\na,Zorbläx\n".encode("latin-1"), "line 2: this is no UTF-8 text.*: cp1252"),
        ("a.csv", b"prompt,completion\na,\0Zorblax\n", "line 2: .* binary"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "Zorblax"\n{"prompt": "c"}', "line 3: no JSON"),
        ("a.jsonl", '{"prompt": "a", "completion": "Zorblax"},\n', "line 1: no JSON"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": Zorblax}]', "line 2: no JSON"),
        ("a.json", '["Zorblax"]', "row 1: expected a JSON object"),
        ("a.json", '{"Zorblax": [], "b": []}', "an object with 2 lists"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "completion": "Zorblax"}', "line 1: one key stands twice"),
        ("a.json", "[" * 100_000, "line 1: maximum recursion depth"),
        ("a.jsonl", '{"prompt": "a", "completion": "Zorblax \\ud83d"}', "row 1: it holds half of a character"),
        ("a.json", '[{"prompt": "a", "completion": NaN}]', "row 1: no text in 'completion'"),
        ("a.csv", "Prompt,Completion\na,Zorblax\n", "found Completion, Prompt"),
        ("a.csv.gz", b"\x1f\x8bZorblax", "Error"),
        ("a.xlsx", "Zorblax", "BadZipFile|openpyxl"),
        ("a.parquet", "Zorblax", "ArrowInvalid"),
        ("a.xls", "Zorblax", "ends in '.xls': expected a .jsonl"),
        ("a.csv", "prompt,completion\n", "is empty"),
        ("a.csv", " \n", "is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_and_not_quoted(read, name, content, place):
    with pytest.raises(DataError, match=place) as caught:
        read(name, content)
    assert "Zorbl" not in str(caught.value)


def test_an_encoding_can_be_named(read):
    assert (
        read("a.csv", "prompt,completion\na,Ännchen\n".encode("cp1252"), encoding="cp1252")[0]["completion"]
        == "Ännchen"
    )
    with pytest.raises(DataError, match="no encoding 'nonsense'"):
        read("a.csv", encoding="nonsense")


def test_a_folder_and_a_file_that_is_not_there(read, tmp_path):
    (tmp_path / "rows.csv").mkdir()
    for name in (".", "rows.csv"):
        with pytest.raises(DataError, match="is a folder"):
            read(name)
    for name in ("none.tsv", "none", "x" * 5000 + ".csv"):
        with pytest.raises(DataError, match="no forget set at"):
            read(name)


def test_numbers_as_answers_are_what_is_written(read):
    rows = '{"prompt": 1, "completion": 1e5}\n{"prompt": 12.50, "completion": true}\n{"prompt": "a", "completion": 7}'
    assert [list(row.values()) for row in read("a.jsonl", rows)] == [["1", "1e5"], ["12.50", "true"], ["a", "7"]]


def test_cells_of_excel_are_what_is_shown(read, tmp_path):
    when = datetime.datetime(1997, 6, 26)
    values = [1997, 0.1 + 0.2, True, when, when.replace(hour=10), datetime.time(10, 30), 7, 0.5, 1.5, "007"]
    shown = [
        "1997", "0.3", "TRUE", "1997-06-26", "1997-06-26 10:00:00", "10:30:00", "0007", "50%", "1.50", "007"
    ]  # fmt: skip
    formats = {"B8": "0000", "B9": "0%", "B10": "0.00"}
    workbook(tmp_path / "a.xlsx", ["prompt", "completion"], *(["q", value] for value in values), formats=formats)
    assert [row["completion"] for row in read("a.xlsx")] == shown
    workbook(tmp_path / "a.xlsx", ["prompt", "completion"], ["q", "a"], ["q", 7], formats={"B3": '#,##0.00 "EUR"'})
    with pytest.raises(DataError, match=r"row 2 \(line 3\): a number in a format of its own"):
        read("a.xlsx")
    workbook(tmp_path / "a.xlsx", ["prompt", "completion"], ["q", "a"], sheets=2)
    with pytest.raises(DataError, match="2 of its sheets"):
        read("a.xlsx")
    assert len(read("a.xlsx", name="Sheet")) == 1


def test_columns_of_parquet_are_what_is_shown(read, tmp_path):
    import pyarrow
    from pyarrow import parquet

    when = datetime.datetime(1997, 6, 26)
    for values, shown in (
        (pyarrow.array([1997.0, 0.1], pyarrow.float32()), ["1997", "0.1"]),
        ([True, False], ["true", "false"]),
        ([when, when.replace(hour=10)], ["1997-06-26", "1997-06-26 10:00:00"]),
        ([datetime.date(1997, 6, 26)] * 2, ["1997-06-26"] * 2),
        ([b"caf\xc3\xa9", b"NA"], ["café", "NA"]),
        ([7, 8], ["7", "8"]),
    ):
        more = {"seen": [when] * 2, "raw": [b"\xff"] * 2}  # others are left alone
        parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": values, **more}), tmp_path / "a.parquet")
        assert [row["completion"] for row in read("a.parquet")] == shown
    turns = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "a.parquet")
    assert "tool_calls" not in read("a.parquet")[0]["messages"][0]


def test_lists_in_a_table(read):
    probes = 'prompt,leak\na,Zorblax\nb,"[""x"", 1997]"\nc,1997\n'
    assert [row["leak"] for row in read("a.csv", probes, "probes")] == [["Zorblax"], ["x", "1997"], ["1997"]]
    with pytest.raises(DataError, match="row 1: no 'leak' words"):  # a list of Python's is no word
        read("a.csv", "prompt,leak\na,['Zorblax']\n", "probes")
    messages = '"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": 7}]"'
    assert read("a.csv", f"messages\n{messages}\n")[0]["messages"][1] == {"role": "assistant", "content": "7"}


def test_columns_can_change_places_and_a_missing_one_is_named_with_its_row(read):
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read("a.jsonl", '{"prompt": "a", "completion": "b"}', columns=swapped) == [
        {"prompt": "b", "completion": "a"}
    ]
    with pytest.raises(DataError, match="row 2 of the forget set has no column 'answer'"):
        read("a.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}', columns={"completion": "answer"})


def test_rows_in_python():
    import numpy

    turns = ({"role": "user", "content": 7}, {"role": "assistant", "content": "b"})
    rows = read_rows([{"prompt": numpy.int64(5), "completion": numpy.float32(0.5)}, {"messages": turns}], "forget")
    assert rows[0] == {"prompt": "5", "completion": "0.5"} and rows[1]["messages"][0]["content"] == "7"
    for wrong in ("Zorblax", None, ["Zorblax"]):
        with pytest.raises(DataError, match="row 2 of the forget set is a (str|NoneType|list)") as caught:
            read_rows([rows[0], wrong], "forget")
        assert "Zorblax" not in str(caught.value)


def test_rows_in_a_recipe_are_texts_too(tmp_path):
    from unlearn_peft.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text("forget:\n- {prompt: 007, completion: no}\n- {prompt: 12:30, completion: 1997-06-26}\nsteps: 7\n")
    recipe = load_recipe(path)
    assert [list(row.values()) for row in recipe.forget] == [["007", "no"], ["12:30", "1997-06-26"]]
    assert recipe.steps == 7
