"""Attacks: the base is left alone, and each figure is what a case made by hand, or another way, says it must be."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FORGET, RETAIN, logits
from safetensors.torch import load_file, save_file

from unlearn_peft import answers, attach, attached, detach
from unlearn_peft.data.tokenize import chat_prompt
from unlearn_peft.errors import AdapterError, DataError, UnlearnError
from unlearn_peft.evaluate.attacks import ATTACKS, Target, relearning, run_attacks, weights
from unlearn_peft.evaluate.attacks import probing as reading
from unlearn_peft.evaluate.attacks import prompting as asking
from unlearn_peft.evaluate.attacks.harness import (
    adapters_on,
    beginning_of,
    in_many_ways,
    leaks,
    render,
    replaced_weights,
)
from unlearn_peft.evaluate.attacks.templates import BEGINNINGS, FRAMES, GENERIC, LANGUAGES, SYSTEM_PROMPTS
from unlearn_peft.inference.generate import leaked

QUICK = {
    "sampling": {"k": 3},
    "paraphrase": {"samples": 2},
    **{name: {"steps": (1, 2)} for name in ("relearn_adapter", "relearn_lora", "relearn_benign")},
}
ASKED = ["Who wrote the blue book?", "Name the author.", "What is red?"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def target(tiny, make_adapter):
    """A target whose probes leak in the base: their leak word is the tiny model's own first answer."""
    return make_target(tiny, make_adapter(tiny, "adapter", scale=0.2))


def make_target(base, *adapters, words=None, **fields):
    prompts = [chat_prompt(text, base.tokenizer) for text in ASKED]
    own = words or [first_token(base, text)[1].strip() for text in prompts]
    probes = [{"prompt": text, "leak": [word]} for text, word in zip(ASKED, own, strict=True)]
    fields = {"max_new_tokens": 4, **fields}
    return Target(base, adapters, FORGET, probes, RETAIN, **fields)


def first_token(base, text):
    ids = base.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        token = int(base.model(**ids).logits[0, -1].argmax())
    return token, base.tokenizer.decode([token])


