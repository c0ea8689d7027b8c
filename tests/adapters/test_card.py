"""The model card: the Hub's format, results in its model-index, and snippets that run as they stand."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FORGET, logits
from huggingface_hub import EvalResult, ModelCard

from unlearn_peft import attach, detach, read_bundle, unlearn
from unlearn_peft.adapters.card import put_evaluation, write_card
from unlearn_peft.adapters.transform.export_vllm import export_vllm
from unlearn_peft.adapters.transform.merge import stack
from unlearn_peft.adapters.transform.shrink import shrink
from unlearn_peft.errors import AdapterError

OLD = Path(__file__).parents[1] / "fixtures" / "adapter_v1"
HERE = "path/to/this/folder"
KINDS = {"lora": {"kind": "lora"}, "head": {"kind": "head"}, "dense": {"kind": "head", "form": "dense"}}


def blocks(card, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", card.read_text(), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def snippet(card, word, path):
    """The only Python snippet that holds a word, for this folder."""
    (found,) = [text for text in blocks(card, "python") if word in text]
    return found.replace(HERE, str(path))


def run(text):
    scope = {}
    exec(compile(text, "card", "exec"), scope)
    return scope


@pytest.fixture
def adapter(tiny, fields):
    return unlearn(tiny, **fields).path


@pytest.fixture
def forgotten(tiny, adapter):
    attach(tiny, adapter)
    changed = logits(tiny)
    detach(tiny)
    assert not torch.equal(changed, logits(tiny))
    return changed


# --- format -----------------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    metrics = {
        "best_step": 3, "forget_loss": 2.0, "forget_loss_base": 1.0, "answer_probability": 0.1,
        "answer_probability_base": 0.5, "held_out_kl": 0.01,
    }  # fmt: skip
    recipe = {"adapter": {"kind": "lora"}, "objective": {"name": "npo"}, "learning_rate": 1e-3, "retain_weight": 5}
    manifest = {"base": {"name": "acme/base"}, "peft_type": "LORA", "recipe": recipe, "metrics": metrics}
    write_card(tmp_path, manifest)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("acme/base", "peft", "text-generation")
    assert data.to_dict()["base_model_relation"] == "adapter" and data.tags == ["unlearning", "unlearn_peft", "lora"]
    found = {(r.dataset_type, r.metric_type): (r.metric_value, r.metric_args.get("base")) for r in data.eval_results}
    assert found == {
        ("forget", "forget_loss"): (2.0, 1.0), ("forget", "answer_probability"): (0.1, 0.5),
        ("held_out", "held_out_kl"): (0.01, None),
    }  # fmt: skip
    index = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["model-index"]
    assert index[0]["name"] == "forget adapter" and len(index[0]["results"]) == 2  # sets of rows


def test_a_base_that_is_no_hub_id_is_not_claimed(adapter):
    data = ModelCard.load(adapter / "README.md").data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()
    assert "![forget and retain curves](curves.png)" in (adapter / "README.md").read_text()


# --- snippets ---------------------------------------------------------------------------------------------------------


def test_our_snippet_runs(adapter, forgotten, tiny):
    text = snippet(adapter / "README.md", "from unlearn_peft import", adapter)
    before, after = text.split("# ...")[0], text
    assert torch.equal(logits(run(before)["base"]), forgotten)
    assert torch.equal(logits(run(after)["base"]), logits(tiny))  # detached at the end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_snippet_for_peft_runs(tiny, fields, kind):
    path = unlearn(tiny, **{**fields, "adapter": KINDS[kind]}).path
    attach(tiny, path)
    expected = logits(tiny)
    detach(tiny)
    scope = run(snippet(path / "README.md", "from peft import", path))
    tiny.model = scope["model"]
    assert torch.allclose(logits(tiny), expected, atol=1e-5 * float(expected.abs().max()))
    other = blocks(path / "README.md", "python")
    assert len(other) == (2 if kind == "dense" else 4)


@pytest.mark.filterwarnings("ignore")
def test_the_snippet_for_transformers_runs(adapter, forgotten, tiny):
    scope = run(snippet(adapter / "README.md", "load_adapter", adapter))
    plain = logits(tiny)
    tiny.model = scope["model"]
    assert torch.allclose(logits(tiny), forgotten, atol=1e-5 * float(forgotten.abs().max()))
    tiny.model.disable_adapters()
    assert torch.equal(logits(tiny), plain)


def test_the_snippets_for_vllm_export_runs_and_the_options_are_those_of_our_vllm_tests(
    adapter, forgotten, tiny, tmp_path, monkeypatch
):
    from unlearn_peft import cli

    card = adapter / "README.md"
    (shell,) = blocks(card, "")
    export, serve = shell.strip().splitlines()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(export.replace(HERE, str(adapter))))
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    attach(tiny, tmp_path / "for_vllm")
    assert torch.allclose(logits(tiny), forgotten, atol=1e-4)
    words = shlex.split(serve)
    options = [word for word in words if word.startswith("--")]
    assert words[:2] == ["vllm", "serve"] and words[-1] == "forget=for_vllm"
    real = Path(__file__).parents[1].joinpath("serve", "test_vllm.py").read_text()
    assert [option for option in options if option not in real] == ["--lora-modules"]  # that one: vLLM's documentation
    python = next(text for text in blocks(card, "python") if "vllm" in text)
    nodes = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    calls = {node.func.id: node for node in nodes if isinstance(node.func, ast.Name)}
    keywords = [keyword.arg for keyword in calls["LLM"].keywords]
    assert {f"--{word.replace('_', '-')}" for word in keywords[1:]} <= set(options) and keywords[0] == "model"
    assert len(calls["LoRARequest"].args) == 3


def test_what_others_cannot_read_is_told(tiny, adapter, fields, tmp_path):
    small = shrink(adapter, tmp_path / "small", bits=4).path
    text = (small / "README.md").read_text()
    assert "PEFT, transformers\nand vLLM refuse it" in text and "from peft" not in text and "4 bits a weight" in text
    assert "quantized" in ModelCard.load(small / "README.md").data.tags
    assert torch.isfinite(logits(run(snippet(small / "README.md", "unlearn_peft", small))["base"])).all()


def test_stacks_and_exports_have_cards_too(adapter, tmp_path):
    for path in (stack([adapter, adapter], tmp_path / "s", [1, 0.5]), export_vllm([adapter], tmp_path / "e").path):
        assert "adapters added up, at strengths" in (path / "README.md").read_text()
        assert "README.md" in read_bundle(path).manifest["files"]
    assert "2 adapters added up, at strengths" in (tmp_path / "s" / "README.md").read_text()


# --- results of an evaluation -----------------------------------------------------------------------------------------


def result(value, by="unlearn-peft eval", name="forget_loss"):
    return EvalResult(
        task_type="text-generation", dataset_type="forget", dataset_name="forget rows", metric_type=name,
        metric_value=value, metric_args={"by": by},
    )  # fmt: skip


def test_results_replace_earlier_ones_and_leave_those_of_others(adapter):
    card = ModelCard.load(adapter / "README.md")
    trained = len(card.data.eval_results)
    card.data.eval_results = [*card.data.eval_results, result(7.0, by="somebody", name="their_score")]
    card.data["licence_of_mine"] = "mine"
    card.save(adapter / "README.md")
    for value in (1.5, 2.5):
        put_evaluation(adapter, "## Evaluation\n\nx", [result(value)])
    data = ModelCard.load(adapter / "README.md").data
    found = {r.metric_type: r.metric_value for r in data.eval_results}
    assert len(data.eval_results) == trained + 1  # the loss of training gave way to the one that was measured
    assert found["forget_loss"] == 2.5 and found["their_score"] == 7.0 and data["licence_of_mine"] == "mine"
    read_bundle(adapter)


def test_eval_puts_its_figures_and_its_picture_into_the_card(adapter, run_eval, tiny_folder, write_rows):
    arguments = (adapter, "--base", tiny_folder, "--forget", write_rows("f.jsonl", FORGET), "--card")
    for _ in range(2):
        code, _, err = run_eval(*arguments)
        assert code == 0, err
    text, figures = (adapter / "README.md").read_text(), adapter.with_name("adapter.eval") / "evaluation.json"
    scores = {score["name"]: score for score in json.loads(figures.read_text())["scores"]["with"]}
    results = ModelCard.load(adapter / "README.md").data.eval_results
    results = [one for one in results if one.metric_args["by"] != "unlearn-peft train"]
    assert {r.metric_type for r in results} == set(scores) and len(results) == len(scores)
    for one in results:
        assert one.metric_value == pytest.approx(scores[one.metric_type]["value"], abs=1e-6)
        assert one.metric_args["n"] == scores[one.metric_type]["n"] and "base" in one.metric_args
    assert text.count("![figures](figures.png)") == 1 and (adapter / "figures.png").is_file()
    assert not [word for word in ("Zorblax", "Quintel", "blue book") if word.casefold() in text.casefold()]
    assert {"README.md", "figures.png"} <= set(read_bundle(adapter).manifest["files"])


@pytest.mark.parametrize("metadata", ["a: [", "- a\n- b", "model-index: 3", "model-index:\n- name: x"])
def test_metadata_that_cannot_be_read_is_refused_and_kept(adapter, metadata):
    text = f"---\n{metadata}\n---\n\n# Mine\n"
    (adapter / "README.md").write_text(text)
    with pytest.raises(AdapterError, match="metadata that cannot be read"):
        put_evaluation(adapter, "## Evaluation", [result(1.0)])
    assert (adapter / "README.md").read_text() == text


# --- older manifests --------------------------------------------------------------------------------------------------


def test_an_adapter_of_the_first_schema_loads(tiny):
    bundle = read_bundle(OLD)
    assert bundle.manifest["schema_version"] == 1 and bundle.manifest["metrics"]["best_step"] >= 0
    plain = logits(tiny)
    attach(tiny, OLD, allow_different_base=True)  # the tiny base's random weights may differ between torch's versions
    assert not torch.equal(logits(tiny), plain)


def test_later_readers_take_earlier_schemas_and_not_the_other_way_round(adapter, monkeypatch):
    monkeypatch.setattr("unlearn_peft.adapters.validate.SCHEMA_VERSION", 3)
    read_bundle(OLD)
    manifest = json.loads((adapter / "forget.json").read_text())
    for version in (4, 0, "1", None, True):
        (adapter / "forget.json").write_text(json.dumps({**manifest, "schema_version": version}))
        with pytest.raises(AdapterError, match="schema version"):
            read_bundle(adapter)
