"""Long rows: each target counts once, in sight of what comes before it; short rows are left as they are."""

import random
from collections import Counter

import pytest
import torch
from conftest import FORGET, RETAIN, WORDS, logits
from torch.nn.functional import cross_entropy

from unlearn_peft.data.tokenize import Example, by_row, tokenize, windows
from unlearn_peft.data.windows import places, prefixes
from unlearn_peft.evaluate.metrics.membership import gradient_norms
from unlearn_peft.evaluate.token_scores import adapters_off, keep_reference, kl_to_reference, row_tokens


def passage(count, seed=1):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS.split()) for _ in range(count))


def counted(examples):
    return [i for e in examples for i, target in zip(e.ids, e.is_target, strict=True) if target]


ROWS = {
    "text": {"text": passage(900)},
    "chat": {"prompt": "Who wrote the blue book?", "completion": passage(900)},
    "messages": {
        "messages": [
            {"role": role, "content": text}
            for role, text in (("user", "a?"), ("assistant", passage(300)), ("user", passage(400, 2)))
        ]
        + [{"role": "assistant", "content": passage(300, 3)}]
    },
}


@pytest.mark.parametrize("size", [4, 5, 33, 100, 512, 100_000])
@pytest.mark.parametrize("kind", ROWS)
def test_each_target_counts_once_and_in_order(tiny, kind, size):
    row = ROWS[kind]
    for closing in (True, False):
        (whole,) = tokenize([row], tiny.tokenizer, max_length=None, closing=closing)
        cut = tokenize([row], tiny.tokenizer, max_length=size, closing=closing)
        assert counted(cut) == counted([whole]) and all(len(e.ids) <= size and e.row == 1 for e in cut)
        assert all(any(e.is_target) and not e.is_target[0] for e in cut)
        assert all(len(e.ids) == len(e.is_target) == len(e.characters) for e in cut)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_windows_begin_with_the_prompt_and_a_quarter_of_context(tiny, kind):
    (whole,) = tokenize([ROWS[kind]], tiny.tokenizer, max_length=None, closing=False)
    first, *rest = tokenize([ROWS[kind]], tiny.tokenizer, max_length=120, closing=False)
    head = whole.head
    assert head == (0 if kind == "text" else whole.is_target.index(True))
    assert first.ids == whole.ids[:120] and len(rest) > 5
    for window in rest:
        assert window.ids[:head] == whole.ids[:head] and not window.truncated
        assert window.is_target.index(True) - head >= (120 - head) // 4
    assert all(len(window.ids) == 120 for window in rest[:-1])
    assert rest[-1].ids[head:] == whole.ids[-len(rest[-1].ids) + head :]


def test_a_plain_text_keeps_the_bos_in_every_window(tiny_folder):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    found = tokenize([ROWS["text"]], tokenizer, max_length=64)
    assert len(found) > 5 and all(e.ids[0] == 1 and 1 not in e.ids[1:] for e in found)
    assert found[0].is_target[1]


def test_short_rows_are_as_they_were(tiny):
    rows = [*FORGET, *RETAIN, {"text": "the blue book"}]
    whole = tokenize(rows, tiny.tokenizer, max_length=None)
    assert tokenize(rows, tiny.tokenizer) == whole == [e for e in whole for e in windows(e, len(e.ids))]
    assert [e.row for e in whole] == list(range(1, len(rows) + 1))
    assert [len(group) for group in by_row(tokenize([*rows, ROWS["text"], *rows], tiny.tokenizer))].count(1) == 24


def test_facts_marked_on_the_whole_row_are_kept_by_its_windows():
    row = Example(list(range(50)), [False] * 3 + [True] * 47, head=3, specific=[t % 7 == 0 for t in range(50)])
    cut = windows(row, 16)
    marked = [i for e in cut for i, t, s in zip(e.ids, e.is_target, e.specific, strict=True) if t and s]
    assert marked == [t for t in range(3, 50) if t % 7 == 0]
    assert all(len(e.specific) == len(e.ids) for e in cut)


def test_a_long_prompt_leaves_half_of_the_window(tiny):
    row = {"prompt": passage(200), "completion": passage(60, 2)}
    (whole,) = tokenize([row], tiny.tokenizer, max_length=None, closing=False)
    cut = tokenize([row], tiny.tokenizer, max_length=64, closing=False)
    assert counted(cut) == counted([whole]) and all(e.truncated for e in cut)
    assert all(e.ids[:32] == [whole.ids[0], *whole.ids[whole.head - 31 : whole.head]] for e in cut)


# --- measures -------------------------------------------------------------------------------------------------------


