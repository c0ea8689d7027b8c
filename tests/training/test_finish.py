"""What is saved of a run: the kept step's delta, scaled down as far as what it has forgotten stays forgotten."""

import pytest
import torch
from test_train import weights

from unlearn_peft import unlearn
from unlearn_peft.recipe.load import make_recipe

FAR = {"forget_ceiling": 15, "retain_budget": None}  # far beyond what counts as forgotten


@pytest.fixture
def trained(tiny, fields, tmp_path):
    def train(name, **objective):
        settings = {**fields, "steps": 30, "learning_rate": 1e-2, "retain_weight": 0.0, "save_dtype": "float32"}
        return unlearn(tiny, **{**settings, "output": str(tmp_path / name), "objective": {**FAR, **objective}})

    return train


def parts(adapter):
    found = weights(adapter)
    return ({n: w for n, w in found.items() if is_down == (".lora_A." in n)} for is_down in (True, False))


def test_a_delta_that_goes_too_far_is_scaled_back_and_measured_as_it_is_saved(trained):
    whole, scaled = trained("whole", scale_back=None), trained("scaled", scale_back=0.9)
    assert whole.metrics["scaled_to"] == 1 and scaled.metrics["scaled_to"] < 1
    (down, up), (down_before, up_before) = parts(scaled), parts(whole)
    assert up and all(torch.equal(w, down_before[n]) for n, w in down.items())
    for name, weight in up.items():
        torch.testing.assert_close(weight, scaled.metrics["scaled_to"] * up_before[name])
    at_the_step = next(e for e in scaled.progress.evaluations if e["step"] == scaled.metrics["best_step"])
    assert scaled.metrics["forget_loss"] != at_the_step["forget_set_loss"]
    assert whole.metrics["forget_loss"] == at_the_step["forget_set_loss"]  # the same run, but for its end
    (harm,) = at_the_step.keys() & {"retain_kl", "held_out_kl"}
    assert scaled.metrics[harm] < whole.metrics[harm]
    assert scaled.metrics["forgotten_rows"] == whole.metrics["forgotten_rows"] > 0


def test_no_further_than_the_rows_stay_forgotten(trained, monkeypatch):
    from unlearn_peft.training.adapter_trainer import AdapterTrainer
    from unlearn_peft.training.reached import Reached

    def scaled_to(*pairs):
        """Each pair: forget rows and own answers that are forgotten by the whole delta, 0.7, 0.8, 0.9 of it."""
        counts = iter([count for pair in pairs for count in pair])
        monkeypatch.setattr(AdapterTrainer, "reached", lambda self, runner, rows: Reached(10, next(counts, 0)))
        return trained("out", scale_back=0.9).metrics["scaled_to"]

    assert scaled_to((3, 10), (3, 9)) == 0.7
    assert scaled_to((3, 10), (2, 10), (3, 8), (3, 10)) == 0.9  # no row of the user's is given up
    assert scaled_to((3, 10), (3, 8), (3, 8), (2, 10)) == 1


def test_what_the_user_ends_is_saved_as_trained(trained):
    stopped = trained("stopped", stop_when={"forget_loss": 7.0})
    assert stopped.metrics["stopped_by"] == "forget_loss" and stopped.metrics["scaled_to"] == 1


@pytest.mark.parametrize(
    "objective, share",
    [({}, 1.0), ({"refusals": True}, None), ({"refusals": True, "scale_back": 0.5}, 0.5), ({"name": "npo"}, None)],
)
def test_defaults(objective, share):
    assert make_recipe({"forget": [{"text": "a"}], "objective": objective}).objective.scale_back == share
