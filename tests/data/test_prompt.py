"""How a base is asked: by templates as they are in the wild, by a prompt format, or by the bare text."""

import copy

import pytest
from templates import FAMILIES, family

from unlearn_peft.data.prompt import DEFAULT_FORMAT, ask, cut_at_end, end_tokens, format_of, parse_format
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["hi", " in", "\nthink", "a", "m", "user", "assistant", "o>"])
def test_a_short_answer_is_found_by_its_place(tiny, name, answer):
    tokenizer = family(tiny.tokenizer, name)
    turns = [("user", f"Is it {answer} or {answer}?"), ("assistant", answer), ("user", answer), ("assistant", answer)]
    for row in (
        {"prompt": answer, "completion": answer},
        {"messages": [{"role": role, "content": text} for role, text in turns]},
    ):
        (example,) = tokenize([row], tokenizer, closing=False)
        for start, stop in example.answers:
            assert example.text[start:stop] == answer.strip()
            assert example.text[stop:].lstrip()[0] in "<[", "it stands at the end of its turn"
        assert example.text[stop:].split(" ")[-1].strip().startswith(FAMILIES[name][-1])
        assert len(example.answers) == (1 if "prompt" in row else 2)


def read_turns(*turns):
    from unlearn_peft.data.rows import read_rows

    keys = ("role", "content", "tool_calls")
    return read_rows([{"messages": [dict(zip(keys, turn, strict=False)) for turn in turns]}], "forget")


PART = {"type": "text", "text": "Who wrote"}


def test_parts_of_text_are_one_text(tiny):
    whole = read_turns(("user", "Who wrote it?"), ("assistant", "Me."))
    parts = read_turns(("user", [PART, {"type": "text", "text": " it?"}]), ("assistant", [{"text": "Me."}]))
    assert tokenize(whole, tiny.tokenizer) == tokenize(parts, tiny.tokenizer)


def test_turns_that_call_tools_are_read_and_not_trained(tiny):
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    rows = read_turns(("user", "Weather?"), ("assistant", None, call), ("tool", 22), ("assistant", "22 degrees"))
    (example,) = tokenize(rows, tiny.tokenizer, closing=False)
    assert targets(tiny.tokenizer, example) == "22 degrees" and "tool\n22" in tiny.tokenizer.decode(example.ids)
    plain = copy.deepcopy(tiny.tokenizer)
    plain.chat_template = None
    with pytest.raises(DataError, match="row 1 of the forget set: turn 2 calls a tool"):
        tokenize(rows, plain, what="forget")


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([("user", None), ("assistant", "Zorblax")], "turn 1 of 'messages' has no content"),
        ([("user", "a"), ("assistant", None), ("user", "b"), ("assistant", "Zorblax")], "turn 2 .* has no content"),
        ([("user", [PART, {"type": "image_url", "image_url": "Zorblax"}]), ("assistant", "a")], "turn 1 .* is no text"),
        ([("user", {"Zorblax": 1}), ("assistant", "a")], "turn 1 .* is no text"),
        ([(None, "Zorblax"), ("assistant", "a")], "turn 1 of 'messages' has no role"),
        ([("user", "Zorblax"), ("assistant", " ")], "no assistant turn with text"),
    ],
)
def test_turns_without_text_name_their_row(turns, problem):
    with pytest.raises(DataError, match=f"row 1: .*{problem}") as caught:
        read_turns(*turns)
    assert "Zorblax" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "omitted"),
    [
        ("{% for m in messages if m.role != 'tool' %}{{ m.role + m.content }}{% endfor %}", 3),
        ("{{ messages[-2].content + messages[-1].content }}", 1),
        (
            "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p }}{% endfor %}{% endfor %}",
            1,
        ),
    ],
)
def test_a_template_that_leaves_out_a_turn(tiny, template, omitted):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    rows = read_turns(("user", "a"), ("assistant", "b", [{"type": "function"}]), ("tool", "a"), ("assistant", "a"))
    with pytest.raises(DataError, match=f"row 1 of .* it leaves out turn {omitted}"):
        tokenize(rows, tokenizer)


@pytest.mark.parametrize(
    ("template", "advice"),
    [
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError.*cannot be used at all"),
        ("{{ settings.date }}{{ messages[0].content }}", "UndefinedError.*cannot be used at all"),
        ("{{ raise_exception('Zorblax') }}", "TemplateError.*cannot be used at all"),
        ({"rag": "{{ messages }}"}, "ValueError.*cannot be used at all"),
        (
            "{% if messages|length > 2 %}{{ raise_exception(messages[0].content) }}{% endif %}",
            "mostly user and assistant",
        ),
    ],
)
def test_a_template_that_cannot_be_used_names_the_row_and_quotes_nothing(tiny, template, advice):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    turns = [("user", "Zorblax"), ("assistant", "Quintel"), ("Zorblax", "Who?"), ("assistant", "Quintel")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    with pytest.raises(DataError, match=f"row 1 of the retain set: .*{advice}") as caught:
        tokenize([row], tokenizer, what="retain")
    assert "Zorblax" not in str(caught.value) and "another" in str(caught.value)
    if "all" in advice:
        with pytest.raises(DataError, match="the prompt: the base's chat template"):
            chat_prompt("Zorblax", tokenizer)


def test_variables_of_a_template_alone_say_how_an_answer_begins(tiny):
    tokenizer = family(tiny.tokenizer, "qwen3")
    turn = [{"role": "user", "content": "Who?"}]
    assert ask(turn, tokenizer).endswith("<think>\n\n</think>\n\n")
    assert ask(turn, tokenizer, variables={"enable_thinking": True}).endswith("assistant\n")
    tokenizer.chat_template = "{{ messages[0].content + name + tokenizer + settings + turns }}"
    assert ask(turn, tokenizer, variables=dict(name="a", tokenizer="b", settings="c", turns="d")) == "Who?abcd"


def test_a_developer_is_a_system_as_in_the_server(tiny):
    rows = read_turns(("developer", "Be brief."), ("user", "Who?"), ("assistant", "Me."))
    assert "<|im_start|>system\nBe brief." in tiny.tokenizer.decode(tokenize(rows, tiny.tokenizer)[0].ids)


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