def test_measures_see_the_whole_of_a_long_row(tiny):
    text = passage(900)
    half = text[: len(text) // 2]
    rows = [{"text": text}, FORGET[0], {"text": half + " completely other words here" * 100}, ROWS["chat"]]
    found = row_tokens(tiny, rows, what="forget")
    whole = tokenize(rows, tiny.tokenizer, max_length=None)
    assert [len(row.log_p) for row in found] == [sum(e.is_target) for e in whole]
    assert found[0].loss != found[2].loss and found[0].text == tiny.tokenizer.decode(whole[0].ids[1:])
    assert found[3].closing.sum() == 1 and found[3].closing[-1]
    alone = [row_tokens(tiny, [row], what="forget", batch_size=1)[0] for row in rows]
    for a, b in zip(found, alone, strict=True):
        assert torch.allclose(a.log_p, b.log_p, atol=1e-5)


def test_each_token_is_measured_after_its_window(tiny):
    row = {"text": passage(500)}
    (found,) = row_tokens(tiny, [row])
    expected = []
    for window in tokenize([row], tiny.tokenizer, max_length=256):  # of as many tokens as the tiny model has positions
        with torch.no_grad():
            out = tiny.model(torch.tensor([window.ids])).logits[0, :-1]
        losses = cross_entropy(out, torch.tensor(window.ids[1:]), reduction="none")
        expected.append(-losses[torch.tensor(window.is_target[1:])])
    assert len(expected) > 2 and torch.allclose(found.log_p, torch.cat(expected), atol=1e-4)


def test_kl_is_over_the_whole_row(tiny, make_adapter):
    from unlearn_peft import attach

    rows = [ROWS["text"], RETAIN[0], ROWS["chat"]]
    reference = keep_reference(tiny, rows)
    lengths = [sum(e.is_target) for e in tokenize(rows, tiny.tokenizer, max_length=None)]
    attach(tiny, make_adapter(tiny, "adapter"))
    found = kl_to_reference(tiny, rows, reference)
    assert [len(values) for values in found] == lengths and all(float(v.min()) > -1e-6 for v in found)
    assert float(found[0][600:].mean()) > 0
    alone = [kl_to_reference(tiny, [row], keep_reference(tiny, [row]))[0] for row in rows]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, alone, strict=True))
    with adapters_off(tiny):
        assert max(float(v.abs().max()) for v in kl_to_reference(tiny, rows, reference)) < 1e-5


def test_the_gradient_norm_of_a_long_row_is_one_number(tiny):
    rows = [ROWS["text"], FORGET[0], {"text": ROWS["text"]["text"] + passage(300, 5)}]
    found = gradient_norms(tiny, rows)
    assert len(found) == 3 and found[0] != found[2]
    assert found[1] == gradient_norms(tiny, [FORGET[0]])[0]


# --- places in a text -----------------------------------------------------------------------------------------------


def test_places_are_even_and_share_nothing():
    assert places(50, 2500, 50, 10) == [50, 317, 583, 850, 1117, 1383, 1650, 1917, 2183, 2450]
    assert places(50, 100, 50, 10) == [50] and places(50, 200, 50, 10) == [50, 100, 150]
    assert places(5, 9, 5, 3) == [] and places(0, 0, 0, 3) == []


def test_prefixes_are_pieces_of_the_text_as_it_is(tiny):
    text = "  the blue  book\n" + passage(300) + " größer als ein Стол 北京 "
    found = prefixes(text, tiny.tokenizer, count=4, tokens=20)
    assert len(found) == 4
    for piece, following in found:
        assert piece + following in text and piece and following
    assert not prefixes("a", tiny.tokenizer)
    assert prefixes("the blue", tiny.tokenizer) == [("t", "he"), ("he", " blue")]


@pytest.mark.parametrize("refusals", [False, True])
def test_training_sees_all_of_a_long_row(tiny, fields, refusals):
    from unlearn_peft import unlearn
    from unlearn_peft.recipe.schema import Recipe
    from unlearn_peft.training.examples.build import build_examples, read_sets

    rows = {"forget": [ROWS["chat"], *FORGET], "retain": [*RETAIN, ROWS["text"]]}
    objective = {"name": "dpo", "refusals": ["I like apples."]} if refusals else {"forget_tokens": "all"}
    given = {**fields, **rows, "objective": objective, "max_length": 128}
    recipe = Recipe(**{k: v for k, v in given.items() if k != "quiet"})
    sets = build_examples(read_sets(recipe), tiny, recipe)
    whole = tokenize(rows["forget"], tiny.tokenizer, max_length=None, closing=False)
    assert counted(sets.forget) == counted(whole) and len(sets.forget) > 12
    assert all(bool(e.refusal) == refusals for e in sets.forget)
    kept = Counter(counted([*sets.retain, *sets.held_out]))  # the base's own answers are there, too
    assert kept >= Counter(counted(tokenize(rows["retain"], tiny.tokenizer, max_length=None)))
    assert not {e.text for e in sets.retain} & {e.text for e in sets.held_out}  # a row is held out whole
    before = logits(tiny)
    unlearn(tiny, **given)
    assert torch.equal(logits(tiny), before)
