"""`rmu` against its formula in plain floats; hidden states and their reference from the runner; runs of it."""

import math
import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from conftest import FORGET, RETAIN, make_tiny
from safetensors.torch import load_file

from unlearn_peft import attach, detach, load_base, unlearn
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.errors import Interrupted, RecipeError
from unlearn_peft.models.layers import decoder_layers
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.recipe.objectives import RmuSettings
from unlearn_peft.recipe.schema import LoraSettings
from unlearn_peft.training.adapter_config import adapter_config
from unlearn_peft.training.examples.refusals import refusing
from unlearn_peft.training.objectives import Tokens, hidden_distance, kl_divergence, rmu
from unlearn_peft.training.step.layers import training_mode, watched_layer
from unlearn_peft.training.step.runner import StepRunner

N, D, V = 4, 3, 5
SPECIFIC = [True, False, False, True]


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """Four layers: LoRA sits on 2 and 3 by default, and 0 and 1 are trunk."""
    return make_tiny(tmp_path_factory.mktemp("deep"), layers=4)


@pytest.fixture
def deep(deep_folder):
    return load_base(str(deep_folder))


@pytest.fixture
def rmu_fields(fields):
    objective = {"name": "rmu", "steering_coefficient": 9, "hidden_layer": 2, "retain_budget": None}
    return {**fields, "objective": objective, "retain_weight": 1}


def rows_of_floats(seed, width):
    rng = random.Random(seed)
    return [[rng.uniform(-2, 2) for _ in range(width)] for _ in range(N)]


def tokens(seed):
    """Return made-up tokens, and their hidden states, reference's hidden states and KLs in plain floats."""
    now, base, logits, reference = (rows_of_floats(seed + n, w) for n, w in enumerate((D, D, V, V)))
    labels = torch.tensor([0, 4, 2, 2])
    made = Tokens(
        torch.tensor(logits), labels, torch.tensor([0, 0, 1, 1]), torch.tensor(reference),
        hidden=torch.tensor(now, requires_grad=True), reference_hidden=torch.tensor(base),
    )  # fmt: skip
    return made, now, base, [kl(z, z0) for z, z0 in zip(logits, reference, strict=True)]


