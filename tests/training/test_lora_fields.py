"""Every field of PEFT's `LoraConfig`, by name: refused before training, or trained, read, attached and detached."""

import dataclasses
import warnings

import pytest
import torch
from conftest import logits
from models.families import tiny_base
from peft import LoraConfig
from states import changes, state_of

from unlearn_peft import attach, detach, load_base, read_bundle, unlearn
from unlearn_peft.errors import AdapterError, RecipeError, UnlearnError
from unlearn_peft.models.restore import left_as_found
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.preflight import check_trainable

QUERIES = ["q_proj"]
WORKS = [  # with these an adapter is trained, and comes back
    {"r": 3, "target_modules": "all-linear", "exclude_modules": ["k_proj"], "lora_dropout": 0.5, "use_rslora": True},
    {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 0.5, "init_lora_weights": "gaussian", "lora_dropout": 0,
     "fan_in_fan_out": True, "layers_to_transform": []},
    {"target_modules": "q_proj", "init_lora_weights": "orthogonal", "bias": "none", "alpha_pattern": {"q_proj": 3}},
    {"target_modules": "q_proj, v_proj", "rank_pattern": {"model.layers.0.self_attn.q_proj": 6, "v_proj": 1},
     "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "q_proj": 64}, "use_rslora": True},
    {"target_modules": r".*\.0\..*(q|v)_proj", "exclude_modules": r".*v_proj", "rank_pattern": {}},
    {"exclude_modules": "k_proj", "layers_to_transform": 1, "layers_pattern": ["layers"], "init_lora_weights": True},
    {"target_modules": ["v_proj"], "layers_to_transform": [1], "task_type": "CAUSAL_LM", "peft_type": "LORA",
     "inference_mode": False, "megatron_core": "megatron.core", "loftq_config": {}, "qalora_group_size": 16,
     "modules_to_save": [], "use_dora": False, "rank_pattern": None},
]  # fmt: skip
REFUSED = {  # values of fields that are refused, with fields that go with them
    "r": [0, -1, "eight"],
    "target_modules": [["input_layernorm"], ["embed_tokens"], ["q_porj"], [], "", "(", "rotary_emb", ["layers"]],
    "exclude_modules": [["q_porj"], (QUERIES, {"target_modules": QUERIES}), ["layers.0"], r".*"],
    "lora_alpha": [0, -1, float("inf"), "x"],
    "lora_dropout": [1.5, 1, -0.1, float("nan"), "0.1", True],
    "fan_in_fan_out": ["yes"],
    "bias": ["all", "lora_only", "some"],
    "use_rslora": ["no", 2],
    "init_lora_weights": [False, "nope", "pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga",
                          "mica", ""],
    "layers_to_transform": [[99], [0, 99], -1, ["0"], "0", True],
    "layers_pattern": ["layers", ("blocks", {"layers_to_transform": [1]})],
    "rank_pattern": [{"q_proj": 0}, {"q_porj": 2}, {".*q_proj": 2}, {"q_proj": "2"}, [1],
                     {"q_proj": 2, "model.layers.0.self_attn.q_proj": 6}],
    "alpha_pattern": [{"q_porj": 2}, {"q_proj": float("nan")}, {"q_proj": None},
                      {"q_proj": 64, "model.layers.0.self_attn.q_proj": 1}],
    "task_type": ["SEQ_CLS"],
    "peft_type": ["IA3"],
    "auto_mapping": [{"base_model_class": "A", "parent_library": "b"}],
    "peft_version": ["0.1"],
    "base_model_name_or_path": ["gpt2"],
    "revision": ["main"],
    "inference_mode": [True],
    "modules_to_save": [["lm_head"]],
    "megatron_config": [{"a": 1}],
    "megatron_core": ["os"],
    "trainable_token_indices": [[5], {"embed_tokens": [5]}],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "ipm"}],
    "lora_ga_config": [{"scale": "unit"}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 2}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "qalora_group_size": [32],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True],
    "target_parameters": [["mlp.gate_proj.weight"]],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{"beta": 0.1}],
    "ensure_weight_tying": [True],
}  # fmt: skip


