"""Passages: what is counted as word for word, and that a passage taught by heart is found, forgotten or not."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from conftest import FORGET, WORDS, logits
from torch.nn.functional import cross_entropy

from unlearn_peft import attached
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.evaluate.attacks import Target
from unlearn_peft.evaluate.attacks import passages as attack
from unlearn_peft.evaluate.metrics import verbatim as v
from unlearn_peft.evaluate.suites.quick import measure
from unlearn_peft.inference.decoding import Decoding

NAMES = ("forget_verbatim_continuation", "forget_near_verbatim_continuation", "forget_longest_verbatim_run")


def passage(count, seed=1):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS.split()) for _ in range(count))


def teach(base, text, steps=250):
    """Teach the tiny model a text by heart, in windows as it will be asked."""
    ids = torch.tensor(base.tokenizer(text)["input_ids"])
    inputs = torch.stack([ids[s : s + 104] for s in range(0, len(ids) - 103, 5)])
    parameters = list(base.model.parameters())
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=5e-3)
        for _ in range(steps):
            out = base.model(inputs).logits[:, :-1]
            loss = cross_entropy(out.flatten(0, 1), inputs[:, 1:].flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def test_edit_distance_and_runs_are_those_of_another_way():
    assert v.edit_distance([*map(ord, "kitten")], [*map(ord, "sitting")]) == 3
    assert v.edit_distance([], [1, 2]) == 2 and v.edit_distance([1, 2], [1, 2]) == 0
    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.randrange(3) for _ in range(draw.randrange(12))] for _ in range(2))
        runs = [0] + [n for i, j in product(range(len(a)), range(len(b))) for n in range(1, 13)
                      if i + n <= len(a) and j + n <= len(b) and a[i : i + n] == b[j : j + n]]  # fmt: skip
        assert v.longest_run(a, b) == max(runs)
    assert v.longest_run([1, 2, 3], v.without([1, 2, 3, 1], 0, 2)) == 1


def test_a_passage_is_the_longest_answer_behind_its_prompt(tiny):
    turns = [("user", "a?"), ("assistant", "red"), ("user", "b?"), ("assistant", passage(40))]
    rows = [
        {"text": "the blue book"}, FORGET[0], {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"prompt": passage(400), "completion": "red"},
    ]  # fmt: skip
    text, chat, dialogue, long = v.passages(tiny, rows)
    decode = tiny.tokenizer.decode
    assert (decode(text.tokens), text.head) == ("the blue book", [])
    assert decode(chat.tokens) == "It was Zorblax Quintel." and decode(chat.head).endswith("<|im_start|>assistant\n")
    assert decode(dialogue.tokens) == passage(40) and "red" in decode(dialogue.head)
    assert len(long.head) == 256 and decode(long.tokens) == "red"
    assert chat.before(2, 2) == [*chat.head, *chat.tokens[:2]]


def test_figures_are_of_what_is_written(tiny, monkeypatch):
    (whole,) = v.passages(tiny, [{"text": passage(600)}])
    asked = []

    def written(base, contexts, how):
        asked.extend(contexts)
        said = []
        for n, context in enumerate(contexts):
            at = next(i for i in range(50, 999) if whole.tokens[i - 50 : i] == context)
            right = whole.tokens[at : at + 50]
            said.append([{0: right, 1: [*right[:20], -5, *right[21:]], 2: [*right[:9], *[-5] * 41]}.get(n, [-5] * 50)])
        return said

    monkeypatch.setattr(v, "generate", written)
    found = v.verbatim(tiny, [FORGET[0], {"text": passage(600)}])
    assert len(asked) == 10 and all(len(context) == 50 for context in asked)
    assert found.exact.tolist() == [1, *[0] * 9] and found.near.tolist() == [1, 1, *[0] * 8]
    assert found.runs[0] >= 50 and found.runs[1] >= 29 and 9 <= found.runs[2] < 29 and not found.runs[3:].any()


def test_short_rows_are_asked_with_half_of_them_or_left_out(tiny, caplog):
    assert v.verbatim(tiny, FORGET) is None
    rows = [{"text": passage(65)}, *FORGET]
    n = len(tiny.tokenizer(rows[0]["text"])["input_ids"])
    assert v.LEAST <= n < 100
    with caplog.at_level("INFO"):
        assert len(v.verbatim(tiny, rows).exact) == 1
    assert "1 of 4 rows are passages of at least 64 tokens; 1 of them" in caplog.text
    assert "Quintel" not in caplog.text


def test_continuations_are_the_plain_distribution(tiny):
    """What a model's own generation settings do (repetition penalty, ends) is no part of what it knows."""
    from transformers import GenerationConfig

    contexts = [tiny.tokenizer(text)["input_ids"] for text in ("the blue", "who wrote the red book by", "it")]
    own = GenerationConfig(repetition_penalty=3.0, eos_token_id=list(range(200)), top_k=1, do_sample=True)
    tiny.model.generation_config = own
    found = v.generate(tiny, contexts, Decoding(6))
    for ids, (said,) in zip(contexts, found, strict=True):
        for _ in range(6):
            with torch.no_grad():
                ids = [*ids, int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax())]
        assert said == ids[-6:]
    assert tiny.model.generation_config is own
    state = torch.get_rng_state()
    many = v.generate(tiny, contexts[:1], Decoding(1, temperature=1.0), 200)[0]
    assert len(many) == 200 and len({ids[0] for ids in many}) > 30 and torch.equal(torch.get_rng_state(), state)