def kl(logits, reference):
    p, q = ([math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (logits, reference))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean_square(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / D


def direction(seed):
    drawn = torch.rand(D, generator=torch.Generator().manual_seed(seed)).tolist()
    return [x / math.sqrt(sum(y * y for y in drawn)) for x in drawn]


@pytest.mark.parametrize("retain_loss", ["hidden", "kl", "cross_entropy"])
@pytest.mark.parametrize("forget_tokens", ["all", "specific"])
def test_against_the_formula_by_hand(retain_loss, forget_tokens):
    forget, now, base, forget_kl = tokens(1)
    retain, retain_now, retain_base, retain_kl = tokens(11)
    settings = RmuSettings(steering_coefficient=6.5, seed=3, retain_loss=retain_loss, forget_tokens=forget_tokens)
    terms = rmu(replace(forget, specific=torch.tensor(SPECIFIC)), retain, settings)
    steered = [mean_square(h, [6.5 * x for x in direction(3)]) for h in now]
    held = list(map(mean_square, now, base)) if retain_loss == "hidden" else forget_kl
    if forget_tokens == "specific":
        steered = [s if yes else h for s, h, yes in zip(steered, held, SPECIFIC, strict=True)]
    expected = {
        "hidden": list(map(mean_square, retain_now, retain_base)),
        "kl": retain_kl,
        "cross_entropy": retain.cross_entropy.tolist(),
    }[retain_loss]
    assert terms.forget.tolist() == pytest.approx(steered, abs=1e-5)
    assert terms.retain.tolist() == pytest.approx(expected, abs=1e-5)
    if forget_tokens == "all":
        terms.forget.sum().backward()
        gradient = [2 / D * (x - 6.5 * u) for h in now for x, u in zip(h, direction(3), strict=True)]
        assert forget.hidden.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-5)


def test_the_direction_is_of_the_seed_alone_and_has_length_one():
    forget, *_ = tokens(1)
    origin = replace(forget, hidden=torch.zeros(N, D))

    def terms(seed, of=origin):
        return rmu(of, forget, RmuSettings(steering_coefficient=2, seed=seed)).forget

    assert terms(0).tolist() == pytest.approx([4 / D] * N)  # from 0 it is c^2 / d away, whatever its direction
    random_state = torch.get_rng_state()
    assert torch.equal(terms(0, forget), terms(0, forget)) and not torch.allclose(terms(0, forget), terms(1, forget))
    assert torch.equal(torch.get_rng_state(), random_state)  # dropout's numbers stay what they are
    in_bfloat16 = replace(forget, hidden=forget.hidden.detach().bfloat16())
    assert terms(0, in_bfloat16).dtype == torch.float32


def test_without_hidden_states_it_says_so_and_with_no_tokens_it_adds_nothing():
    forget, *_ = tokens(1)
    with pytest.raises(ValueError, match="hidden_layer"):
        rmu(replace(forget, hidden=None), forget, RmuSettings())
    nothing = torch.zeros(0, dtype=torch.long)
    states = torch.zeros(0, D, requires_grad=True)
    empty = Tokens(torch.zeros(0, V), nothing, nothing, torch.zeros(0, V), nothing.bool(), None, states, states)
    terms = rmu(empty, empty, RmuSettings())
    assert terms.forget.shape == terms.retain.shape == (0,)
    (terms.forget.sum() + terms.retain.sum()).backward()


def peft_model(base, **settings):
    """Return the base with a LoRA whose weights are random, not zero."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base.model, adapter_config(base.model, LoraSettings(**settings)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def states_by_hand(model, examples, layer):
    """What a layer gives at the position before each target, each row by itself, as transformers hands it out."""
    out = []
    for example in examples:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([example.ids]), output_hidden_states=True).hidden_states[layer + 1][0]
        out += [states[t - 1] for t, yes in enumerate(example.is_target) if yes]
    return torch.stack(out)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("settings", [{"layers": "all"}, {"layers_to_transform": [1, 2]}], ids=["all", "over a trunk"])
@pytest.mark.parametrize("packs", [True, False])
def test_hidden_states_are_those_that_predict_the_targets(deep, layer, settings, packs):
    model = peft_model(deep, **settings)
    bare, retain = tokenize(FORGET, deep.tokenizer, closing=False), tokenize(RETAIN, deep.tokenizer)
    refused = tokenize(refusing(FORGET, 0), deep.tokenizer)
    forget = [replace(example, refusal=refusal) for example, refusal in zip(bare, refused, strict=True)]
    runner = StepRunner(model, 2, hidden_layer=layer)
    assert (runner.frozen_layers is None) == (settings == {"layers": "all"})
    runner._builder._packs = None if packs else False
    for _ in range(2):  # the second time from what was kept
        f, r = runner.tokens(forget, retain)
        assert runner._builder._packs is packs and (runner.frozen_layers is None) == (settings == {"layers": "all"})
        for found, examples in ((f, bare), (r, retain), (f.refusal, refused)):
            torch.testing.assert_close(found.hidden, states_by_hand(model, examples, layer), rtol=1e-4, atol=1e-4)
            with model.disable_adapter():
                expected = states_by_hand(model, examples, layer)
            torch.testing.assert_close(found.reference_hidden, expected, rtol=1e-4, atol=1e-4)
            assert hidden_distance(found).min() > 1e-4 and not found.reference_hidden.requires_grad
    model.unload()


def test_they_are_there_only_if_asked_for_and_no_hook_stays(deep):
    model = peft_model(deep)
    forget, retain = tokenize(FORGET, deep.tokenizer), tokenize(RETAIN, deep.tokenizer)
    f, r = StepRunner(model, 2).tokens(forget, retain)
    assert f.hidden is f.reference_hidden is r.hidden is r.reference_hidden is None
    asked = StepRunner(model, 2, hidden_layer=3).tokens(forget, retain)[0]
    torch.testing.assert_close(asked.logits, f.logits, rtol=0, atol=0)
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    model.unload()


def test_the_reference_is_kept_also_where_the_head_is_not_last(deep):
    model = peft_model(deep)
    plain = deep.model.forward
    deep.model.forward = lambda *a, **k: type(o := plain(*a, **k))(logits=o.logits * 0.5)
    try:
        runner, retain = StepRunner(model, 2, hidden_layer=2), tokenize(RETAIN, deep.tokenizer)
        first, half = (runner.tokens([], rows)[1] for rows in (retain[:4], retain))
        assert torch.equal(first.reference_hidden, half.reference_hidden[: len(first.labels)])
        assert kl_divergence(half).min() > 1e-4
    finally:
        deep.model.forward = plain
    with model.disable_adapter():
        expected = states_by_hand(model, retain, 2)
    torch.testing.assert_close(half.reference_hidden, expected, rtol=1e-4, atol=1e-4)
    model.unload()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_the_adapter_up_to_the_layer_and_no_further(deep, checkpointing):
    """The same, packed over the trunk or padded without it, with checkpointing or without."""
    model = peft_model(deep, layers_to_transform=[1, 2, 3])
    forget, retain = tokenize(FORGET, deep.tokenizer, closing=False), tokenize(RETAIN, deep.tokenizer)
    plain, runner = StepRunner(model, 2, hidden_layer=2), StepRunner(model, 2, hidden_layer=2)
    plain.frozen_layers, plain._builder._packs = None, False
    gradients = []
    for each, saves_memory in ((plain, False), (runner, checkpointing)):
        training_mode(model, saves_memory)
        terms = rmu(*each.tokens(forget, retain), RmuSettings(steering_coefficient=5))
        (terms.forget.mean() + terms.retain.mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad(set_to_none=True)
    assert runner._builder._packs and runner.frozen_layers is not None
    for name, gradient in gradients[0].items():
        if "layers.3." in name:
            assert gradient is None and gradients[1][name] is None
        else:
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)
    model.unload()


def test_the_layer_is_by_default_the_middle_one_of_those_adapted(deep):
    for settings, expected in (
        ({}, 3), ({"layers": "all"}, 2), ({"layers_to_transform": [0, 1, 2]}, 1), ({"layers_to_transform": [1]}, 1),
    ):  # fmt: skip
        model = peft_model(deep, **settings)
        layers = decoder_layers(model)
        assert layers == decoder_layers(deep.model)
        assert len(layers) == 4 and watched_layer(model, None) is layers[expected], settings
        model.unload()


@pytest.mark.parametrize(
    ("adapter", "layer", "told"),
    [
        ("lora", 1, "hidden_layer is 1, expected 2 to 3 or null.*nothing below 2.*adapter.layers: all"),
        ("lora", 4, "hidden_layer is 4, expected 2 to 3 or null: the base has layers 0 to 3"),
        ("lora", -1, "'objective.hidden_layer' is -1"),
        ("lora", "top", "'objective.hidden_layer' is 'top'"),
        ("head", None, "'rmu' works on the output of a decoder layer.*head adapter never.*use adapter: lora"),
        ({"kind": "head", "form": "dense"}, 3, "head adapter never"),
        ({"target_modules": ["lm_head"]}, None, "changes none of 0 to 3: use a lora adapter"),
    ],
)
def test_a_layer_that_cannot_be_is_told_and_the_base_is_left_clean(deep, rmu_fields, adapter, layer, told):
    objective = {**rmu_fields["objective"], "hidden_layer": layer}
    with pytest.raises(RecipeError, match=told):
        unlearn(deep, **{**rmu_fields, "adapter": adapter, "objective": objective})
    assert not [m for m in deep.model.modules() if "lora" in type(m).__module__]


def test_a_users_own_objective_gets_hidden_states_and_wrong_layers_are_told(deep, rmu_fields, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from unlearn_peft.training.objectives import Terms, hidden_distance\n"
        "def loss(forget, retain, settings):\n"
        "    return Terms(-hidden_distance(forget).clamp(max=1), hidden_distance(retain))\n"
    )
    objective = {"name": f"{tmp_path}/mine.py:loss", "hidden_layer": None}
    assert unlearn(deep, **{**rmu_fields, "objective": objective}).metrics["best_step"] == rmu_fields["steps"]
    for layer in ("top", True, 1.5):
        with pytest.raises(RecipeError, match=f"hidden_layer is {layer!r}, expected 2 to 3"):
            unlearn(deep, **{**rmu_fields, "objective": {**objective, "hidden_layer": layer}})
    with pytest.raises(RecipeError, match="head adapter never"):
        make_recipe({"forget": ["a"], "retain": ["b"], "adapter": "head", "objective": objective})


def figures(base, path, rows):
    """Mean squared distance at layer 2 to 9 u without and with the adapter at `path`, and between the two."""
    examples = tokenize(rows, base.tokenizer, closing=False)
    reference = states_by_hand(base.model, examples, 2)
    attach(base, path)
    states = states_by_hand(base.model, examples, 2)
    detach(base)
    u = torch.nn.functional.normalize(torch.rand(32, generator=torch.Generator().manual_seed(0)), dim=0)
    return [(a - b).square().mean().item() for a, b in ((reference, 9 * u), (states, 9 * u), (states, reference))]


@pytest.mark.parametrize(("retain_loss", "forget_tokens"), [("hidden", "all"), ("kl", "specific")])
def test_it_trains(deep, rmu_fields, retain_loss, forget_tokens):
    """The forget rows' states go to the vector, the retain rows' stay, and the adapter above the layer stays zero."""
    kinds = {"retain_loss": retain_loss, "forget_tokens": forget_tokens}
    result = unlearn(deep, **{**rmu_fields, "steps": 30, "objective": {**rmu_fields["objective"], **kinds}})
    before, after, moved = figures(deep, result.path, FORGET)
    _, _, retain_moved = figures(deep, result.path, RETAIN)
    assert after < 0.8 * before
    assert retain_loss == "kl" or retain_moved < 0.5 * moved
    weights = load_file(result.path / "adapter_model.safetensors")
    of_layer = {n: max(t.abs().max() for k, t in weights.items() if f".{n}." in k and "lora_B" in k) for n in (2, 3)}
    assert of_layer[2] > 1e-3
    assert (of_layer[3] == 0) == (retain_loss == "hidden")  # KL is of the logits, behind all layers


@pytest.mark.long
def test_parts_and_checkpointing_give_the_same_adapter_and_bfloat16_runs(deep, deep_folder, rmu_fields, tmp_path):
    whole = load_file(unlearn(deep, **rmu_fields).path / "adapter_model.safetensors")
    for more in ({"gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}):
        other = unlearn(deep, **{**rmu_fields, **more, "output": str(tmp_path / "other")})
        for name, tensor in load_file(other.path / "adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)
    base = load_base(str(deep_folder), dtype="bfloat16")
    steered = unlearn(base, **{**rmu_fields, "steps": 20, "output": str(tmp_path / "bfloat16")})
    before, after, _ = figures(deep, steered.path, FORGET)
    assert after < 0.9 * before


def test_a_resumed_run_gives_the_same_bits(deep, rmu_fields, tmp_path, monkeypatch):
    from unlearn_peft.training.trainer import Training

    fields = {**rmu_fields, "forget_batch": 2, "gradient_accumulation_steps": 2}
    fields["objective"] = {**fields["objective"], "forget_tokens": "specific"}
    whole = unlearn(deep, **fields)
    again = {**fields, "output": str(tmp_path / "again")}
    original = Training.one_step

    def interrupt_at_three(self):
        if self.trainers[0].step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="--resume"):
        patch.setattr(Training, "one_step", interrupt_at_three)
        unlearn(deep, **again)
    resumed = unlearn(deep, **again, resume=True)
    a, b = (load_file(result.path / "adapter_model.safetensors") for result in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.metrics["forget_loss"] == whole.metrics["forget_loss"]
