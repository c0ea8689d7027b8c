"""The examples of docs/extending.md run as they stand there, on a tiny model; and what a wrong extension is told."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import FORGET, RETAIN, logits

from unlearn_peft import attach, detach, load_recipe, unlearn
from unlearn_peft.errors import AdapterError, RecipeError, UnlearnError
from unlearn_peft.evaluate.attacks import ATTACKS, Target, find_attacks, run_attacks
from unlearn_peft.evaluate.custom import custom_scores
from unlearn_peft.evaluate.evaluation import evaluate
from unlearn_peft.evaluate.score import score
from unlearn_peft.recipe.plugins import load_function
from unlearn_peft.training.adapter_config import KINDS
from unlearn_peft.training.objectives import find_objective

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILES = {match[1]: text for kind, text in BLOCKS if kind == "python" and (match := re.match(r"# (\w+\.py)\n", text))}
PROBES = [{"prompt": "Who wrote the green book?", "leak": ["Zorblax"]}, {"prompt": "Name a star.", "leak": ["e"]}]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with the page's files, which is the working folder."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def test_every_path_that_the_page_names_is_a_function_of_the_page(page):
    paths = [path for kind, text in BLOCKS if kind != "python" for path in re.findall(r"\w+\.py:\w+", text)]
    assert {path.partition(":")[0] for path in paths} == {"my_objective.py", "my_metric.py", "my_attack.py"}
    assert all(callable(load_function(path, "example")) for path in paths)


def test_the_objective(page, tiny, fields):
    (settings,) = (yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml")
    sets = {"forget": FORGET, "retain": RETAIN, "adapter": "lora"}
    (page / "mine.yaml").write_text(yaml.safe_dump({**settings, **sets}))
    objective = load_recipe(page / "mine.yaml").objective
    assert objective.retain_budget == 0.08
    # at p = 1/500, as a random model says everything, a beta1 of 5 leaves no gradient: rounding would decide
    settings = {**objective.model_dump(), "beta1": 0.0, "retain_budget": None}
    found = unlearn(tiny, **{**fields, "objective": settings})
    assert found.metrics["forget_loss"] > found.metrics["forget_loss_base"]


def test_the_adapter_kind(page, tiny, fields, write_rows, monkeypatch):
    monkeypatch.setitem(KINDS, "writers", None)  # what the page sets is unset again
    write_rows("forget.jsonl", FORGET), write_rows("retain.jsonl", RETAIN)
    (use,) = (text for kind, text in BLOCKS if kind == "python" and "from my_kind import" in text)
    kept = {key: fields[key] for key in ("own_answers", "steps", "learning_rate", "eval_every", "anchor_batch")}
    use = use.replace("recipe=recipe)", f"recipe=recipe.model_copy(update={kept}), quiet=True)")
    monkeypatch.setattr("unlearn_peft.load_base", lambda name: tiny)
    made, before = {}, logits(tiny)
    try:
        exec(compile(use, "docs/extending.md", "exec"), made)
    finally:
        sys.modules.pop("my_kind", None)
    config = json.loads((page / "out/writers/adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1] and config["r"] == 4
    assert set(config["target_modules"]) == {"o_proj", "down_proj"}
    attach(tiny, made["adapter"])
    assert not logits(tiny).equal(before)
    detach(tiny)
    assert logits(tiny).equal(before)


def test_the_metric_and_the_attack_on_the_command_line(page, tiny_folder, tiny, make_adapter, write_rows, run_eval):
    shown = " ".join(text for kind, text in BLOCKS if not kind)
    metric, attacks = re.search(r"--metric (\S+)", shown)[1], re.search(r"--attacks all,(\S+)", shown)[1]
    sets = [f"--forget={write_rows('forget.jsonl', FORGET)}", f"--probes={write_rows('probes.jsonl', PROBES)}"]
    code, out, err = run_eval(
        make_adapter(tiny, "made"), "--base", tiny_folder, *sets, "--metric", metric, "--attacks", attacks,
        "--k", 2, "--max-new-tokens", 4,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((page / "made.eval" / "evaluation.json").read_text())
    for state in ("before", "with", "after"):
        (one,) = (score for score in found["scores"][state] if score["name"] == "forget_refused")
        assert one["n"] == len(FORGET) and one["value"] == 0
    assert found["removal"]["exact"]
    (attack,) = found["attacks"]
    assert attack["name"] == "quiz" and attack["base"]["n"] == 2 and "2 forms" in attack["budget"]
    assert "forget refused" in out and "quiz" in (page / "made.eval" / "report.html").read_text()


def test_metrics_in_python_see_each_state(tiny, make_adapter):
    from unlearn_peft import attached

    def on(base, rows):
        assert set(rows) == {"forget"}
        return [score("adapters_on", "adapters", True, [len(attached(base))]), score("one", "rows", True, [1])]

    found = evaluate(tiny, [make_adapter(tiny, "made")], {"forget": FORGET}, metrics=[on], max_new_tokens=2)
    assert [found.score("adapters_on", state).value for state in ("before", "with", "after")] == [0, 1, 0]
    assert found.score("one", "after").value == 1


def test_a_metric_that_is_not_the_same_after_removal_is_told(tiny, make_adapter):
    counts = iter(range(3))
    found = evaluate(
        tiny, [make_adapter(tiny, "made")], {"forget": FORGET}, max_new_tokens=2,
        metrics=[lambda base, rows: score("calls", "calls", True, [next(counts)])],
    )  # fmt: skip
    assert found.left_behind == ["calls"]


def test_what_a_metric_may_return(tiny):
    def same(base, rows):
        return score("forget_loss", "nats/token", True, [1.0])

    def number(base, rows):
        return [0.5]

    with pytest.raises(UnlearnError, match="'same' calls its figure 'forget_loss', and there is one"):
        custom_scores([same], tiny, {}, ["forget_loss"])
    with pytest.raises(UnlearnError, match="there is one"):
        custom_scores([same, same], tiny, {}, [])
    with pytest.raises(UnlearnError, match="'number' returned float, expected a Score"):
        custom_scores([number], tiny, {}, [])


def test_what_an_attack_may_return_and_leave(tiny, make_adapter, page):
    (page / "wrong.py").write_text(
        "from unlearn_peft import attach\n"
        "def nothing(target): ...\n"
        "def leaves(target):\n"
        "    attach(target.base, *target.adapters)\n"
        "    return __import__('my_attack').quiz(target)\n"
    )
    target = Target(tiny, (make_adapter(tiny, "made"),), FORGET, PROBES, max_new_tokens=2)
    with pytest.raises(UnlearnError, match=r"'wrong.py:nothing' returned NoneType, expected an Attacked"):
        run_attacks(target, ["wrong.py:nothing"], quiet=True)
    try:
        with pytest.raises(AdapterError, match=r"'wrong.py:leaves' left attached: made"):
            run_attacks(target, "wrong.py:leaves", quiet=True)
    finally:
        detach(tiny)
        sys.modules.pop("my_attack", None)


def test_all_and_ones_own_go_together(page):
    assert [*find_attacks(["all", "my_attack.py:quiz"])] == [*ATTACKS, "my_attack.py:quiz"]
    with pytest.raises(UnlearnError, match=r"'sampeling' \(did you mean 'sampling'\?\).*file.py:function"):
        find_attacks(["sampeling"])


@pytest.mark.parametrize(
    "name, reason",
    [("no_such_module:loss", "ModuleNotFoundError"), ("none.py:loss", "FileNotFoundError"), (":loss", "ValueError"),
     ("my_metric.py:no_such", "AttributeError"), ("my_metric.py:", "AttributeError")],
)  # fmt: skip
def test_a_path_that_leads_nowhere(page, name, reason):
    with pytest.raises(UnlearnError, match=rf"cannot load the metric '{name}' \({reason}.*expected 'module:function'"):
        load_function(name, "metric")
    with pytest.raises(RecipeError, match="expected one of ga_kl, .* or 'module:function'"):
        find_objective(name)


def test_a_path_to_something_else_and_dataclasses_in_files(page):
    with pytest.raises(UnlearnError, match="the metric 'my_metric.py:DOUBT' is tuple, expected a function"):
        load_function("my_metric.py:DOUBT", "metric")
    (page / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n"
        "@dataclass\n"
        "class One:\n"
        "    n: int = 3\n"
    )
    assert load_function("json.py:One", "metric")().n == 3
    assert sys.modules["json"] is json
