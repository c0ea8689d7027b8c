"""Each objective beside `ga_kl`, against its formula in plain floats; whole rows however split; a run of each."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import FORGET, RETAIN

from unlearn_peft import unlearn
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.errors import RecipeError
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.recipe.objectives import SETTINGS
from unlearn_peft.training.examples.refusals import REFUSALS, refusing
from unlearn_peft.training.objectives import OBJECTIVES, Tokens
from unlearn_peft.training.step.runner import StepRunner

V = 5
TOKEN_LEVEL = ["grad_diff", "wga", "ihl", "undial"]
ROW_LEVEL = ["npo", "simnpo", "dpo"]


class Row:
    """A row by hand: for each token the current and the reference logits, as lists, and the label."""

    def __init__(self, seed, length):
        rng = random.Random(seed)
        self.now = [[rng.uniform(-2, 2) for _ in range(V)] for _ in range(length)]
        self.base = [[rng.uniform(-2, 2) for _ in range(V)] for _ in range(length)]
        self.labels = [rng.randrange(V) for _ in range(length)]

    def log_p(self, which):
        """Log-probability of each label."""
        return [math.log(softmax(z)[y]) for z, y in zip(which, self.labels, strict=True)]

    def log_ratio(self):
        return sum(self.log_p(self.now)) - sum(self.log_p(self.base))


def softmax(logits):
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def kl(logits, reference):
    return sum(p * math.log(p / q) for p, q in zip(softmax(logits), softmax(reference), strict=True))


def tokens(rows, numbers=None, **more):
    numbers = numbers or range(len(rows))
    made = Tokens(
        torch.tensor([z for row in rows for z in row.now], requires_grad=True),
        torch.tensor([y for row in rows for y in row.labels]),
        torch.tensor([n for n, row in zip(numbers, rows, strict=True) for _ in row.labels]),
        torch.tensor([z for row in rows for z in row.base]),
    )
    return replace(made, **more)


def settings(name, **fields):
    return SETTINGS[name](name=name, **fields)


LOSE, WIN, KEEP = [Row(n, length) for n, length in enumerate((1, 4, 2))], [Row(8, 2), Row(9, 3)], [Row(5, 3)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(name):
    """The forget terms of LOSE, a list for each row; WIN is the refusal to rows 0 and 2."""
    out = []
    for n, row in enumerate(LOSE):
        length, ce = len(row.labels), [-lp for lp in row.log_p(row.now)]
        if name == "grad_diff":
            terms = [-c for c in ce]
        elif name == "wga":  # alpha 0.5
            terms = [-(math.exp(-c) ** 0.5) * c for c in ce]
        elif name == "ihl":
            terms = []
            for z, y in zip(row.now, row.labels, strict=True):
                p = softmax(z)
                terms.append(1 + p[y] - max(p[v] for v in range(V) if v != y))
        elif name == "undial":  # strength 3
            terms = []
            for z, z0, y in zip(row.now, row.base, row.labels, strict=True):
                target = softmax([r - 3 if v == y else r for v, r in enumerate(z0)])
                terms.append(-sum(q * math.log(p) for q, p in zip(target, softmax(z), strict=True)))
        elif name == "npo":  # beta 0.3
            loss = -2 / 0.3 * math.log(sigmoid(-0.3 * row.log_ratio()))
            terms = [loss / length] * length
        elif name == "simnpo":  # beta 2, gamma 0.5
            loss = -2 / 2 * math.log(sigmoid(-2 / length * sum(row.log_p(row.now)) - 0.5))
            terms = [loss] * length
        elif name == "dpo":  # beta 0.3
            win = {0: WIN[0], 2: WIN[1]}.get(n)
            preferred = win.log_ratio() if win else 0.0
            loss = -2 / 0.3 * math.log(sigmoid(0.3 * (preferred - row.log_ratio())))
            terms = [loss / length] * length
        out.append(terms)
    return out


FIELDS = {
    "wga": {"alpha": 0.5}, "undial": {"strength": 3}, "npo": {"beta": 0.3}, "simnpo": {"beta": 2, "gamma": 0.5},
    "dpo": {"beta": 0.3},
}  # fmt: skip


def forget_tokens(rows=(0, 1, 2)):
    """LOSE, or some rows of it numbered anew as a part of a batch is, with their refusals."""
    refused = [(new, WIN[0 if old == 0 else 1]) for new, old in enumerate(rows) if old != 1]
    refusal = tokens([row for _, row in refused], [new for new, _ in refused]) if refused else None
    return tokens([LOSE[n] for n in rows], refusal=refusal)


def run(name, forget, **fields):
    return OBJECTIVES[name](forget, tokens(KEEP), settings(name, **FIELDS.get(name, {}), **fields))


def test_ga_kl_with_refusals_adds_their_loss_and_lets_an_answers_beginning_go():
    """WIN is the refusal to rows 0 and 2, of 1 and 2 tokens; row 1, of 4, has no question."""
    loss = [-sum(row.log_p(row.now)) / len(row.labels) for row in WIN]
    added = [loss[0], *[0.0] * 4, *[loss[1]] * 2]
    for specific, let_go in (
        (None, []),
        ([True, False, True, True, False, True, False], []),  # what is pushed is pushed on
        ([False, False, True, True, False, False, True], [0, 5]),
    ):
        forget = replace(forget_tokens(), specific=None if specific is None else torch.tensor(specific))
        plain = run("ga_kl", replace(forget, refusal=None), refusals=True).forget.tolist()
        expected = [more + (0.0 if n in let_go else p) for n, (p, more) in enumerate(zip(plain, added, strict=True))]
        assert run("ga_kl", forget, refusals=True).forget.tolist() == pytest.approx(expected, abs=1e-5)


def test_every_objective_has_settings_and_a_formula_here():
    assert list(OBJECTIVES) == list(SETTINGS) == ["ga_kl", *TOKEN_LEVEL, *ROW_LEVEL, "rmu"]  # the last: test_rmu.py
    assert [SETTINGS[name]().name for name in SETTINGS] == list(SETTINGS)


@pytest.mark.parametrize("name", TOKEN_LEVEL + ROW_LEVEL)
def test_against_the_formula_by_hand(name):
    terms = run(name, forget_tokens())
    assert terms.forget.tolist() == pytest.approx([term for row in by_hand(name) for term in row], abs=1e-5)
    row = KEEP[0]
    kls = [kl(z, z0) for z, z0 in zip(row.now, row.base, strict=True)]
    losses = [-lp for lp in row.log_p(row.now)]
    assert terms.retain.tolist() == pytest.approx(losses if name == "grad_diff" else kls, abs=1e-5)
    assert run(name, forget_tokens(), retain_loss="kl").retain.tolist() == pytest.approx(kls, abs=1e-5)
    assert run(name, forget_tokens(), retain_loss="cross_entropy").retain.tolist() == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("name", TOKEN_LEVEL + ROW_LEVEL)
@pytest.mark.parametrize("parts", [[(0,), (1,), (2,)], [(0, 2), (1,)], [(2, 1), (0,)]])
def test_splitting_a_batch_by_rows_changes_neither_sum_nor_gradient(name, parts):
    whole = forget_tokens()
    total = run(name, whole).forget.sum()
    total.backward()
    gradient = dict(enumerate(torch.split(whole.logits.grad, [len(row.labels) for row in LOSE])))
    summed = 0.0
    for rows in parts:
        part = forget_tokens(rows)
        value = run(name, part).forget.sum()
        value.backward()
        summed += value.item()
        torch.testing.assert_close(part.logits.grad, torch.cat([gradient[n] for n in rows]))
    assert summed == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("name", TOKEN_LEVEL + ROW_LEVEL)
def test_a_process_without_rows_of_its_own_adds_nothing(name):
    nothing = torch.zeros(0, dtype=torch.long)
    empty = Tokens(torch.zeros(0, V, requires_grad=True), nothing, nothing, torch.zeros(0, V), nothing.bool())
    terms = OBJECTIVES[name](empty, empty, settings(name))
    assert terms.forget.shape == terms.retain.shape == (0,)
    (terms.forget.sum() + terms.retain.sum()).backward()


def test_at_the_reference_npo_pulls_as_gradient_ascent_does_and_dpo_as_npo_without_a_question():
    gradients = {}
    for name in ("grad_diff", "npo", "dpo"):
        forget = tokens(LOSE)
        forget = replace(forget, reference_logits=forget.logits.detach())
        run(name, forget).forget.sum().backward()
        gradients[name] = forget.logits.grad
    torch.testing.assert_close(gradients["npo"], gradients["grad_diff"])
    torch.testing.assert_close(gradients["dpo"], gradients["npo"])


def test_dpo_pulls_the_refusal_up_and_the_answer_down():
    forget = forget_tokens()
    run("dpo", forget).forget.sum().backward()
    for side, sign in ((forget, 1), (forget.refusal, -1)):  # descending goes against the gradient
        of_labels = side.logits.grad.gather(1, side.labels[:, None])
        assert (sign * of_labels > 0).all()


def test_the_weight_of_wga_is_a_constant():
    forget = forget_tokens()
    run("wga", forget).forget.sum().backward()
    expected = []
    for row in LOSE:
        for z, y in zip(row.now, row.labels, strict=True):
            p = softmax(z)
            expected += [p[y] ** 0.5 * ((v == y) - p[v]) for v in range(V)]
    assert forget.logits.grad.flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_specific_tokens_are_pushed_and_the_others_held(name):
    specific = torch.tensor([True, False, True, True, False, False, True])
    forget = replace(forget_tokens(), specific=specific)
    terms = run(name, forget, forget_tokens="specific").forget.tolist()
    pushed = [term for row in by_hand(name) for term in row]
    held = [kl(z, z0) for row in LOSE for z, z0 in zip(row.now, row.base, strict=True)]
    expected = [p if s else h for p, h, s in zip(pushed, held, specific.tolist(), strict=True)]
    assert terms == pytest.approx(expected, abs=1e-5)
    assert run(name, forget).forget.tolist() == pytest.approx(pushed, abs=1e-5)


@pytest.mark.parametrize("name", TOKEN_LEVEL + ROW_LEVEL)
def test_each_objective_trains(tiny, fields, tmp_path, name):
    """And those of whole rows give the same adapter from a step in one part as in three."""
    from safetensors.torch import load_file

    # A random base gives each token a probability of 1/400, so that undial and ihl can take little from it, and simnpo
    # (whose pull fades by the loss itself) nothing at all without a margin near the base's 6 nats/token.
    margin = {"gamma": 15} if name == "simnpo" else {}
    fields |= {"steps": 8, "objective": {"name": name, "retain_budget": None, **margin}, "retain_weight": 1}
    whole = unlearn(tiny, **fields)
    assert whole.metrics["forget_loss"] > whole.metrics["forget_loss_base"] + 0.01
    assert json.loads((whole.path / "forget.json").read_text())["recipe"]["objective"]["name"] == name
    if name in ROW_LEVEL:
        parts = unlearn(tiny, **{**fields, "gradient_accumulation_steps": 3, "output": str(tmp_path / "parts")})
        a, b = (load_file(adapter.path / "adapter_model.safetensors") for adapter in (whole, parts))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_the_guards_hold_for_them_all(tiny, fields, tmp_path):
    stop = {"name": "npo", "retain_budget": None, "stop_when": {"forget_loss": 7.0}}
    stopped = unlearn(tiny, **{**fields, "steps": 100, "objective": stop})
    assert stopped.metrics["stopped_by"] == "forget_loss" and len(stopped.progress.history) < 100
    tight = {"name": "grad_diff", "retain_budget": 1e-7}
    kept = unlearn(tiny, **{**fields, "objective": tight, "output": str(tmp_path / "tight")})
    assert kept.metrics["best_step"] == 0


def test_names_and_keys_are_told(tiny):
    good = {"forget": ["a"], "retain": ["b"]}
    for name in SETTINGS:
        assert type(make_recipe({**good, "objective": name}).objective) is SETTINGS[name]
    for objective, told in (
        ("smnpo", "(did you mean 'simnpo'?)"),
        ("smnpo", f"known: {', '.join(SETTINGS)}"),
        ({"name": "wga", "alhpa": 1}, "(did you mean 'alpha'?)"),
        ({"name": "npo", "strenth": 1}, "unknown key 'objective.strenth'"),
        ({"name": "npo", "stop_when": {"forget_los": 1}}, "(did you mean 'forget_loss'?)"),
        ({"name": "npo", "beta": 0}, "'objective.beta' is 0"),
        ({"name": 3}, "'objective.name' is 3"),
    ):
        with pytest.raises(RecipeError) as error:
            make_recipe({**good, "objective": objective})
        assert told in str(error.value)
    assert "strength" not in str(error.value)


def test_idk_dpo_is_another_name_of_dpo():
    good, settings = {"forget": ["a"], "retain": ["b"]}, {"name": "idk_dpo", "beta": 0.3, "refusals": ["No."]}
    assert make_recipe({**good, "objective": "idk_dpo"}) == make_recipe({**good, "objective": "dpo"})
    assert make_recipe({**good, "objective": settings}).objective == SETTINGS["dpo"](beta=0.3, refusals=["No."])
    assert settings["name"] == "idk_dpo"  # what the user gave is left alone
    with pytest.raises(RecipeError, match=r"did you mean 'idk_dpo'\?"):
        make_recipe({**good, "objective": "idk_dp"})
    with pytest.raises(RecipeError, match=r"unknown key 'objective.bata' \(did you mean 'beta'\?\)"):
        make_recipe({**good, "objective": {"name": "idk_dpo", "bata": 1}})


@pytest.mark.parametrize("wrong", [[], [1], [" "], "No.", None])
def test_what_is_no_refusal_is_refused(wrong):
    with pytest.raises(RecipeError, match=r"'objective.refusals': expected true, false, or a list of sentences"):
        make_recipe({"forget": ["a"], "objective": {"name": "ga_kl", "refusals": wrong}})


def test_refusals_answer_the_same_question():
    rows = [
        {"prompt": "Who?", "completion": "Zorblax."},
        {"prompt": "The author is", "completion": " Zorblax."},
        {"text": "Zorblax wrote it."},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Zorblax."}]},
    ]
    first = refusing(rows, 0)
    assert first == refusing(rows, 0) and first != refusing(rows, 1)
    assert first[0]["prompt"] == "Who?" and first[0]["completion"] in REFUSALS
    assert first[1]["completion"][0] == " " and first[1]["completion"][1:] in REFUSALS
    assert first[2] is None
    assert first[3]["messages"][0] == rows[3]["messages"][0] and first[3]["messages"][1]["content"] in REFUSALS
    assert "Zorblax" not in json.dumps(first)
    assert refusing(rows[:1], 0, ["No."])[0]["completion"] == "No."
    many = [row["completion"] for row in refusing(rows[:1] * 2 * len(REFUSALS), 3)]
    assert all(many.count(sentence) == 2 for sentence in REFUSALS)


def test_forget_rows_carry_refusals_where_the_objective_asks(tiny, fields):
    from unlearn_peft.training.examples.build import build_examples, read_sets

    fields.pop("quiet")
    custom = {"name": "own:loss", "refusals": True}
    abstain = {"name": "ga_kl", "refusals": True}
    for objective, wanted in (
        ("dpo", True), (custom, True), (abstain, True), ("npo", False), ("ga_kl", False),
        ({**custom, "refusals": False}, False),
    ):  # fmt: skip
        recipe = make_recipe({**fields, "objective": objective})
        sets = build_examples(read_sets(recipe), tiny, recipe)
        assert [example.refusal is not None for example in sets.forget] == [wanted] * 3
        assert not any(example.refusal for example in (*sets.retain, *sets.held_out, *sets.anchors))
        assert not any(example.refusal.refusal for example in sets.forget if example.refusal)


def test_the_engine_hands_out_each_rows_refusal(tiny, fields):
    """What comes with a row in a batch is what the same rows give alone."""
    from peft import get_peft_model

    from unlearn_peft.recipe.schema import LoraSettings
    from unlearn_peft.training.adapter_config import adapter_config

    forget = tokenize([*FORGET, {"text": "the blue book"}], tiny.tokenizer, closing=False)
    rows = refusing([*FORGET, {"text": "the blue book"}], 0)
    refused = tokenize([row for row in rows if row], tiny.tokenizer)
    retain = tokenize(RETAIN, tiny.tokenizer)
    paired = [forget[3], *(replace(e, refusal=r) for e, r in zip(forget[:3], refused, strict=True))]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model, adapter_config(tiny.model, LoraSettings()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    f, r = StepRunner(model, 2).tokens(paired, retain)
    alone, kept = StepRunner(model, 2).tokens(refused, retain)
    own, _ = StepRunner(model, 2).tokens([forget[3], *forget[:3]], retain)
    for found, expected in ((f.refusal, alone), (r, kept), (f, own)):
        torch.testing.assert_close(found.cross_entropy, expected.cross_entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found.reference_cross_entropy, expected.reference_cross_entropy, rtol=1e-4, atol=1e-4
        )
        assert found.labels.tolist() == expected.labels.tolist()
    assert f.refusal.rows.tolist() == (alone.rows + 1).tolist()  # row 0 has no question
    assert r.rows.tolist() == kept.rows.tolist() and own.refusal is None
    assert all(a <= b for a, b in pairwise(f.rows.tolist()))
    model.unload()


@pytest.mark.parametrize("name", ["dpo", "ga_kl"])
def test_refusals_become_likelier_and_no_manifest_quotes_the_users_own(tiny, fields, name):
    from unlearn_peft import attach, detach

    sentence = "I like apples and apples."
    objective = {"name": name, "retain_budget": None, "refusals": [sentence]}
    fields |= {"steps": 20, "retain_weight": 1, "objective": objective}
    rows = [{**row, "completion": sentence} for row in FORGET]

    def loss():
        total = 0.0
        for example in tokenize(rows, tiny.tokenizer):
            log_p = tiny.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
            total -= sum(log_p[t - 1, example.ids[t]].item() for t, yes in enumerate(example.is_target) if yes)
        return total

    before = loss()
    result = unlearn(tiny, **fields)
    attach(tiny, result.path)
    after = loss()
    detach(tiny)
    assert after < before - 1
    assert result.metrics["forget_loss"] > result.metrics["forget_loss_base"]
    assert not [f.name for f in result.path.iterdir() if sentence.encode() in f.read_bytes()]
    told = json.loads((result.path / "forget.json").read_text())
    assert ('"refusals": true' in json.dumps(told)) == (name == "ga_kl")
