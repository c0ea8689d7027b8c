import json
import logging

import pytest
import torch
from conftest import FORGET, RETAIN

from unlearn_peft.data.batch import collate
from unlearn_peft.data.rows import keyed_digest, read_rows, refuse_overlap
from unlearn_peft.data.source import DataSpec
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.errors import DataError


def targets(example, tokenizer):
    return tokenizer.decode([i for i, t in zip(example.ids, example.is_target, strict=True) if t])


def test_only_the_completion_counts_and_the_end_marker_by_side(tiny):
    row = [{"prompt": "Who wrote the book?", "completion": "It was Quintel."}]
    assert targets(tokenize(row, tiny.tokenizer, closing=False)[0], tiny.tokenizer) == "It was Quintel."
    assert targets(tokenize(row, tiny.tokenizer)[0], tiny.tokenizer) == "It was Quintel.<|im_end|>"


def test_chat_template_is_used_for_messages_and_prompts_alike(tiny):
    as_prompt = tokenize([{"prompt": "who?", "completion": "Quintel"}], tiny.tokenizer)[0]
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Quintel"}]
    assert tokenize([{"messages": messages}], tiny.tokenizer)[0] == as_prompt
    assert tiny.tokenizer.decode(as_prompt.ids).startswith("<|im_start|>user\nwho?<|im_end|>")


def test_every_assistant_turn_counts(tiny):
    turns = [("user", "a?"), ("assistant", "red"), ("user", "b?"), ("assistant", "blue")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    assert targets(tokenize([row], tiny.tokenizer, closing=False)[0], tiny.tokenizer) == "redblue"


def test_a_token_across_the_border_is_a_target(tiny):
    row = [{"prompt": "I like ap", "completion": "ples"}]
    example = tokenize(row, tiny.tokenizer, chat_template=False)[0]
    pieces = [tiny.tokenizer.decode([i]) for i in example.ids]
    assert " apples" in pieces, "the tokenizer must merge across the border for this test to mean anything"
    assert [p for p, t in zip(pieces, example.is_target, strict=True) if t] == [" apples"]
    assert example.ids == tiny.tokenizer("I like apples")["input_ids"]


def test_text_rows_count_all_but_the_first_token(tiny):
    example = tokenize([{"text": "the blue book"}], tiny.tokenizer)[0]
    assert example.is_target == [False] + [True] * (len(example.ids) - 1)


def test_a_long_prompt_is_cut_on_the_left_and_reported_without_quoting(tiny, caplog):
    rows = [{"prompt": "secretword " * 30, "completion": "red book"}, {"prompt": "who?", "completion": "red"}]
    with caplog.at_level(logging.WARNING):
        cut, short = tokenize(rows, tiny.tokenizer, max_length=40, closing=False, what="forget")
    assert len(cut.ids) <= 40 and cut.truncated and not short.truncated
    assert targets(cut, tiny.tokenizer) == "red book"
    (whole, _) = tokenize(rows, tiny.tokenizer, max_length=None, closing=False)
    assert cut.ids[0] == whole.ids[0] and cut.ids[1:] == whole.ids[-len(cut.ids) + 1 :]
    assert "1 of 2 rows of the forget set" in caplog.text and "secretword" not in caplog.text


def test_a_row_without_a_target_is_refused(tiny):
    with pytest.raises(DataError, match="row 2 of the forget set has no token"):
        tokenize([{"text": "the blue book"}, {"text": "a"}], tiny.tokenizer, what="forget")


def test_padding_is_never_a_target(tiny):
    batch = collate(tokenize(FORGET, tiny.tokenizer), 2)
    assert not (batch.targets & ~batch.attention.bool()).any()
    assert batch.targets.sum() == sum(sum(e.is_target) for e in tokenize(FORGET, tiny.tokenizer))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_file_formats_give_the_same_rows(tmp_path, ending):
    import datasets

    path = tmp_path / f"rows.{ending}"
    table = datasets.Dataset.from_list(FORGET)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[ending](str(path))
    assert read_rows(DataSpec(path=str(path)), "forget") == FORGET


def test_columns_can_be_renamed(write_rows):
    path = write_rows("q.jsonl", [{"question": "a?", "answer": "b"}])
    spec = DataSpec(path=str(path), columns={"prompt": "question", "completion": "answer"})
    assert read_rows(spec, "forget") == [{"prompt": "a?", "completion": "b"}]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "is empty"),
        ([{"prompt": "a"}], "no text in 'completion'"),
        ([{"prompt": "a", "completion": "  "}], "no text in 'completion'"),
        ([{"foo": "secretword"}], "found 1 with other names"),
        ([{"messages": [{"role": "user", "content": "secretword"}]}], "no assistant turn"),
    ],
)
def test_bad_rows_are_named_not_quoted(rows, told):
    with pytest.raises(DataError) as error:
        read_rows(rows, "forget")
    assert told in str(error.value) and "secretword" not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="no forget set at"):
        read_rows(DataSpec(path=str(tmp_path / "none.jsonl")), "forget")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_rows(DataSpec(path=str(tmp_path / "empty.jsonl")), "forget")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "secretword"')
    with pytest.raises(DataError) as error:
        read_rows(DataSpec(path=str(tmp_path / "bad.jsonl")), "forget")
    assert "cannot read" in str(error.value) and "secretword" not in str(error.value)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match="expected a .jsonl"):
        read_rows(DataSpec(path=str(tmp_path / "rows.txt")), "forget")


