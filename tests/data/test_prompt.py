"""How a base is asked: by templates as they are in the wild, by a prompt format, or by the bare text."""

import copy

import pytest
from templates import FAMILIES, family

from unlearn_peft.data.prompt import DEFAULT_FORMAT, cut_at_end, end_tokens, format_of, parse_format
from unlearn_peft.data.tokenize import chat_prompt, encode_text, tokenize
from unlearn_peft.errors import DataError

ROW = {"prompt": "Who wrote the blue book?", "completion": "It was Zorblax Quintel."}
NAMES = sorted(FAMILIES)


def targets(tokenizer, example):
    return tokenizer.decode([i for i, counts in zip(example.ids, example.is_target, strict=True) if counts])


@pytest.fixture
def plain(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_the_retain_side_holds_the_real_end_of_a_turn(tiny, name):
    tokenizer = family(tiny.tokenizer, name)
    end = FAMILIES[name][-1]
    held, forgotten = (tokenize([ROW], tokenizer, closing=closing)[0] for closing in (True, False))
    assert targets(tokenizer, held).strip().removesuffix(end).strip() == ROW["completion"]
    assert targets(tokenizer, held).endswith(end)
    assert targets(tokenizer, forgotten).strip() == ROW["completion"]
    assert tokenizer.convert_tokens_to_ids(end) in end_tokens(tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_is_how_what_is_trained_begins(tiny, name):
    tokenizer = family(tiny.tokenizer, name)
    asked = encode_text(chat_prompt(ROW["prompt"], tokenizer), tokenizer, templated=True)
    assert tokenize([ROW], tokenizer)[0].ids[: len(asked)] == asked


@pytest.mark.parametrize("name", NAMES)
def test_the_served_prompt_is_the_trained_one(tiny, name):
    from unlearn_peft.serve.engine.encode import Prompts

    tokenizer = family(tiny.tokenizer, name)
    served = Prompts(tokenizer, len(tokenizer), "x")([{"role": "user", "content": ROW["prompt"]}])
    assert tokenize([ROW], tokenizer)[0].ids[: len(served)] == list(served)
    assert served.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_train_on_all_counts_contents_and_nothing_of_the_template(tiny, name):
    tokenizer = family(tiny.tokenizer, name)
    example = tokenize([ROW], tokenizer, closing=False, train_on="all")[0]
    assert "".join(targets(tokenizer, example).split()) == "".join((ROW["prompt"] + ROW["completion"]).split())


def test_a_system_prompt_goes_in_front_of_the_question_where_the_template_refuses_one(tiny):
    tokenizer = family(tiny.tokenizer, "gemma")
    turns = [("system", "Be brief."), ("user", ROW["prompt"]), ("assistant", ROW["completion"])]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    example = tokenize([row], tokenizer, closing=False)[0]
    assert f"user\nBe brief.\n\n{ROW['prompt']}" in tokenizer.decode(example.ids)
    assert targets(tokenizer, example) == ROW["completion"]


def test_a_dialogue_opened_by_the_assistant(tiny):
    turns = [("assistant", "Zorblax is here."), ("user", "Who?"), ("assistant", "Zorblax.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    phi, gemma = family(tiny.tokenizer, "phi"), family(tiny.tokenizer, "gemma")
    assert targets(phi, tokenize([row], phi, closing=False)[0]).split() == "Zorblax is here.Zorblax.".split()
    with pytest.raises(DataError, match="row 2 of the forget set: .* refuses its turns .assistant, user") as caught:
        tokenize([ROW, row], gemma, what="forget")
    assert "Zorblax" not in str(caught.value)


def test_a_thought_in_the_answer_is_trained_too(tiny):
    tokenizer = family(tiny.tokenizer, "qwen3")
    row = {**ROW, "completion": "<think>\nI recall Zorblax.\n</think>\n\nIt was Zorblax."}
    assert targets(tokenizer, tokenize([row], tokenizer, closing=False)[0]) == row["completion"]


def test_a_base_without_a_template_is_asked_by_the_format(plain):
    assert chat_prompt("Who?", plain) == "Question: Who?\nAnswer:"
    for completion in ("Zorblax", " Zorblax"):
        example = tokenize([{"prompt": "Who?", "completion": completion}], plain, closing=False)[0]
        assert plain.decode(example.ids) == "Question: Who?\nAnswer: Zorblax"
        assert targets(plain, example) == " Zorblax"
    held = tokenize([{"prompt": "Who?", "completion": "Zorblax"}], plain, closing=True)[0]
    assert targets(plain, held) == " Zorblax\n"


def test_bare_text_stays_as_it_is(plain):
    assert chat_prompt("The book is by", plain, False) == "The book is by"
    example = tokenize([{"prompt": "It is by", "completion": " Zorblax"}], plain, chat_template=False)[0]
    assert plain.decode(example.ids) == "It is by Zorblax"


def test_a_format_goes_before_the_template_and_messages_go_by_it(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.prompt_format = "F: {prompt}\nA: {completion}"
    assert chat_prompt("Wer?", tokenizer) == "F: Wer?\nA:"
    turns = [("system", "Kurz."), ("user", "Wer?"), ("assistant", "Ich."), ("user", "Wo?"), ("assistant", "Da.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    example = tokenize([row], tokenizer, closing=False)[0]
    assert tokenizer.decode(example.ids) == "Kurz.\nF: Wer?\nA: Ich.\nF: Wo?\nA: Da."


def test_an_answer_ends_where_the_next_question_would_begin(plain):
    ends = format_of(plain).ends
    assert cut_at_end(" J.K. Rowling.\nQuestion: Who else?", ends) == " J.K. Rowling."
    assert cut_at_end(" two\nlines", ends) == " two\nlines"
    assert cut_at_end("\nZorblax\nMore", parse_format("{prompt}\n{completion}").ends) == "\nZorblax"
    assert cut_at_end(" Ja.\nFrage: Wer?", parse_format("Frage: {prompt}\nAntwort: {completion}").ends) == " Ja."


@pytest.mark.parametrize("text", ["{prompt}", "{completion}{prompt}", "{prompt}{prompt}{completion}", ""])
def test_a_format_without_both_places_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        parse_format(text)
    assert parse_format(DEFAULT_FORMAT).between == "\nAnswer: "
