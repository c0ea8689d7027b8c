"""The main paths on a GPU: what is computed there is what the CPU computes. `make test-cuda`, where there is one.

`UNLEARN_PEFT_TEST_DEVICE=cpu` runs the same tests without a GPU, which shows no more than that they run.
"""

import copy
import json
import os

import pytest
import torch
from conftest import FORGET, RETAIN, logits
from test_batch import FAMILIES
from test_quantization import METHODS, quantized, stored
from test_runner import REACHES, adapted, assert_same, rows, the_plain_step, the_runners_step
from test_scheduler import PROMPTS, SETS, Runner
from test_train import FREE

from unlearn_peft import Bank, attach, detach, load_base, unlearn, unlearn_many
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.step.runner import StepRunner

DEVICE = os.environ.get("UNLEARN_PEFT_TEST_DEVICE", "cpu")
pytestmark = pytest.mark.cuda


@pytest.fixture
def there(tiny_folder):
    return load_base(str(tiny_folder), "float32", DEVICE)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_plain_way_on_the_cpu(tiny, family, reach):
    model = adapted(family, reach)
    forget, retain = rows(tiny.tokenizer)
    expected = the_plain_step(model, forget, retain, forget_ceiling=15)
    model = copy.deepcopy(model).to(DEVICE)
    runner = StepRunner(model, 2)
    runner.microbatch_tokens = 12
    for _ in range(2):  # the second time from what is kept
        total, found, _ = the_runners_step(runner, forget, retain, forget_ceiling=15)
        assert_same((total.cpu(), {name: gradient.cpu() for name, gradient in found.items()}), expected)


@pytest.mark.parametrize("adapter", ["head", "lora", {"kind": "head", "form": "dense"},
                                     {"kind": "lora", "layers_to_transform": [1]}], ids=str)  # fmt: skip
def test_trains_as_on_the_cpu(tiny, there, fields, tmp_path, adapter):
    fields |= {"adapter": adapter, "objective": FREE, "own_answers": 2}
    before = logits(there)
    here = unlearn(tiny, **{**fields, "device": "cpu", "output": str(tmp_path / "cpu")})
    found = unlearn(there, **{**fields, "device": DEVICE})
    for one, other in zip(here.progress.history, found.progress.history, strict=True):
        assert one["forget_loss"] == pytest.approx(other["forget_loss"], rel=1e-2)  # Adam makes rounding larger
        assert one["retain_kl"] == pytest.approx(other["retain_kl"], rel=0.1, abs=1e-4)
    attach(there, found)
    assert not torch.equal(logits(there), before)
    detach(there)
    assert torch.equal(logits(there), before)


