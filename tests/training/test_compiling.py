"""Compiled layers compute the same, and nothing of it is left on the base."""

import shutil

import pytest
import torch
from conftest import logits
from test_train import assert_same

from unlearn_peft import unlearn, unlearn_many
from unlearn_peft.errors import RecipeError
from unlearn_peft.recipe.load import make_recipe

RMU = {"name": "rmu", "hidden_layer": 1, "retain_budget": None}
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"objective": RMU}, id="rmu, by a hook"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
    ],
)
def test_compiled_layers_give_the_same_losses_and_are_undone(tiny, fields, tmp_path, more):
    before = logits(tiny)
    plain = unlearn(tiny, **{**fields, **more})
    compiled = unlearn(tiny, **{**fields, **more, "compile": True, "output": str(tmp_path / "compiled")})
    for key in ("forget_loss", "retain_kl"):
        found, expected = ([step[key] for step in run.progress.history] for run in (compiled, plain))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert_same(compiled, plain, rtol=1e-2, atol=1e-3)
    assert torch.equal(logits(tiny), before)
    assert not [name for name, m in tiny.model.named_modules() if "forward" in vars(m) or m._compiled_call_impl]


def test_a_machine_that_cannot_compile_is_told_what_is_missing(tiny, fields, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RecipeError, match=r"No working C\+\+ compiler.*set compile: false"):
        unlearn(tiny, **fields, compile=True)
    assert not [m for m in tiny.model.modules() if "lora" in type(m).__module__]


def test_several_adapters_at_once_are_not_compiled(tiny, fields, tmp_path):
    fields.pop("quiet")
    recipes = [make_recipe({**fields, "compile": True, "output": str(tmp_path / name)}) for name in "ab"]
    with pytest.raises(RecipeError, match="compile: true.*several adapters"):
        unlearn_many(recipes, tiny, quiet=True)