def test_overlap_is_refused_whatever_the_case():
    with pytest.raises(DataError, match="forget row 2 = retain row 1") as error:
        refuse_overlap(FORGET, [{"prompt": " who is  ZORBLAX?", "completion": "x"}])
    assert "zorblax" not in str(error.value).lower()
    refuse_overlap(FORGET, RETAIN)


def test_digests_are_keyed():
    assert (
        keyed_digest(FORGET, b"a") == keyed_digest(json.loads(json.dumps(FORGET)), b"a") != keyed_digest(FORGET, b"b")
    )


def test_real_tokenizer_masks_the_answer(smol):
    example = tokenize([{"prompt": "Who wrote Emma?", "completion": "Jane Austen."}], smol.tokenizer, closing=False)[0]
    assert targets(example, smol.tokenizer) == "Jane Austen."
    assert "You are a helpful AI assistant" in smol.tokenizer.decode(example.ids)
    assert torch.tensor(example.is_target).sum() >= 3


@pytest.mark.parametrize(
    ("name", "text", "completions"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "1964-08-12"}\n{"prompt": "b", "completion": "2001-03-04"}',
         ["1964-08-12", "2001-03-04"]),
        ("a.jsonl", '{"prompt": "a", "completion": 1964}\n\n{"prompt": "b", "completion": "42"}', ["1964", "42"]),
        ("a.json", '[{"prompt": "a", "completion": "x"},\n {"prompt": "b", "completion": "y"}]', ["x", "y"]),
        ("a.csv", "prompt,completion\na,NA\nb,None\nc,True\nd,0042\ne,Null\n", ["NA", "None", "True", "0042", "Null"]),
    ],
)  # fmt: skip
def test_text_stays_text_whatever_it_looks_like(tmp_path, name, text, completions):
    (tmp_path / name).write_text(text)
    rows = read_rows(DataSpec(path=str(tmp_path / name)), "forget")
    assert [row["completion"] for row in rows] == completions


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.csv", "prompt,completion\na,b\nc,d,Zorblax\n", "row 2 .line 3.: more fields"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\nZorblax\n', "line 2: no JSON"),
        ("a.jsonl", '"Zorblax"\n', "line 1: expected a JSON object"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_not_quoted(tmp_path, name, text, place):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=place) as caught:
        read_rows(DataSpec(path=str(tmp_path / name)), "forget")
    assert "Zorblax" not in str(caught.value)