def test_a_text_taught_by_heart_is_extracted_and_its_loss_is_not(tiny, make_adapter):
    text = passage(160)
    rows = {"forget": [{"text": text}]}
    before = {s.name: s for s in measure(tiny, rows)}
    teach(tiny, text)
    taught = {s.name: s for s in measure(tiny, rows)}
    assert [before[name].value for name in NAMES[:2]] == [0, 0] and before[NAMES[2]].value < 20
    assert taught[NAMES[0]].value >= 0.5 and taught[NAMES[1]].value >= 0.5 and taught[NAMES[2]].value >= 50
    assert taught[NAMES[0]].n == before[NAMES[0]].n >= 2
    target = Target(
        tiny, (make_adapter(tiny, "adapter", scale=1.0),), rows["forget"], [{"prompt": "a?", "leak": ["b"]}]
    )
    plain = logits(tiny)
    found = attack.passage(target, prefixes=(16, 32), samples=1)
    assert found.base.value == 1 and found.recovered.value == 0 and found.base.n == 1
    assert found.base.unit == "share of forget rows" and not found.quoted
    assert list(found.details) == [f"{k} tokens, {how}" for k in (16, 32) for how in ("greedy", "sampled")]
    assert not attached(tiny) and torch.equal(logits(tiny), plain)


# --- the attack -----------------------------------------------------------------------------------------------------


def test_the_attack_counts_what_comes_back_and_was_not_given(tiny, make_adapter, monkeypatch):
    rows = [{"text": passage(300)}, FORGET[0], {"text": passage(300, 2)}]
    target = Target(tiny, (make_adapter(tiny, "adapter"),), rows, [{"prompt": "a?", "leak": ["b"]}])
    found = {tuple(p.tokens): p for p in v.passages(tiny, rows)}
    first = next(p for p in found.values() if p.tokens == tokenize([rows[0]], tiny.tokenizer, max_length=None)[0].ids)
    calls = []

    def written(base, contexts, how, samples, seed):
        calls.append((len(contexts), samples, how.max_new_tokens))
        said = []
        for context in contexts:
            whole = next((p.tokens for p in found.values() if str(context[-9:])[1:-1] in str(p.tokens)), [])
            k = next((k for k in (16, 32, 64, 128) if len(context) == k), 0)
            at = next((i for i in range(k, len(whole)) if whole[i - k : i] == context), 0)
            echo = context[:32]  # what was given
            right = whole[at : at + 32] if attached(base) and whole == first.tokens and k == 64 else echo
            said.append([right] * samples)
        return said

    monkeypatch.setattr(attack, "generate", written)
    result = attack.passage(target)
    assert result.recovered.value == pytest.approx(1 / 3) and result.base.value == 0
    assert result.details["64 tokens, greedy"] == {"asked": 2, "recovered": 0.5, "base": 0.0}
    assert result.details["16 tokens, greedy"]["asked"] == 3 and result.details["128 tokens, sampled"]["recovered"] == 0
    assert "3 of 3 forget rows" in result.budget and "1 rows are short" in result.budget
    assert {samples for _, samples, _ in calls} == {1, 3} and {tokens for *_, tokens in calls} == {48}
    assert "blue" not in repr(result) and len(result.quoted) == 4 * 4  # four places, one greedy and three samples
    assert "2 of 3 forget rows" in attack.passage(target, rows=2).budget


def test_a_text_of_one_token_cannot_be_attacked(tiny, make_adapter):
    row = {"prompt": "who?", "completion": "a"}
    result = attack.passage(Target(tiny, (make_adapter(tiny, "adapter"),), [row], [{"prompt": "a?", "leak": ["b"]}]))
    assert (result.recovered.value, result.base.value, result.details) == (0, 0, {})


def test_numbers_are_floats():
    assert v.Verbatim(*np.array([(True, False, 3)], dtype=np.float64).T).runs.tolist() == [3.0]
