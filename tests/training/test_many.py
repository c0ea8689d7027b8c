"""Several adapters in one run: each as if trained alone, each saved when it is done, none lost by another's end."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import FORGET, RETAIN
from safetensors.torch import load_file

from unlearn_peft import unlearn, unlearn_many
from unlearn_peft.errors import Interrupted, RecipeError, TrainingError
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.trainer import Training

COMMON = {
    "forget": FORGET, "retain": RETAIN, "steps": 6, "eval_every": 2, "learning_rate": 5e-3, "forget_batch": 2,
    "retain_batch": 3, "warmup_steps": 0, "save_dtype": "float32", "anchor_batch": 0, "own_answers": 0,
    "checkpoint_every": 2, "objective": {"name": "ga_kl", "forget_ceiling": 15, "retain_budget": None},
}  # fmt: skip
LORAS = [
    {"adapter": {"kind": "lora", "r": 3, "layers": "all"}},
    {"adapter": {"kind": "lora", "r": 5, "layers_to_transform": [1]}, "steps": 4, "seed": 3, "forget": FORGET[:2]},
    {"adapter": {"kind": "lora", "r": 2, "target_modules": ["q_proj"]}, "objective": "npo", "retain": RETAIN[3:]},
]
HEADS = [{"adapter": {"kind": "head", "r": r}, "seed": r} for r in (2, 3)]
DENSE = [{"adapter": {"kind": "head", "form": "dense"}, "learning_rate": rate} for rate in (1e-2, 1e-3)]


def recipes(folder, several, **more):
    return [make_recipe({**COMMON, **one, **more, "output": str(folder / f"{n}")}) for n, one in enumerate(several)]


def weights(path):
    return load_file(Path(path) / "adapter_model.safetensors")


@pytest.mark.parametrize("several", [LORAS, HEADS, DENSE], ids=["lora", "head", "dense"])
@pytest.mark.parametrize("parts", [1, 2])
def test_each_is_as_if_trained_alone(tiny, tmp_path, several, parts):
    more = {"gradient_accumulation_steps": parts}
    before = {name: p.clone() for name, p in tiny.model.named_parameters()}
    together = unlearn_many(recipes(tmp_path / "together", several, **more), tiny, quiet=True)
    alone = [unlearn(tiny, recipe=recipe, quiet=True) for recipe in recipes(tmp_path / "alone", several, **more)]
    for one, other in zip(together, alone, strict=True):
        a, b = weights(one), weights(other)
        assert a.keys() == b.keys() and one.metrics["forget_loss"] > one.metrics["forget_loss_base"]
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)
        assert one.metrics["forget_loss"] == pytest.approx(other.metrics["forget_loss"], rel=1e-3)
        assert sorted(f.name for f in one.path.iterdir()) == sorted(f.name for f in other.path.iterdir())
        config, same = (json.loads((x.path / "adapter_config.json").read_text()) for x in (one, other))
        assert config == same
    after = dict(tiny.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert not list(tmp_path.rglob("*.cache")) and not list(tmp_path.rglob("*.training"))


def test_steps_may_be_in_different_numbers_of_parts(tiny, tmp_path):
    several = [LORAS[0], {**LORAS[1], "gradient_accumulation_steps": 2}]
    together = unlearn_many(recipes(tmp_path / "together", several), tiny, quiet=True)
    for one, recipe in zip(together, recipes(tmp_path / "alone", several), strict=True):
        alone = weights(unlearn(tiny, recipe=recipe, quiet=True))
        for name, tensor in weights(one).items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=2e-4)


def test_one_that_fails_does_not_take_the_others_along(tiny, tmp_path, monkeypatch):
    bad = {"learning_rate": 4e9, "optimizer": "sgd", "max_grad_norm": None}
    with pytest.raises(TrainingError, match=r"1 of 3 adapters failed .*the others are saved.*not a number at step"):
        unlearn_many(recipes(tmp_path, [LORAS[0], {**LORAS[1], **bad}, LORAS[2]]), tiny, quiet=True)
    assert [(tmp_path / str(n) / "forget.json").is_file() for n in range(3)] == [True, False, True]
    alone = unlearn(tiny, recipe=recipes(tmp_path / "alone", [LORAS[2]])[0], quiet=True)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path / "2")[name], tensor, rtol=1e-3, atol=2e-4)


def test_ctrl_c_keeps_all_and_resume_goes_on(tiny, tmp_path, monkeypatch):
    whole = unlearn_many(recipes(tmp_path / "whole", LORAS), tiny, quiet=True)
    original = Training.one_step

    def interrupt(self):
        if self.trainers[0].step == 4:  # the second is done by then
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="2 of 3 adapters unfinished.*--resume"):
        patch.setattr(Training, "one_step", interrupt)
        unlearn_many(recipes(tmp_path / "again", LORAS), tiny, quiet=True)
    assert [(tmp_path / "again" / str(n) / "forget.json").is_file() for n in range(3)] == [False, True, False]
    finished = (tmp_path / "again" / "1" / "forget.json").stat().st_mtime_ns
    resumed = unlearn_many(recipes(tmp_path / "again", LORAS), tiny, resume=True, quiet=True)
    assert (tmp_path / "again" / "1" / "forget.json").stat().st_mtime_ns == finished, "left as it was"
    for one, other in zip(whole, resumed, strict=True):
        for name, tensor in weights(one).items():
            torch.testing.assert_close(weights(other)[name], tensor, rtol=1e-3, atol=2e-4)
    changed = recipes(tmp_path / "again", LORAS, seed=5)
    unlearn_many(changed, tiny, resume=True, quiet=True)
    assert (tmp_path / "again" / "1" / "forget.json").stat().st_mtime_ns != finished, "another recipe: trained again"


@pytest.mark.parametrize(
    "several, why",
    [
        ([LORAS[0], HEADS[0]], "must be of one kind, these are: head low_rank, lora"),
        ([LORAS[0], {"adapter": {"kind": "lora", "lora_dropout": 0.1}}], "lora_dropout draws other masks"),
        ([LORAS[0], {**LORAS[1], "base": "elsewhere"}], "must name one base, these are: demo.*, elsewhere"),
    ],
)
def test_what_cannot_be_trained_at_once_is_refused(tiny, tmp_path, several, why):
    with pytest.raises(RecipeError, match=why):
        unlearn_many(recipes(tmp_path, several), tiny, quiet=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [m for m in tiny.model.modules() if "lora" in type(m).__module__]


def test_outputs_must_differ(tiny, tmp_path):
    same = recipes(tmp_path, LORAS)
    with pytest.raises(RecipeError, match="an output of its own"):
        unlearn_many([same[0], same[1].model_copy(update={"output": same[0].output})], tiny)


def test_the_command_takes_several(tiny_folder, tmp_path, capsys):
    from typer.testing import CliRunner

    from unlearn_peft.cli import app

    for n, one in enumerate(LORAS[:2]):
        (tmp_path / f"request{n}.yaml").write_text(json.dumps({**COMMON, **one, "base": str(tiny_folder)}))
    named = [str(tmp_path / f"request{n}.yaml") for n in range(2)]
    out = CliRunner().invoke(app, ["train", *named, "--output", str(tmp_path / "out"), "--quiet"])
    assert out.exit_code == 0, out.output
    for n in range(2):
        assert (tmp_path / "out" / f"request{n}" / "adapter_model.safetensors").is_file()
        assert f"adapter: {tmp_path / 'out' / f'request{n}'}" in out.output
