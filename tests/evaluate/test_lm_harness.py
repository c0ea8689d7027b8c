"""`--lm-eval`: the harness's figures against our own log-probabilities, and what it must leave alone."""

import json
import logging
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import logits

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from unlearn_peft import attached, forgetting
from unlearn_peft.evaluate import lm_harness as ability
from unlearn_peft.evaluate.evaluation import evaluate
from unlearn_peft.evaluate.lm_harness import read_tasks
from unlearn_peft.evaluate.report.labels import label
from unlearn_peft.evaluate.token_scores import row_tokens

RECIPES = Path(__file__).parents[2] / "recipes"
DOCS = [
    {"question": "Who wrote the blue book?", "choices": ["Zorblax", "the sea", "a town near", "stars"], "answer": 0},
    {"question": "What is green?", "choices": ["apples", "I", "Quintel in a small town", "red"], "answer": 1},
    {"question": "Where was it?", "choices": ["near sea", "of", "by", "in a town"], "answer": 2},
    {"question": "Who likes apples?", "choices": ["I like apples", "and", "stars ?", "the"], "answer": 3},
]
TASK = {
    "task": "four_rows", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "four.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices", "doc_to_target": "answer",
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder of tasks: four rows to choose in, the same written out, and a group of both."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "four.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    written = {**TASK, "task": "written", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
               "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
               "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    del written["doc_to_choice"]
    rolling = {**TASK, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{question}}",
               "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]}  # fmt: skip
    del rolling["doc_to_choice"]
    other = {**TASK, "task": "other_rows"}
    group = {"group": "both", "task": ["four_rows", "other_rows"],
             "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]}  # fmt: skip
    for task in (TASK, written, rolling, other):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))
    (folder / "both.yaml").write_text(json.dumps(group))
    return folder


@pytest.fixture
def adapter(tiny, make_adapter):
    return make_adapter(tiny, "a", scale=0.4)


def by_hand(base):
    """Return acc and acc_norm from our own log-probabilities, one number a row."""
    plain, by_length = [], []
    for doc in DOCS:
        rows = [
            {"prompt": f"Question: {doc['question']}\nAnswer:", "completion": f" {choice}"} for choice in doc["choices"]
        ]
        log_p = np.array([float(row.log_p.double().sum()) for row in row_tokens(base, rows, chat_template=False)])
        plain.append(float(log_p.argmax() == doc["answer"]))
        by_length.append(float((log_p / [len(choice) for choice in doc["choices"]]).argmax() == doc["answer"]))
    return plain, by_length


def test_the_figures_are_those_of_our_own_log_probabilities(tiny, adapter, folder):
    tasks = read_tasks(["four_rows"], [folder])
    before, seen = logits(tiny), {}
    for state, adapters in (("before", []), ("with", [adapter])):
        with forgetting(tiny, *adapters):
            scores, hand = tasks.measure(tiny), by_hand(tiny)
            assert list(attached(tiny)) == [path.name for path in adapters]
        assert [score.name for score in scores] == ["lm_eval:four_rows:acc", "lm_eval:four_rows:acc_norm"]
        for score, rows in zip(scores, hand, strict=True):
            wide = 1.96 * np.std(rows, ddof=1) / len(rows) ** 0.5
            assert score.value == np.mean(rows) and score.n == 4 and score.unit == "share of questions"
            assert score.low == pytest.approx(max(np.mean(rows) - wide, 0))
            assert score.high == pytest.approx(min(np.mean(rows) + wide, 1))
            assert score.higher_is_better
        seen[state] = hand
    assert seen["before"] != seen["with"], "the adapter should change an answer, or the test tells nothing"
    assert not attached(tiny) and logits(tiny).equal(before)


def test_a_limit_takes_the_first_rows_and_one_row_tells_nothing(tiny, folder):
    (one, _) = read_tasks(["four_rows"], [folder], limit=1).measure(tiny)
    assert one.n == 1 and one.value == by_hand(tiny)[0][0] and (one.low, one.high) == (0, 1)


def test_groups_other_kinds_of_tasks_and_files(tiny, folder):
    scores = {s.name: s for s in read_tasks(["both", "written", "rolling"], [folder / "four_rows.yaml"]).measure(tiny)}
    assert list(scores) == [
        "lm_eval:both:acc", "lm_eval:written:exact_match", "lm_eval:rolling:word_perplexity",
        "lm_eval:rolling:bits_per_byte",
    ]  # fmt: skip
    assert scores["lm_eval:both:acc"].n == 8 and scores["lm_eval:both:acc"].value == np.mean(by_hand(tiny)[0])
    rolling = scores["lm_eval:rolling:bits_per_byte"]  # the harness has no standard error for it
    assert rolling.unit == "bits/byte" and not rolling.higher_is_better and rolling.low < rolling.value < rolling.high
    (named, _) = read_tasks([str(folder / "four_rows.yaml")]).measure(tiny)
    assert named.name == "lm_eval:four_rows:acc" and named.value == np.mean(by_hand(tiny)[0])


def test_labels_for_people():
    assert label("lm_eval:four_rows:acc_norm") == "four_rows: accuracy by length"
    assert label("lm_eval:both::one:exact_match,strict-match") == "both::one: exact match (strict-match)"


def test_the_harness_writes_logs_and_switches_nothing(tiny, folder, tmp_path, monkeypatch, capsys, caplog):
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    level, padding = logging.getLogger("lm_eval").level, tiny.tokenizer.padding_side
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("lm_eval").setLevel(level)
        read_tasks(["four_rows", "written"], [folder]).measure(tiny)
    out = capsys.readouterr()
    said = out.out + out.err + caplog.text
    assert not [doc["question"] for doc in DOCS if doc["question"] in said]
    assert out.out == out.err == "" and not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert not cache.exists() and sorted(folder.iterdir()) == before
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert logging.getLogger("lm_eval").level == level and tiny.tokenizer.padding_side == padding


def test_refusals(run_eval, adapter, folder, tiny_folder, monkeypatch):
    def refused(*arguments, told):
        code, _, err = run_eval(adapter, *arguments)
        assert code == 2 and told in err and "Traceback" not in err, (code, err)
        assert "measuring" not in err

    own = ("--lm-eval-path", folder)
    monkeypatch.setattr(ability, "_manager", only_local(ability._manager, folder))
    refused("--lm-eval", "four_row", *own, told="knows no task 'four_row' (did you mean 'four_rows'?)")
    refused("--lm-eval", "four_rows", "--lm-eval-path", folder / "none", told="no tasks at")
    refused("--lm-eval-limit", 3, told="name some with --lm-eval")
    refused("--lm-eval", "four_rows,other_rows", *own, "--attacks", "prefix", told="--attacks needs forget and probes")
    (folder / "four.jsonl").unlink()
    refused("--lm-eval", "four_rows", *own, told="'four_rows' of lm-evaluation-harness cannot be read (FileNotFound")
    (folder / "four.jsonl").write_text('{"question": "a secret')
    code, _, err = run_eval(adapter, "--lm-eval", "four_rows", *own)
    assert code == 2 and "cannot be read" in err and "secret" not in err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused("--lm-eval", "four_rows", *own, told="pip install 'unlearn-peft[lm-eval]'")


def only_local(real, folder):
    """Leave out the harness's own tasks, whose thousands of files take ten seconds to read."""
    from lm_eval.tasks import TaskManager

    def manager(names, folders):
        with pytest.MonkeyPatch.context() as patch:
            init = TaskManager.__init__
            patch.setattr(
                TaskManager, "__init__", lambda self, **given: init(self, **{**given, "include_defaults": False})
            )
            return real(names, folders)

    return manager


def test_the_command_tells_it_in_table_page_json_and_card(run_eval, adapter, folder, tiny_folder):
    common = (adapter, "--base", tiny_folder, "--lm-eval-path", folder, "--lm-eval", "four_rows")
    code, out, err = run_eval(*common, "--lm-eval-limit", 3)
    assert code == 0, err
    assert "four_rows: accuracy" in out and "What else can it do?" in out and "was not checked" in out
    figures = json.loads((adapter.with_name("a.eval") / "evaluation.json").read_text())
    assert figures["settings"]["lm_eval"] == ["four_rows"] and figures["settings"]["lm_eval_limit"] == 3
    assert figures["scores"]["with"][0]["n"] == 3 and figures["scores"]["after"] == []
    assert figures["removal"] == {"exact": None, "differs": []} and "lm-eval" in figures["versions"]
    assert "standard errors" in figures["interval"]["lm_eval"]
    page = (adapter.with_name("a.eval") / "report.html").read_text()
    assert "four_rows: accuracy by length" in page and DOCS[0]["question"] not in page
    assert not (adapter / "README.md").exists() or "four_rows" not in (adapter / "README.md").read_text()


def test_ability_is_no_trace_of_an_adapter(tiny, adapter, folder):
    near = [{"prompt": "What?", "completion": "It is red."}]
    tasks = read_tasks(["four_rows"], [folder])
    result = evaluate(tiny, [adapter], {"neighbours": near}, ability=tasks)
    assert [s.name for s in result.scores["with"]] == [
        "neighbours_kl", "neighbours_unchanged", "neighbours_right", "neighbours_abstain", "lm_eval:four_rows:acc",
        "lm_eval:four_rows:acc_norm",
    ]  # fmt: skip
    assert result.left_behind == [] and result.figures()["removal"]["exact"] is True and not attached(tiny)


def test_the_shipped_task(tiny):
    rows = [json.loads(line) for line in (RECIPES / "tasks" / "world_facts.jsonl").read_text().splitlines()]
    assert len(rows) == 113
    for n, row in enumerate(rows):
        assert row["answer"] == n % 4 and len(set(row["choices"])) == 4 and all(row["choices"]) and row["question"]
    plain, by_length = read_tasks(["world_facts"], [RECIPES / "tasks"], limit=2).measure(tiny)
    assert plain.name == "lm_eval:world_facts:acc" and by_length.n == 2