def refused():
    for name, values in REFUSED.items():
        for value in values:
            value, more = value if isinstance(value, tuple) else (value, {})
            yield pytest.param({**more, name: value}, id=f"{name}={value}")


def test_each_field_of_the_installed_peft_has_a_value_here():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    settable = REFUSED.keys() | {name for values in WORKS for name in values}
    assert fields <= settable, f"PEFT has new fields, which need a value here: {fields - settable}"


@pytest.fixture(scope="module")
def base(tiny_folder):
    """A base for all: each test says that it is as before."""
    return load_base(str(tiny_folder))


def adapter(fields):
    return {"adapter": {"kind": "lora", "layers": "all", **fields}}


@pytest.mark.parametrize("values", WORKS, ids=map(str, WORKS))
def test_a_field_that_is_trained_comes_back_exactly(base, fields, values):
    before, bare = state_of(base), logits(base)
    result = unlearn(base, **{**fields, "steps": 1, "objective": {"retain_budget": None}, **adapter(values)})
    assert not changes(before, state_of(base))
    bundle = read_bundle(result)
    by_peft = logits_by_peft(base, result.path)
    attach(base, bundle)
    attached = logits(base)
    assert not torch.equal(attached, bare)
    torch.testing.assert_close(attached, by_peft, rtol=1e-4, atol=1e-4)
    detach(base)
    assert torch.equal(logits(base), bare)


def logits_by_peft(base, path):
    """Return the logits with an adapter as PEFT itself computes them."""
    from peft import PeftModel

    with left_as_found(base.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(base.model, path)
        return logits(base)


@pytest.mark.parametrize("values", refused())
def test_a_field_that_is_not_is_refused_before_any_work(base, fields, values, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the base was asked")

    monkeypatch.setattr("unlearn_peft.training.run.find_known", asked)
    before = state_of(base)
    with pytest.raises((RecipeError, AdapterError)) as error:
        unlearn(base, **{**fields, **adapter(values)})
    assert not changes(before, state_of(base))
    assert any(name.split("_")[0] in str(error.value).lower() for name in values), "names the field"


def test_a_field_of_a_later_peft_is_refused_unless_it_has_its_default(fields, monkeypatch):
    later = dataclasses.make_dataclass(
        "LaterConfig", [("shiny", "float", dataclasses.field(default=0.5))], bases=(LoraConfig,)
    )
    monkeypatch.setattr("peft.LoraConfig", later)
    values = {key: value for key, value in fields.items() if key != "quiet"}
    make_recipe({**values, **adapter({"shiny": 0.5})})
    with pytest.raises(RecipeError, match=r"'adapter.shiny' is 0.7, expected 0.5"):
        make_recipe({**values, **adapter({"shiny": 0.7, "r": 4})})


def test_whatever_a_kind_of_ones_own_asks_of_peft(base, fields, monkeypatch):
    """A kind is a function that returns any PEFT config."""
    from unlearn_peft.training.adapter_config import KINDS

    recipe = make_recipe({key: value for key, value in fields.items() if key != "quiet"})
    before = state_of(base)
    for config in (
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ):
        monkeypatch.setitem(KINDS, "lora", lambda *_, config=config: LoraConfig(target_modules=QUERIES, **config))
        with pytest.raises(UnlearnError, match="refused before it is trained"):
            check_trainable(base, recipe)
    assert not changes(before, state_of(base))


@pytest.mark.parametrize("values", [{}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": ".*q_proj"}])
def test_experts_that_are_stored_as_one_are_left_as_they_are(base, fields, values):
    """PEFT's own `all-linear` would be these, too."""
    moe = tiny_base("qwen3_moe", base.tokenizer)
    before, bare = state_of(moe), logits(moe)
    result = unlearn(moe, **{**fields, "steps": 1, "objective": {"retain_budget": None}, **adapter(values)})
    assert not changes(before, state_of(moe))
    attach(moe, result.path)
    assert not torch.equal(logits(moe), bare)
    detach(moe)
    assert torch.equal(logits(moe), bare)