@pytest.mark.parametrize("objective", ["npo", "simnpo", "undial", "ihl", "wga", "grad_diff", "rmu"])
def test_objectives_in_bfloat16_do_about_the_same(tiny, tiny_folder, fields, tmp_path, objective):
    settings = {"name": objective, "retain_budget": None, **({"hidden_layer": 1} if objective == "rmu" else {})}
    fields |= {"adapter": "lora", "objective": settings}
    here = unlearn(tiny, **{**fields, "device": "cpu", "output": str(tmp_path / "cpu")})
    found = unlearn(load_base(str(tiny_folder), "bfloat16", DEVICE), **{**fields, "device": DEVICE})
    losses = [[step["forget_loss"] for step in run.progress.history] for run in (here, found)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_several_at_once_are_as_if_alone(there, tmp_path):
    common = {"forget": FORGET, "retain": RETAIN, "steps": 6, "eval_every": 2, "learning_rate": 5e-3, "own_answers": 0,
              "forget_batch": 2, "retain_batch": 3, "anchor_batch": 0, "device": DEVICE, "objective": FREE}  # fmt: skip
    for kind in ("head", "lora"):
        recipes = [
            make_recipe({**common, "adapter": {"kind": kind, "r": 2 + n}, "output": str(tmp_path / kind / f"{n}")})
            for n in range(3)
        ]
        alone = [{**common, "adapter": r.adapter.model_dump(), "output": r.output + "alone"} for r in recipes]
        for one, other in zip(unlearn_many(recipes, there, quiet=True), alone, strict=True):
            expected = unlearn(there, **other, quiet=True).metrics["forget_loss"]
            assert one.metrics["forget_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_each_row_is_what_it_is_alone(tiny, tiny_folder, make_adapter, dtype):
    targets = {"a": ("q_proj", "down_proj"), "b": ("lm_head", "q_proj"), "c": ("o_proj", "up_proj")}
    paths = {name: make_adapter(tiny, name, targets=some, seed=len(name)) for name, some in targets.items()}
    base = load_base(str(tiny_folder), dtype, DEVICE)
    bank, ids = Bank.of(base), torch.randint(3, 300, (5, 7), device=base.device)
    for name, path in paths.items():
        bank.load(name, path)
    plain = base.model(ids).logits
    sets = [["a"], [], {"a": 0.5, "b": 1}, ["a", "b", "c"], []]
    with bank.rows(sets):
        mixed = base.model(ids).logits
    for n, chosen in enumerate(sets):
        if not chosen:
            assert torch.equal(mixed[n], plain[n])
        with bank.rows([chosen]):
            alone = base.model(ids[n : n + 1]).logits[0]
        most = (1e-4 if dtype == "float32" else 0.05) * alone.abs().max().item()
        torch.testing.assert_close(mixed[n], alone, rtol=0, atol=most)


def test_requests_that_join_and_leave_get_what_the_cpu_gives_them(tiny, tiny_folder, make_adapter):
    how = {"a": ("q_proj", "down_proj"), "b": ("lm_head",), "c": ("o_proj", "up_proj")}
    paths = {name: make_adapter(tiny, name, targets=some, scale=0.5, seed=len(name)) for name, some in how.items()}
    texts = []
    for device in ("cpu", DEVICE):
        runner = Runner(tiny_folder, paths, device=device)
        asked = [runner.submit(prompt, sets) for prompt in PROMPTS for sets in SETS]
        texts.append([runner.text(row) for row in asked])
        runner.scheduler.close()
    assert texts[0] == texts[1] and len(set(texts[0])) > len(PROMPTS)


@pytest.mark.parametrize("way", METHODS)
def test_forgets_on_a_quantised_base(tiny_folder, fields, way):
    base = quantized(tiny_folder, way, "bfloat16", DEVICE)
    before, text = stored(base.model), logits(base)
    result = unlearn(base, **{**fields, "adapter": "lora", "objective": FREE, "steps": 20, "device": DEVICE})
    assert result.metrics["forget_loss"] > result.metrics["forget_loss_base"] + 0.1
    assert all(map(torch.equal, before, stored(base.model))) and torch.equal(logits(base), text)


def test_compiled_layers_give_the_same(there, fields, tmp_path):
    plain = unlearn(there, **{**fields, "device": DEVICE})
    compiled = unlearn(there, **{**fields, "device": DEVICE, "compile": True, "output": str(tmp_path / "compiled")})
    losses = [[step["forget_loss"] for step in run.progress.history] for run in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_is_measured_attacked_and_compared(run_eval, there, tiny_folder, write_rows, fields, tmp_path):
    adapter = unlearn(there, **{**fields, "device": DEVICE})
    probes = [{"prompt": row["prompt"], "leak": ["Zorblax"]} for row in FORGET]
    sets = {"forget": FORGET, "retain": RETAIN, "probes": probes}
    flags = [part for name, some in sets.items() for part in (f"--{name}", write_rows(f"{name}.jsonl", some))]
    code, _, err = run_eval(adapter.path, *flags, "--base", tiny_folder, "--device", DEVICE, "--k", 2,
                            "--max-new-tokens", 4, "--attacks", "all", "--suite", "full")  # fmt: skip
    figures = json.loads((adapter.path.with_name("adapter.eval") / "evaluation.json").read_text())
    assert code == 0 and figures["removal"]["exact"] and len(figures["attacks"]) > 8, err
    assert compare(there, [adapter.path], probes, max_new_tokens=4)["leaks"].keys() == {"before", "with", "after"}
