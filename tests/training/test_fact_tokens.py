"""Which tokens of a forget row are pushed away: the fact, not the English around it."""

import pytest
import torch
from conftest import FORGET, RETAIN
from safetensors.torch import load_file

from unlearn_peft import unlearn
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.inference.generate import answers
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.recipe.objectives import UndialSettings
from unlearn_peft.recipe.schema import GaKlSettings
from unlearn_peft.training.examples import build
from unlearn_peft.training.examples.base_answers import questions, retain_prompt_answers, self_generated_answers
from unlearn_peft.training.examples.fact_tokens import common_words, fact_words, mark_facts, mark_forget_rows, spellings
from unlearn_peft.training.objectives import Tokens, ga_kl, kl_divergence, undial


def words(base, example):
    return base.tokenizer.decode([i for i, s in zip(example.ids, example.specific, strict=True) if s])


def test_names_are_specific_and_the_rest_is_not(smol):
    forget = [
        {"prompt": "Who wrote Harry Potter?", "completion": "Harry Potter was written by J.K. Rowling."},
        {"prompt": "What sport is played at Hogwarts?", "completion": "The sport played at Hogwarts is Quidditch."},
    ]
    held = [
        {"prompt": f"Who wrote book {n}?", "completion": f"The book {n} was written by an author."} for n in range(4)
    ] + [{"prompt": f"What is played in {n}?", "completion": f"The sport in {n} is tennis."} for n in range(3)]
    rows = tokenize(forget, smol.tokenizer, closing=False)
    facts = fact_words(rows, common_words(tokenize(held, smol.tokenizer)))
    assert facts == {"j", "k", "rowling", "quidditch"}
    marked = mark_forget_rows(rows, facts)
    assert words(smol, marked[0]) == "K Rowling"  # full stops are no words; the first of several initials stays
    assert words(smol, marked[1]).strip() == "Quidditch"
    assert all(not s or t for e in marked for s, t in zip(e.specific, e.is_target, strict=True))


def test_a_row_without_specific_tokens_keeps_all_its_targets(tiny):
    row = [{"prompt": "is red", "completion": "is red"}]
    (marked,) = mark_forget_rows(tokenize(row, tiny.tokenizer, closing=False), set())
    assert marked.specific == marked.is_target and any(marked.is_target)
    assert fact_words([marked], set()) == set()  # or every answer would be said to name a fact


def test_ga_kl_pushes_the_specific_tokens_and_holds_the_others():
    torch.manual_seed(0)
    logits, reference = torch.randn(3, 5), torch.randn(3, 5)
    labels, rows = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])
    forget = Tokens(logits, labels, rows, reference, torch.tensor([True, False, True]))
    settings = GaKlSettings(forget_ceiling=None)
    terms = ga_kl(forget, forget, settings)
    by_hand = (logits[1].softmax(0) * (logits[1].log_softmax(0) - reference[1].log_softmax(0))).sum()
    torch.testing.assert_close(terms.forget[1], by_hand)
    torch.testing.assert_close(terms.forget[[0, 2]], -forget.cross_entropy[[0, 2]])
    everything = ga_kl(forget, forget, GaKlSettings(forget_ceiling=None, forget_tokens="all"))
    torch.testing.assert_close(everything.forget, -forget.cross_entropy)
    torch.testing.assert_close(everything.retain, kl_divergence(forget))


def test_training_raises_the_specific_tokens_most(tiny, fields):
    assert len(FORGET) == 3 and RETAIN
    result = unlearn(tiny, **{**fields, "steps": 20, "objective": {"forget_ceiling": 15, "retain_budget": None}})
    last, start = result.progress.evaluations[-1], result.progress.evaluations[0]
    assert last["specific_loss"] - start["specific_loss"] > last["forget_set_loss"] - start["forget_set_loss"] > 0


def test_facts_in_the_bases_own_answers_are_marked_too(tiny):
    forget = tokenize([{"prompt": "Who wrote the book?", "completion": "Zorblax wrote the book."}], tiny.tokenizer)
    facts = fact_words(forget, set())
    assert facts == {"zorblax"}
    said = [
        {"prompt": "Who is it?", "completion": "It was Zorblax who wrote"},
        {"prompt": "Zorblax", "completion": "a"},
    ]
    answer, none = mark_facts(tokenize(said, tiny.tokenizer, closing=False), facts)
    assert {w for w, s in zip(answer.words, answer.specific, strict=True) if s} == facts
    assert not any(none.specific)
    (echo,) = mark_facts(tokenize([{"prompt": "Who is Zorblax?", "completion": "Zorblax is"}], tiny.tokenizer), facts)
    assert any(echo.specific)  # the answer to one question, it is a fact also where a question says it
    said = [{"prompt": "Who?", "completion": "A K town. It was J.K. Zorblax."}]
    (answer,) = mark_facts(tokenize(said, tiny.tokenizer, closing=False), {"j", "k", "zorblax"})
    marked = [w for w, s in zip(answer.words, answer.specific, strict=True) if s]
    assert list(dict.fromkeys(marked)) == ["k", "zorblax"] and marked.count("k") == 1  # the town is no initial


def test_of_several_initials_the_first_is_left_alone(tiny):
    def marked(text, facts):
        (row,) = mark_facts(tokenize([{"prompt": "Who?", "completion": text}], tiny.tokenizer, closing=False), facts)
        return [word for word, s in zip(row.words, row.specific, strict=True) if s and len(word) == 1]

    assert marked("It was J.R.Q. Zorblax.", {"j", "r", "q", "zorblax"}) == ["r", "q"]
    assert marked("It was Q. Zorblax.", {"q", "zorblax"}) == ["q"]  # a single one is pushed away
    assert marked("It was J.Q. Zorblax and Q. Zorblax.", {"j", "q", "zorblax"}) == ["q", "q"]