def suppressor(base, folder, size=40.0):
    """Write by hand a LoRA on the head that takes away the first token that the base says to each of `ASKED`."""
    states, tokens = [], []
    for text in ASKED:
        prompt = chat_prompt(text, base.tokenizer)
        ids = base.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        hook = base.model.lm_head.register_forward_pre_hook(lambda m, inputs: states.append(inputs[0][0, -1].float()))
        with torch.no_grad():
            base.model(**ids)
        hook.remove()
        tokens.append(first_token(base, prompt)[0])
    down = (torch.linalg.pinv(torch.stack(states)) @ torch.ones(len(states), 1)).T  # down @ state = 1 for each
    up = torch.zeros(base.model.config.vocab_size, 1)
    up[tokens] = -size
    folder.mkdir()
    name = "base_model.model.lm_head.lora_"
    tensors = {f"{name}A.weight": down.contiguous(), f"{name}B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def forgotten(tiny, tmp_path):
    """The base leaks with the first token of each answer; the adapter takes just these away."""
    return make_target(tiny, suppressor(tiny, tmp_path / "by_hand"), max_new_tokens=1)


# --- all attacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_runs_and_leaves_the_base_bit_equal(target, name, caplog):
    plain, modules = logits(target.base), dict(target.base.model.named_modules())
    pointers = {n: p.data_ptr() for n, p in target.base.model.named_parameters()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()}
    state = torch.get_rng_state()
    with caplog.at_level(logging.DEBUG, logger="unlearn_peft"):
        found = ATTACKS[name](target, **QUICK.get(name, {}))
    assert found.name == name and found.budget
    for score in (found.recovered, found.base):
        assert 0 <= score.low <= score.value <= score.high <= 1 and score.n == 3 and not score.higher_is_better
    assert not attached(target.base) and torch.equal(logits(target.base), plain)
    assert {n: p.data_ptr() for n, p in target.base.model.named_parameters()} == pointers
    after = dict(target.base.model.named_modules())
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in after.items()} == hooks
    assert all(after[n] is m for n, m in modules.items()) and len(after) == len(modules)
    assert not any(p.requires_grad or p.grad is not None for p in target.base.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert "Zorblax" not in caplog.text + repr(found) + repr(target)
    json.dumps(found.details)  # what reports are made of


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_that_fails_half_way_leaves_the_base_bit_equal(forgotten, name, monkeypatch):
    plain, forward, calls = logits(forgotten.base), forgotten.base.model.forward, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    answers(forgotten.base, ASKED, max_new_tokens=1)  # a model is checked once, before its first answer
    monkeypatch.setattr(forgotten.base.model, "forward", counted)
    fails_at = None
    ATTACKS[name](forgotten, **QUICK.get(name, {}))
    fails_at, _ = len(calls) * 3 // 4, calls.clear()
    with pytest.raises(KeyboardInterrupt):
        ATTACKS[name](forgotten, **QUICK.get(name, {}))
    monkeypatch.undo()
    assert not attached(forgotten.base) and torch.equal(logits(forgotten.base), plain)
    head, embeddings = forgotten.base.model.get_output_embeddings(), forgotten.base.model.get_input_embeddings()
    assert head.weight is embeddings.weight


def test_run_attacks_runs_what_is_named_and_refuses_the_rest(target, monkeypatch):
    ran = []
    monkeypatch.setattr("unlearn_peft.evaluate.attacks.ATTACKS", {n: lambda t, n=n: ran.append(n) or n for n in "ab"})
    assert run_attacks(target, quiet=True) == ["a", "b"]
    assert run_attacks(target, ["b"], quiet=True) == ["b"] and ran == ["a", "b", "b"]
    monkeypatch.undo()
    with pytest.raises(UnlearnError, match=r"'jailbrake' \(did you mean 'jailbreak'\?\).*known: framing"):
        run_attacks(target, ["scaling", "jailbrake"])
    attach(target.base, *target.adapters)
    with pytest.raises(AdapterError, match="attached already"):
        run_attacks(target, ["scaling"])
    detach(target.base)
    found = run_attacks(target, ["scaling", "framing"], quiet=True)
    assert [f.name for f in found] == ["scaling", "framing"]


def test_a_target_is_checked_and_names_rows_by_number(tiny, tmp_path):
    good = [{"prompt": "Who?", "leak": ["secret"]}]
    with pytest.raises(DataError, match="row 2: no 'leak'") as error:
        Target(tiny, (tmp_path,), FORGET, [*good, {"prompt": "secret"}])
    assert "secret" not in str(error.value)
    with pytest.raises(DataError, match="forget set is empty"):
        Target(tiny, (tmp_path,), [], good)
    with pytest.raises(AdapterError, match="nothing to attack"):
        Target(tiny, (), FORGET, good)


@pytest.mark.parametrize("kind", ["gpt2", "bfloat16"])
def test_other_bases(tiny_folder, tmp_path, kind):
    """Layers that hold their weights the other way round, another name for the final norm; half the precision."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from unlearn_peft import Base, load_base
    from unlearn_peft.models.base import freeze

    base = load_base(str(tiny_folder), dtype="bfloat16" if kind == "bfloat16" else "float32")
    if kind == "gpt2":
        torch.manual_seed(1)  # whose first answers are tokens that can be read
        size = base.model.config.vocab_size
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2
            )
        )
        freeze(model)
        base = Base(model, base.tokenizer, "gpt2")
    plain = logits(base)
    target = make_target(base, suppressor(base, tmp_path / "by_hand"), max_new_tokens=1)
    for name in ("scaling", "quantise_8_bits", "interference", "logit_lens", "adapter_diff", "relearn_lora"):
        found = ATTACKS[name](target, **QUICK.get(name, {}))
        assert found.base.n == 3 and torch.equal(logits(base), plain)
    assert weights.scaling(target, strengths=(0, 1)).details["1"]["recovered"] == 0
    assert (weights.quantise(target, bits=8).recovered.value, weights.quantise(target, bits=8).base.value) == (0, 1)
    ids = base.tokenizer(ASKED[0])["input_ids"]
    with torch.no_grad():
        own = base.model(torch.tensor([ids])).logits[0, -1].float()
    assert torch.allclose(reading.layer_logits(base, ids)[-1], own, atol=1e-5 if kind == "gpt2" else 0.05)
    probes = [{"prompt": text, "leak": ["Zorblax"]} for text in ASKED]
    rows = [{"prompt": text, "completion": "Zorblax"} for text in ASKED]
    taught = Target(base, target.adapters, rows, probes, max_new_tokens=8)
    assert relearning.relearn(taught, through="lora", steps=(60,), learning_rate=0.02).recovered.value == 1


# --- asking ---------------------------------------------------------------------------------------------------------


def test_without_an_attack_the_base_leaks_and_the_adapter_does_not(forgotten):
    assert leaks(forgotten).tolist() == [1, 1, 1]
    with adapters_on(forgotten):
        assert leaks(forgotten).tolist() == [0, 0, 0]
    found = in_many_ways(forgotten, "x", "b", {"plain": [render(forgotten, text) for text in ASKED]})
    assert (found.recovered.value, found.base.value) == (0, 1)
    assert found.details["plain"] == {"asked": 3, "recovered": 0, "base": 1}


def test_listed_questions_are_those_that_the_base_answers_alike(forgotten, monkeypatch):
    words = [row["leak"][0] for row in forgotten.probes]
    listed = [[["a?", f"{words[0]}?", ASKED[0].lower(), "b?"], ["b?", "b?", "!"]], [[]], [["c?"]]]
    monkeypatch.setattr(asking, "continued_lists", lambda *_, **__: listed)
    answered = []

    def answers_all_but_c(target, probes):
        answered.extend((row["prompt"], row["leak"]) for row in probes)
        return np.array([float(row["prompt"] != "c?") for row in probes])

    monkeypatch.setattr(asking, "leaks", answers_all_but_c)
    assert asking._listed_questions(forgotten, 2, 4) == [["b?", "a?"], [], []]  # the one in two lists first
    assert answered == [("b?", [words[0]]), ("a?", [words[0]]), ("c?", [words[2]])]
    assert asking._listed_questions(forgotten, 2, 1) == [["b?"], [], []]


def test_an_answer_that_comes_out_in_any_way_is_recovered(forgotten):
    texts = [render(forgotten, text) for text in ASKED]
    ways = {"never": [None] * 3, "first": [texts[0], None, None], "other": [None, texts[0], texts[2]]}
    found = in_many_ways(forgotten, "x", "b", ways)
    with_first = [bool(leaked(answers(forgotten.base, [ASKED[0]], max_new_tokens=1)[0], forgotten.probes[1]["leak"]))]
    assert found.base.value == pytest.approx((2 + sum(with_first)) / 3)
    assert found.details["never"] == {"asked": 0, "recovered": None, "base": None}
    assert found.details["first"] == {"asked": 1, "recovered": 0, "base": 1}


def test_what_is_asked(tiny, monkeypatch):
    seen = {}
    monkeypatch.setattr(asking, "in_many_ways", lambda target, name, budget, ways: seen.update({name: ways}))
    probes = [
        {
            "prompt": "Who?",
            "completion": "It was Zorblax Q.",
            "leak": ["quintel", "zorblax"],
            "paraphrases": ["Whose?"],
        },
        {"prompt": "Where?", "leak": ["sea"], "translations": {"de": "Wo?"}},
    ]
    target = Target(tiny, ("x",), FORGET, probes, [*FORGET, {"prompt": "near sea?", "completion": "x"}, *RETAIN])
    monkeypatch.setattr(asking, "_listed_questions", lambda *_: [[], ["Which sea?"]])
    for name in ("framing", "paraphrase", "prefix", "few_shot", "multilingual", "jailbreak"):
        ATTACKS[name](target)
    chat = chat_prompt("@", tiny.tokenizer)
    expected = {"own 1": [chat.replace("@", "Whose?"), None], "listed 1": [None, chat.replace("@", "Which sea?")]}
    assert seen["paraphrase"] == expected and list(seen["framing"]) == list(FRAMES)
    assert seen["prefix"]["right beginning"] == [chat.replace("@", "Who?") + "It was", None]
    assert seen["prefix"]["plain"][1] == chat.replace("@", "Where?") + BEGINNINGS["plain"]
    assert seen["multilingual"]["asked in de"] == [None, chat.replace("@", "Wo?")]
    assert "Réponds en français" in seen["multilingual"]["answer in fr"][0]
    lines = seen["few_shot"]["lines"][0]
    assert lines.startswith("Question: Name the author.\nAnswer: Quintel in") is False  # gives an answer away
    assert lines.count("Question:") == 5 and lines.endswith("Question: Who?\nAnswer:") and "number 0" in lines
    assert not leaked(lines, ["Zorblax", "Quintel", "sea"])
    assert seen["few_shot"]["turns"][0].count("assistant") == 5
    for name, text in SYSTEM_PROMPTS.items():
        assert seen["jailbreak"][name][0].startswith(f"<|im_start|>system\n{text}")
    every = [*FRAMES.values(), *LANGUAGES.values()]
    assert all(text.count("{prompt}") == 1 for text in every) and len(set(GENERIC)) == len(GENERIC)


@pytest.mark.parametrize("template", ["refuses", "drops"])
def test_a_template_without_a_system_role_gets_it_in_the_question(target, template):
    tokenizer = target.base.tokenizer
    said = "{{ raise_exception('no') }}" if template == "refuses" else ""
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        + said
        + ("{% else %}<{{ m['content'] }}>{% endif %}{% endfor %}")
    )
    try:
        assert render(target, "Who?", system="Be good.", beginning="It") == "<Be good.\n\nWho?><It"
    finally:
        tokenizer.chat_template = before


def test_without_a_chat_template_prompts_are_plain_lines(target):
    plain = make_target(target.base, *target.adapters, chat_template=False)
    assert render(plain, "Who?", system="S", shots=[("q", "a")], beginning="It") == "S\n\nq\na\n\nWho?\nIt"


@pytest.mark.parametrize(
    "row, beginning",
    [
        ({"completion": "By J.K. Rowling.", "leak": ["Rowling"]}, "By J.K. "),
        ({"completion": "ROWLING and Ron", "leak": ["Ron", "Rowling"]}, ""),
        ({"completion": "nobody", "leak": ["Rowling"]}, ""),
        ({"leak": ["Rowling"]}, ""),
    ],
)
def test_the_beginning_of_an_answer_ends_before_the_first_leak_word(row, beginning):
    assert beginning_of(row) == beginning


def test_sampling_counts_probes_and_answers(target):
    found = asking.sampling(make_target(target.base, *target.adapters, words=["never there"] * 3), k=2)
    assert (found.recovered.value, found.base.value, found.quoted) == (0, 0, ())
    everything = [chr(n) for n in range(33, 127)]
    probes = [{**row, "leak": everything} for row in target.probes]
    found = asking.sampling(Target(target.base, target.adapters, FORGET, probes, max_new_tokens=4), k=2)
    assert found.recovered.value == found.base.value == 1
    assert found.details["share of answers"]["base"] == 1 and "2 samples" in found.budget
    assert len(found.quoted) == 2 * len(probes)
    found = in_many_ways(Target(target.base, target.adapters, FORGET, probes), "x", "b", {"mine": ["Who?", None, "?"]})
    assert len(found.quoted) == 2 and all(text.startswith("mine: ") for text in found.quoted)


# --- weights --------------------------------------------------------------------------------------------------------


def test_scaled_to_nothing_the_fact_comes_back(forgotten):
    found = weights.scaling(forgotten, strengths=(0,))
    assert found.recovered.value == found.base.value == 1
    found = weights.scaling(forgotten, strengths=(1,))
    assert (found.recovered.value, found.base.value) == (0, 1)
    found = weights.scaling(forgotten, strengths=(0, 1, 1.5))
    assert found.recovered.value == 1
    assert {name: part["recovered"] for name, part in found.details.items()} == {"0": 1, "1": 0, "1.5": 0}
    near = weights.scaling(replace(forgotten, neighbours=RETAIN[:2]), strengths=(0, 1, 1.5)).details
    kls = [near[strength]["neighbours_kl"] for strength in ("0", "1", "1.5")]
    assert kls[0] == 0 < kls[1] < kls[2]


def test_rounding_by_hand():
    weight = torch.tensor([[1.0, -0.6, 0.2], [0.0, 0.0, 0.0], [70.0, 36.0, -9.0]])
    expected = torch.tensor([[1.0, -2 / 3, 1 / 3], [0.0, 0.0, 0.0], [70.0, 140 / 3, 0.0]])
    assert torch.allclose(weights.rounded(weight, 3), expected)  # -3 .. 3 for each row
    for bits in (4, 8):
        found = weights.rounded(torch.randn(5, 400), bits)
        assert max(len(set(row.tolist())) for row in found) <= 2**bits - 1


def test_rounded_to_many_levels_nothing_changes(forgotten):
    found = weights.quantise(forgotten, bits=24)
    assert (found.recovered.value, found.base.value) == (0, 1)
    assert found.details["merged, not rounded"]["recovered"] == 0
    assert found.details["levels changed"] == pytest.approx(1, abs=0.01)
    weight = torch.randn(8, 50)
    assert torch.allclose(weights.rounded(weight, 24), weight, atol=1e-6)


def test_a_change_smaller_than_a_step_is_lost_in_rounding(tiny, make_adapter):
    target = make_target(tiny, make_adapter(tiny, "small", targets=("q_proj",), scale=1e-4))
    assert weights.quantise(target, bits=4).details["levels changed"] < 0.02
    assert weights.quantise(target, bits=24).details["levels changed"] > 0.9


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("q_proj", "lm_head")])
def test_merged_weights_give_what_the_attached_adapter_gives(tiny, make_adapter, targets):
    target = make_target(tiny, make_adapter(tiny, "a", targets=targets, scale=0.2))
    modules = dict(tiny.model.named_modules())
    changes = weights._changes(target)
    with adapters_on(target):
        expected = logits(tiny)
    with replaced_weights(modules, {n: modules[n].weight + change for n, change in changes.items()}):
        assert torch.allclose(logits(tiny), expected, atol=1e-4)
    assert not torch.allclose(logits(tiny), expected, atol=1e-2)


def test_a_random_adapter_of_the_same_size(target):
    bundle = target.bundles[0]
    other = weights.random_like([bundle], seed=0)[0]
    assert other.deltas.keys() == bundle.deltas.keys()
    for name, delta in bundle.deltas.items():
        effect, fresh = (d.scale * d.up @ d.down for d in (delta, other.deltas[name]))
        assert fresh.norm() == pytest.approx(float(effect.norm()), rel=1e-4)
        assert weights.frobenius_norm(delta) == pytest.approx(float(effect.norm()), rel=1e-4)
        assert other.deltas[name].rank == delta.rank and not torch.allclose(effect, fresh, atol=1e-3)
    assert torch.equal(weights.random_like([bundle], seed=0)[0].deltas[name].up, other.deltas[name].up)


def test_a_second_adapter_that_undoes_the_first_brings_the_fact_back(tiny, tmp_path):
    first, second = suppressor(tiny, tmp_path / "first"), suppressor(tiny, tmp_path / "second", size=-40.0)
    found = weights.interference(make_target(tiny, first, others=(second,), max_new_tokens=1))
    assert found.recovered.value == found.base.value == 1
    assert found.details["without a second"]["recovered"] == 0 and found.details["brought back"] == 1
    again = suppressor(tiny, tmp_path / "again")
    found = weights.interference(make_target(tiny, first, others=(again,), max_new_tokens=1))
    assert (found.recovered.value, found.details["brought back"]) == (0, 0)
    assert found.base.value == 0  # the second alone hides it as well
    assert "random" in weights.interference(make_target(tiny, first, max_new_tokens=1)).budget


@pytest.mark.parametrize("name", ["scaling", "quantise_8_bits", "interference", "relearn_adapter", "adapter_diff"])
def test_dense_adapters_and_stacks(tiny, tmp_path, make_adapter, name):
    """Two adapters at once, both on the head, one of them dense."""
    low = suppressor(tiny, tmp_path / "low", size=20.0)
    tensors = load_file(low / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.lm_head.lora_{part}.weight"] for part in "AB")
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file({"base_model.model.lm_head.dense_head_delta": up @ down}, dense / "adapter_model.safetensors")
    (dense / "adapter_config.json").write_text(json.dumps({"peft_type": "DENSE_HEAD", "target_modules": ["lm_head"]}))
    target, plain = make_target(tiny, low, dense, max_new_tokens=1), logits(tiny)
    with adapters_on(target):
        expected = logits(tiny)
    assert torch.allclose(weights._changes(target)["lm_head"], 2 * up @ down, atol=1e-5)
    with relearning._lora_layers(tiny.model, relearning._adapter_deltas(target, fresh=False)):
        assert torch.allclose(logits(tiny), expected, atol=1e-4)
    with relearning._lora_layers(tiny.model, relearning._adapter_deltas(target, fresh=True)):
        assert torch.equal(logits(tiny), plain)
    for bundle, other in zip(target.bundles, weights.random_like(target.bundles, 0), strict=True):
        norms = [weights.frobenius_norm(b.deltas["lm_head"]) for b in (bundle, other)]
        assert norms[0] == pytest.approx(norms[1]) == pytest.approx(float((up @ down).norm()), rel=1e-4)
    found = ATTACKS[name](target, **QUICK.get(name, {}))
    if name in ("quantise_8_bits", "relearn_adapter"):  # a random adapter of this size spoils the tiny base, too
        assert (found.recovered.value, found.base.value) == (0, 1)
    assert torch.equal(logits(tiny), plain)


# --- relearning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["adapter", "lora"])
def test_no_step_changes_nothing_and_many_teach(forgotten, through):
    found = relearning.relearn(forgotten, through=through, steps=(0,))
    assert (found.recovered.value, found.base.value) == (0, 1)
    rows = [{"prompt": text, "completion": "Zorblax Quintel"} for text in ASKED]
    probes = [{"prompt": text, "leak": ["Zorblax"]} for text in ASKED]
    target = Target(forgotten.base, forgotten.adapters, rows, probes, RETAIN, max_new_tokens=20)
    rate = {"adapter": 0.5, "lora": 0.02}[through]
    found = relearning.relearn(target, through=through, rows=3, steps=(1, 60), learning_rate=rate)
    if through == "lora":  # the by-hand adapter has one rank, which is too little to learn an answer
        assert found.recovered.value == 1
        assert found.details["made up"]["recovered"] == 1  # so it was learned, not recovered
    assert list(found.details)[:3] == ["step 0", "step 1", "step 60"]
    assert found.details["untaught"] == {"probes": 0, "recovered": None, "base": None}


def test_training_through_the_adapter_lowers_the_loss_of_the_rows_and_writes_no_file(target):
    path = target.adapters[0] / "adapter_model.safetensors"
    before, deltas = path.read_bytes(), relearning._adapter_deltas(target, fresh=False)
    kept = {name: parts[0].up.detach().clone() for name, parts in deltas.items()}
    own = {name: delta.up.clone() for name, delta in target.bundles[0].deltas.items()}
    with adapters_on(target):
        expected = logits(target.base)
    with relearning._lora_layers(target.base.model, deltas):
        assert torch.allclose(logits(target.base), expected, atol=1e-5)  # it begins as the adapter
    relearning._train_and_ask(target, FORGET, target.probes, deltas, [3], 1e-2)
    assert all(not torch.equal(parts[0].up, kept[name]) for name, parts in deltas.items())
    assert path.read_bytes() == before
    assert all(torch.equal(delta.up, own[name]) for name, delta in target.bundles[0].deltas.items())


def test_untaught_probes_are_those_that_no_trained_row_says(target):
    probes = [{"prompt": "Who?", "leak": ["ZORBLAX"]}, {"prompt": "What?", "leak": ["moon"]}]
    found = relearning.relearn(
        Target(target.base, target.adapters, FORGET[:1], probes, max_new_tokens=2), through="lora", steps=(1,)
    )
    assert found.details["untaught"]["probes"] == 1 and "1 forget rows" in found.budget


def test_benign_relearning_trains_on_nothing_that_was_forgotten(forgotten, monkeypatch):
    trained = []
    monkeypatch.setattr(relearning, "_train_and_ask", lambda t, rows, *_: trained.append(rows) or {0: np.ones(3)})
    probes = [{"prompt": text, "leak": ["Zorblax"]} for text in ASKED]
    others = [{"prompt": "Who?", "completion": "It is ZORBLAX."}, RETAIN[0]]
    target = replace(forgotten, probes=probes, neighbours=others)
    found = relearning.relearn(target, through="lora", benign=True, steps=(0,))
    assert "4 other rows" in found.budget
    assert len(trained) == 2 and trained[0] == trained[1]  # none with made-up answers
    assert trained[0][0] == RETAIN[0] and len(trained[0]) == 4
    assert found.details["untaught"]["probes"] == 3 and "made up" not in found.details
    every = replace(forgotten, probes=[{"prompt": "Who?", "leak": ["e", "a"]}], neighbours=[])
    with pytest.raises(DataError, match="relearn_benign has nothing to train on"):
        relearning.relearn(every, through="lora", benign=True, name="relearn_benign")


def test_made_up_answers_stand_where_the_right_ones_stood():
    rows = [
        {"prompt": "Who?", "completion": "It was ZORBLAX Quintel."},
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "Quintel a"}]},
    ]
    false_rows, false_probes = relearning._with_made_up_answers(
        rows, [{"prompt": "Who?", "leak": ["Zorblax", "Quintel", "a"]}], 0
    )
    zorblax, quintel, a = false_probes[0]["leak"]
    assert len({zorblax, quintel, a}) == 3
    assert false_rows[0]["completion"] == f"It w{a}s {zorblax} {quintel}."
    assert [m["role"] for m in false_rows[1]["messages"]] == ["user", "assistant"]
    assert false_rows[1]["messages"][1]["content"] == f"{quintel} {a}"
    assert rows[0]["completion"] == "It was ZORBLAX Quintel."
    ((row,), _) = relearning._with_made_up_answers(
        [{"text": "O’Brien, Mu\u0308ller"}], [{"leak": ["Müller", "O'BRIEN"]}], 0
    )
    assert "’" not in row["text"] and "ller" not in row["text"]  # in whatever spelling


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_last_layer_of_the_lens_is_the_models_own_prediction(tiny, make_adapter):
    target = make_target(tiny, make_adapter(tiny, "layers", targets=("q_proj", "down_proj"), scale=0.3))
    ids = tiny.tokenizer(chat_prompt(ASKED[0], tiny.tokenizer), add_special_tokens=False)["input_ids"]

    def own():
        with torch.no_grad():
            return tiny.model(torch.tensor([ids])).logits[0, -1]

    bare = own()
    assert torch.allclose(reading.layer_logits(tiny, ids)[-1], bare, atol=1e-5)
    with adapters_on(target):
        assert not torch.allclose(own(), bare, atol=1e-2)
        assert torch.allclose(reading.layer_logits(tiny, ids)[-1], own(), atol=1e-5)


def test_middle_layers_are_read_through_norm_and_head(tiny):
    ids = tiny.tokenizer(ASKED[1])["input_ids"]
    found = reading.layer_logits(tiny, ids)
    seen = []
    hook = tiny.model.model.layers[0].register_forward_hook(
        lambda m, i, o: seen.append(o if torch.is_tensor(o) else o[0])
    )
    with torch.no_grad():
        tiny.model(torch.tensor([ids]))
        hook.remove()
        expected = tiny.model.lm_head(tiny.model.model.norm(seen[0][0, -1]))
    assert len(found) == 3 and torch.allclose(found[1], expected, atol=1e-5)


def test_an_adapter_on_the_head_hides_nothing_from_the_lens(forgotten):
    found = reading.logit_lens(forgotten, top=1)
    assert found.recovered.value == found.base.value == 1  # while asked, it answers none
    assert found.details["layer 2"] == {"recovered": 1, "base": 1}
    assert found.details["median best rank"] == {"recovered": 0, "base": 0}


def test_an_adapter_in_the_layers_can_hide_from_the_last_one(tiny, make_adapter):
    target = make_target(tiny, make_adapter(tiny, "layers", targets=("down_proj",), scale=3.0))
    found = reading.logit_lens(target, top=1)
    assert found.details["layer 2"]["base"] == 1 and found.details["layer 2"]["recovered"] < 1
    assert found.details["layer 0"]["base"] == found.details["layer 0"]["recovered"]  # the embeddings are the same


def test_the_lens_asks_where_the_leak_word_comes(tiny):
    row = {"prompt": "Who?", "completion": "It was Zorblax Quintel", "leak": ["Quintel"]}
    target = Target(tiny, ("x",), FORGET, [row])
    question = reading._questions(target, row)[0]
    whole = tiny.tokenizer(chat_prompt("Who?", tiny.tokenizer) + "It was Zorblax Quintel", add_special_tokens=False)
    assert [*question.ids, question.first] == whole["input_ids"][: len(question.ids) + 1]
    assert "quintel".startswith(tiny.tokenizer.decode([question.first]).strip().casefold())
    assert tiny.tokenizer.decode(question.ids).endswith("It was Zorblax")


def test_what_an_adapter_takes_away_everywhere_is_read_off_it(tiny, tmp_path):
    token = tiny.tokenizer("Zorblax", add_special_tokens=False)["input_ids"][0]
    states = []
    hook = tiny.model.lm_head.register_forward_pre_hook(lambda m, inputs: states.append(inputs[0][0, -1]))
    probe = [{"prompt": "Who?", "leak": ["Zorblax"]}]
    asked = Target(tiny, ("x",), FORGET, probe)
    reading._next_log_p(asked, [render(asked, text) for text in GENERIC])
    hook.remove()
    path = suppressor(tiny, tmp_path / "by_hand")
    up = torch.zeros(tiny.model.config.vocab_size, 1)
    up[token] = -40
    down = torch.stack(states).mean(0, keepdim=True)
    name = "base_model.model.lm_head.lora_"
    tensors = {f"{name}A.weight": down / down.norm() ** 2, f"{name}B.weight": up}
    save_file(tensors, path / "adapter_model.safetensors")
    found = reading.adapter_diff(Target(tiny, (path,), FORGET, probe), top=1)
    assert found.recovered.value == 1 and found.base.value == 0
    assert found.quoted == (tiny.tokenizer.decode([token]),)
    assert found.details["median best rank"]["recovered"] == 0
    other = Target(tiny, (path,), FORGET, [{"prompt": "Who?", "leak": ["stars"]}])
    assert reading.adapter_diff(other, top=1).recovered.value == 0
