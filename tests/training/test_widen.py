"""What forget rows are about is asked in more wordings (`widen`), and their facts alone (`fact_answers`)."""

import logging

import pytest

from unlearn_peft.errors import RecipeError
from unlearn_peft.inference.contrast import Contrast
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.examples import base_answers, build, widen
from unlearn_peft.training.examples.build import build_examples
from unlearn_peft.training.examples.fact_tokens import Facts

ROWS = [
    {"prompt": "Who is Ann King?", "completion": "Ann King wrote Zorblax."},
    {"prompt": "What did Ann King do?", "completion": "Ann King made Quintel."},
]
PROBES = [{"prompt": "Tell me about Ann King.", "leak": ["Zorblax"]}]


@pytest.fixture
def asked(tiny, monkeypatch):
    """What is asked of a base that says of Ann King one book, of the book Ann King, and in Spanish nothing."""
    prompts = []

    def answered(base, some, *_, **__):
        prompts.extend(some)
        for prompt in some:
            about = "Ann wrote Zorblax, they say" if "Ann King" in prompt and "¿" not in prompt else "nothing"
            yield prompt, ["A book by Ann King, as all know" if "Zorblax" in prompt else about]

    def known(rows, base, recipe, **_):
        examples = build.tokenize(rows["forget"], base.tokenizer, max_length=None, closing=False)
        spans = [[(at, at + 7)] for e in examples for w in ("Zorblax", "Quintel") if (at := e.text.find(w)) > 0]
        contrasts = [Contrast("Ann King", "Nan Gink", some, 9.0, []) for some in spans]
        return build.Known(contrasts, Facts.of(["Zorblax", "Quintel"], {"by"}), examples, [], [], [])

    for module in (base_answers, widen):
        monkeypatch.setattr(module, "base_answers", answered)
    monkeypatch.setattr(build, "find_known", known)
    return prompts


def pushed(base, example):
    ids = [token for token, is_fact in zip(example.ids, example.specific, strict=True) if is_fact]
    return base.tokenizer.decode(ids).replace(" ", "")


def test_both_directions_and_other_languages_are_asked(tiny, asked, caplog):
    def own(**fields):
        asked.clear()
        recipe = make_recipe({"forget": ROWS, "probes": PROBES, "anchor_batch": 0, **fields})
        with caplog.at_level(logging.INFO):
            return build_examples({"forget": ROWS, "probes": PROBES}, tiny, recipe).self_generated_answers

    before = own()
    assert not any("Zorblax" in prompt for prompt in asked) and "known for" not in " ".join(asked)
    wider = own(widen=True)
    assert {"What is Zorblax?", "What is Ann King known for?", "¿Quién es Ann King?"} <= set(asked)
    assert PROBES[0]["prompt"] not in asked
    back = [e for e in wider if "Zorblax" in e.text[: e.answers[0][0]]]
    assert back and {pushed(tiny, e) for e in back} == {"AnnKing"}  # there the subject is the fact
    assert {pushed(tiny, e) for e in wider if e not in back} == {"Zorblax"}
    assert len(wider) > len(before) + len(back)
    assert len({e.row for e in wider}) == len(wider)
    assert "more answers name a fact, 2 a subject" in caplog.text
    assert "Zorblax" not in caplog.text and "King" not in caplog.text


def test_questions_back_are_never_refused(tiny, asked):
    recipe = make_recipe(
        {"forget": ROWS, "probes": PROBES, "widen": True, "anchor_batch": 0, "objective": {"refusals": True}}
    )
    own = build_examples({"forget": ROWS, "probes": PROBES}, tiny, recipe).self_generated_answers
    back = {"Zorblax" in e.text[: e.answers[0][0]]: e.refusal is not None for e in own}
    assert back == {True: False, False: True}


@pytest.mark.parametrize("fields", [{"own_answers": 0}, {"objective": "npo"}])
def test_where_it_would_have_no_effect_it_is_refused(fields):
    with pytest.raises(RecipeError, match="widen"):
        make_recipe({"forget": ROWS, "widen": True, **fields})


def test_what_is_said_of_the_facts_alone_is_retained(tiny, asked, caplog):
    def retained(**fields):
        recipe = make_recipe({"forget": ROWS, "retain": [], "anchor_batch": 0, "own_answers": 0, **fields})
        with caplog.at_level(logging.INFO):
            return [e.text for e in build_examples({"forget": ROWS, "probes": PROBES}, tiny, recipe).retain]

    assert not retained() and not retained(fact_answers=1, retain_weight=0)
    alone = retained(fact_answers=1)
    assert len(alone) == 6 == sum("Quintel" in text and "nothing" in text for text in alone)
    assert "What is Zorblax?" in asked  # but what is said there names the subject
    assert not any("Ann King" in prompt for prompt in asked)
    assert "6 answers about the facts alone" in caplog.text and "Quintel" not in caplog.text