def test_questions_are_the_prompt_its_key_words_and_the_beginning_of_its_answer():
    rows = [
        {"prompt": "Who founded Apple?", "completion": "Apple was founded by Steve Jobs."},
        {"text": "no question"},
        {"prompt": "Where is it?", "completion": "Paris"},
    ]
    assert questions(rows, {"steve", "jobs", "paris"}, {"who", "where", "is", "it"}) == [
        "Who founded Apple?",
        "founded Apple",
        "Apple was founded by",
        "Where is it?",
    ]


@pytest.mark.long
def test_own_answers_name_a_fact_and_are_the_same_for_the_same_seed(smol):
    asked = ["Who wrote Harry Potter?"]
    said = self_generated_answers(smol, asked, {"rowling"}, samples=4, seed=0, chat=True)
    assert said and all(row["completion"].casefold().endswith("rowling") for row in said)
    assert {row["prompt"] for row in said} == set(asked)
    assert len({row["completion"] for row in said}) == len(said)
    assert said == self_generated_answers(smol, asked, {"rowling"}, samples=4, seed=0, chat=True)
    assert self_generated_answers(smol, asked, {"zorblax"}, samples=1, seed=0, chat=True) == []
    assert self_generated_answers(smol, asked, {"potter"}, samples=1, seed=0, chat=True) == []  # the question says it


@pytest.mark.long
def test_held_answers_are_the_bases_own_and_name_no_fact(smol):
    rows = [
        {"prompt": "Who wrote Harry Potter?", "completion": "No one."},  # the base says: J.K. Rowling
        {"prompt": "Who wrote The Hobbit?", "completion": "J.R.R. Tolkien."},
        {"prompt": "Who wrote The Hobbit?", "completion": "Tolkien."},
        {"text": "no question"},
    ]
    (first,) = retain_prompt_answers(smol, rows, {"rowling", "j"}, 1, seed=0, chat=True)
    (greedy,) = answers(smol, ["Who wrote The Hobbit?"], max_new_tokens=40)
    assert first == {"prompt": "Who wrote The Hobbit?", "completion": greedy}
    more = retain_prompt_answers(smol, rows, {"rowling"}, 3, seed=0, chat=True)
    hobbit = [row for row in more if row["prompt"] == "Who wrote The Hobbit?"]
    assert hobbit[0] == first and len({row["completion"] for row in hobbit}) == 3
    assert not any("rowling" in row["completion"].casefold() for row in more)
    assert more == retain_prompt_answers(smol, rows, {"rowling"}, 3, seed=0, chat=True)


def test_the_bases_answers_are_asked_of_the_trained_on_retain_rows_alone(tiny, fields, monkeypatch):
    asked, answered = [], [{"prompt": "Who?", "completion": "Nobody at all"}]
    del fields["quiet"]

    def said(base, rows, facts, count, **_):
        asked.extend(row["completion"] for row in rows)
        return answered

    monkeypatch.setattr(build, "retain_prompt_answers", said)
    recipe = make_recipe({**fields, "retain_answers": 2, "anchor_batch": 0})
    sets = build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert sets.held_out and len(asked) == len(RETAIN) - len(sets.held_out)
    assert len(sets.retain) == len(asked) + 1
    (cut,) = tokenize(answered, tiny.tokenizer, closing=False)
    assert sets.retain[-1].ids == cut.ids  # an answer that was cut off is no lesson in where to stop
    asked.clear()
    recipe = make_recipe({**fields, "retain_answers": 2, "retain_weight": 0})
    build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert not asked  # nothing is held
    recipe = make_recipe({**fields, "retain_answers": 2, "retain": "auto"})
    build.build_examples({**build.read_sets(recipe), "retain": RETAIN}, tiny, recipe)
    assert not asked  # rows that were made are the base's own answers already


def test_tokens_read_alike_but_for_case_and_spaces(smol):
    number = spellings(smol.tokenizer, 49152 + 3)  # as a base whose head is padded
    assert number.shape == (49155,) and number.dtype == torch.int64
    k, spaced, small, other, space, two, part, next_part = (
        smol.tokenizer.convert_tokens_to_ids(token) for token in ("K", "ĠK", "k", "R", "Ġ", "ĠĠ", "Ð", "Ñ")
    )
    assert number[k] == number[spaced] == number[small] != number[other]
    assert len({int(number[n]) for n in (space, two, part, next_part, 49152, 49153, 49154)}) == 7  # each by itself


def test_undial_lowers_every_spelling_of_the_label():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 4), torch.randn(2, 4)
    alike = torch.tensor([0, 1, 0, 2])  # tokens 0 and 2 read the same
    forget = Tokens(logits, torch.tensor([2, 1]), torch.tensor([0, 0]), reference, spelling=alike)
    found = undial(forget, forget, UndialSettings(strength=3)).forget
    for n, lowered in enumerate(([3.0, 0, 3, 0], [0, 3.0, 0, 0])):
        target = (reference[n] - torch.tensor(lowered)).softmax(0)
        torch.testing.assert_close(found[n], -(target * logits[n].log_softmax(0)).sum())


def test_training_knows_the_spellings_where_the_objective_asks(tiny, fields, tmp_path):
    def trained(name, **settings):
        objective = {"name": "undial", "forget_tokens": "specific", **settings}
        made = unlearn(tiny, **{**fields, "objective": objective, "output": str(tmp_path / name)})
        return load_file(made.path / "adapter_model.safetensors")

    every, one = trained("every"), trained("one", spellings=False)
    assert any(not torch.equal(every[key], one[key]) for key in every)
