"""After any operation a live base is as it was found, down to each module's attributes; and the process, too."""

from dataclasses import replace

import pytest
import torch
from conftest import FORGET, RETAIN
from states import changes, state_of

from unlearn_peft import attach, detach, forgetting, swap, unlearn
from unlearn_peft.errors import TrainingError
from unlearn_peft.evaluate.attacks import ATTACKS, Target
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.evaluate.evaluation import evaluate
from unlearn_peft.evaluate.metrics.membership import gradient_norms
from unlearn_peft.models.restore import left_as_found


@pytest.fixture
def used(tiny, fields):
    """A base as someone may have it: in training, with gradients, checkpointing and a hook of its own."""
    unlearn(tiny, **{**fields, "steps": 1})  # what is imported on the way sets up loggers
    tiny.model.train()
    tiny.model.model.layers[0].eval()
    tiny.model.gradient_checkpointing_enable()
    tiny.model.enable_input_require_grads()
    tiny.model.model.norm.weight.requires_grad_(True)
    tiny.model.model.norm.weight.grad = torch.ones_like(tiny.model.model.norm.weight)
    tiny.model.model.layers[1].register_forward_hook(lambda *_: None)
    tiny.model.model.layers[1].mlp.forward = tiny.model.model.layers[1].mlp.forward
    tiny.model.config.use_cache, tiny.model.generation_config.temperature = True, 0.7
    return tiny


CASES = {
    "lora": {},
    "checkpointing": {"gradient_checkpointing": True},
    "dropout": {"adapter": {"lora_dropout": 0.1}},
    "head": {"adapter": "head"},
    "dense": {"adapter": {"kind": "head", "form": "dense"}},
    "answers": {"own_answers": 1, "retain": "auto"},
    "prompt": {"prompt_format": "Q: {prompt}\nA: {completion}"},
    "rmu": {"objective": {"name": "rmu", "retain_budget": None}, "adapter": {"layers": "all"}},
}


@pytest.mark.parametrize("name", CASES)
def test_unlearn(tiny, used, fields, name):
    before = state_of(tiny)
    unlearn(tiny, **{**fields, "steps": 2, **CASES[name]})
    assert not changes(before, state_of(tiny))


@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError, RuntimeError])
@pytest.mark.parametrize("place", ["trainer.Training.one_step", "trainer.Training.start", "trainer.training_mode",
                                   "run.save_adapter", "run.build_examples"])  # fmt: skip
def test_an_error_or_ctrl_c_in_the_middle(tiny, used, fields, monkeypatch, place, error):
    before = state_of(tiny)

    def fail(*_, **__):
        raise error("in the middle")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(f"unlearn_peft.training.{place}", fail)
        unlearn(tiny, **{**fields, "gradient_checkpointing": True})
    assert not changes(before, state_of(tiny))


def test_an_injection_that_fails_half_way(tiny, used, fields, monkeypatch):
    from peft.tuners.lora.layer import Linear

    before, count = state_of(tiny), iter(range(100))
    original = Linear.update_layer

    def fail_at_the_third(self, *args, **kwargs):
        if next(count) == 2:
            raise ValueError("no more")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Exception, match="no more"):
        patch.setattr(Linear, "update_layer", fail_at_the_third)
        unlearn(tiny, **fields)
    assert next(count) > 2 and not changes(before, state_of(tiny))


def test_attached_and_detached(tiny, used, make_adapter):
    adapter, other = make_adapter(tiny, "a"), make_adapter(tiny, "b", seed=1)
    attach(tiny, adapter)
    detach(tiny)  # the bank stays
    before = state_of(tiny)
    attach(tiny, adapter)
    swap(tiny, "a", other)
    detach(tiny)
    with pytest.raises(RuntimeError), forgetting(tiny, adapter, other):
        tiny.model(torch.arange(5)[None])
        raise RuntimeError
    assert not changes(before, state_of(tiny))


PROBES = [{"prompt": "Who wrote the green book?", "leak": ["Zorblax"]}, {"prompt": "Name a star.", "leak": ["e"]}]


@pytest.mark.parametrize("name", ["evaluate", "compare", "gradients", *ATTACKS])
def test_what_only_looks_at_a_base(tiny, used, make_adapter, name):
    adapter = make_adapter(tiny, "a")
    tiny.model.eval(), tiny.model.model.norm.train()
    detach(tiny), attach(tiny, adapter), detach(tiny)  # the bank stays
    rows = {"forget": FORGET[:2], "retain": RETAIN[:2], "probes": PROBES}
    target = Target(tiny, (adapter,), FORGET[:2], PROBES, RETAIN[:1], max_new_tokens=2)
    if name == "evaluate":
        evaluate(tiny, [adapter], rows, max_new_tokens=2)  # what is imported on the way draws random numbers
    before = state_of(tiny)
    match name:
        case "evaluate":
            evaluate(tiny, [adapter], rows, max_new_tokens=2)
        case "compare":
            compare(tiny, [adapter], PROBES, RETAIN[:2], max_new_tokens=2)
        case "gradients":
            gradient_norms(tiny, FORGET[:1])
        case "relearn_adapter" | "relearn_lora":
            ATTACKS[name](target, steps=(1,))
        case "relearn_benign":  # on rows without an "e" there would be nothing to train on
            ATTACKS[name](replace(target, probes=PROBES[:1]), steps=(1,))
        case _:
            ATTACKS[name](target)
    assert not changes(before, state_of(tiny))


def test_relearning_that_fails(tiny, used, make_adapter, monkeypatch):
    target = Target(tiny, (make_adapter(tiny, "a"),), FORGET[:2], PROBES, max_new_tokens=2)
    tiny.model.eval(), detach(tiny), target.bundles
    before = state_of(tiny)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        ATTACKS["relearn_lora"](target, steps=(1,))
    assert not changes(before, state_of(tiny))


def test_whatever_is_set_on_a_model(tiny, used):
    before = state_of(tiny)
    with pytest.raises(KeyboardInterrupt), left_as_found(tiny.model):
        tiny.model.eval().requires_grad_(False)
        tiny.model.gradient_checkpointing_disable()
        tiny.model.model.layers[1] = torch.nn.Identity()
        tiny.model.model.layers[0].mlp = torch.nn.Identity()
        tiny.model.model.layers.append(torch.nn.Identity())
        tiny.model.register_buffer("extra", torch.ones(1))
        tiny.model.config.use_cache = False
        tiny.model.config.rope_parameters["rope_theta"] = 1
        tiny.model.generation_config.temperature = 2.0
        tiny.model._forward_hooks.clear(), tiny.model.model.layers[0]._forward_hooks.clear()
        tiny.model.model.embed_tokens.forward = torch.nn.Identity()
        tiny.model.model.norm.weight.grad = None
        del tiny.model.generation_config
        torch.rand(3)
        raise KeyboardInterrupt
    assert not changes(before, state_of(tiny))
