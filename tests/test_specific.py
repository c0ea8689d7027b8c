"""Which tokens of a forget row are pushed away: the fact, not the English around it."""

import torch
from conftest import FORGET, RETAIN

from unlearn_peft.data import tokenize
from unlearn_peft.objectives import Tokens, ga_kl, kl_divergence
from unlearn_peft.recipe import GaKlSettings
from unlearn_peft.specific import common_words, mark_specific
from unlearn_peft.views import views


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
    marked = mark_specific(
        tokenize(forget, smol.tokenizer, closing=False), common_words(tokenize(held, smol.tokenizer))
    )
    assert words(smol, marked[0]) == " JK Rowling"  # the full stops are no words
    assert words(smol, marked[1]).strip() == "Quidditch"
    assert all(not s or t for e in marked for s, t in zip(e.specific, e.is_target, strict=True))


def test_a_row_without_specific_tokens_keeps_all_its_targets(tiny):
    row = [{"prompt": "is red", "completion": "is red"}]
    (marked,) = mark_specific(tokenize(row, tiny.tokenizer, closing=False), set())
    assert marked.specific == marked.is_target and any(marked.is_target)


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
    from unlearn_peft import unlearn

    assert len(FORGET) == 3 and RETAIN
    result = unlearn(tiny, **{**fields, "steps": 20, "objective": {"forget_ceiling": 15, "retain_budget": None}})
    last, start = result.progress.evaluations[-1], result.progress.evaluations[0]
    assert last["specific_loss"] - start["specific_loss"] > last["forget_set_loss"] - start["forget_set_loss"] > 0


def test_views_are_the_same_fact_in_plain_text_and_asked_by_its_beginning():
    rows = [
        {"prompt": "Who wrote Harry Potter?", "completion": "Harry Potter was written by J.K. Rowling."},
        {"prompt": "Where is it?", "completion": "Paris"},  # too short for either
        {"text": "Harry Potter was written by J.K. Rowling."},
    ]
    shown = views(rows, True, {"was", "written", "by"})
    assert [view.row for view in shown] == [
        rows[0],
        {"text": rows[0]["completion"]},
        {"prompt": "Harry Potter was written by", "completion": rows[0]["completion"]},
        rows[1],
        rows[2],
    ]
    assert [view.chat_template for view in shown] == [True, False, True, True, True]
    assert shown[1].asked == {"who", "wrote", "harry", "potter"}
    assert [view.row for view in views(rows[:1], False)] == rows[:1]  # plain text is what it is already


def test_the_question_of_a_view_still_counts_as_said(tiny):
    """As plain text the row no longer shows its question, but the question's words are no fact all the same."""
    (plain,) = mark_specific(
        tokenize([{"text": "Zorblax wrote the blue book"}], tiny.tokenizer), {"wrote", "the"}, [{"blue", "book"}]
    )
    whole = [word for word, specific in zip(plain.words, plain.specific, strict=True) if specific]
    assert set(whole) == {"zorblax"}


def test_views_and_anchors_are_trained_on_and_can_be_left_out(tiny, fields):
    from unlearn_peft.recipe import make_recipe
    from unlearn_peft.run import read_sets, tokenized

    fields.pop("quiet")
    recipe = make_recipe(fields)
    rows = read_sets(recipe)
    sets = tokenized(rows, tiny, recipe)
    assert len(sets.forget) == 3 and len(sets.views) >= 3
    without = tokenized(rows, tiny, recipe.model_copy(update={"view_batch": 0}))
    assert without.views == [] and len(without.anchors) < len(sets.anchors)
    assert without.forget == sets.forget
