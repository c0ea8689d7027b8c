"""TOFU's table of a live base, the rows that the benchmark makes for it, and answers that keep their meaning."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import logits

from unlearn_peft.errors import DataError
from unlearn_peft.evaluate.metrics.consistency import contains_gold, entities_in, same_entities
from unlearn_peft.evaluate.suites.tofu import measure_tofu
from unlearn_peft.evaluate.token_scores import row_tokens

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = {
    name: [
        {"prompt": f"Who wrote {name}?", "completion": "a red hill", "perturbed": ["a sea", "grass grows"]},
        {"prompt": "is it", "completion": "blue", "perturbed": ["the sky", "red"]},
    ]
    for name in ("forget", "retain", "real_authors", "world_facts")
}


def loss(base, prompt, completion):
    return row_tokens(base, [{"prompt": prompt, "completion": completion}])[0].loss


def test_the_table_is_what_the_definitions_say(tiny):
    found = measure_tofu(tiny, ROWS, np.array([0.5, 0.6]), max_new_tokens=4)
    scores = {score.name: score for score in found.scores}
    for row, ratio in zip(ROWS["forget"], found.truth_ratios, strict=True):
        right = loss(tiny, row["prompt"], row["completion"])
        wrong = np.mean([loss(tiny, row["prompt"], text) for text in row["perturbed"]])
        assert ratio == pytest.approx(np.exp(right - wrong), rel=1e-4)
    losses = [loss(tiny, row["prompt"], row["completion"]) for row in ROWS["retain"]]
    assert scores["retain_probability"].value == pytest.approx(np.mean(np.exp(-np.array(losses))), rel=1e-4)
    row = ROWS["world_facts"]
    p = [[np.exp(-loss(tiny, r["prompt"], text)) for text in (r["completion"], *r["perturbed"])] for r in row]
    assert scores["world_facts_probability"].value == pytest.approx(np.mean([q[0] / sum(q) for q in p]), rel=1e-4)
    nine = [
        scores[f"{name}_{part}"].value
        for name in ("retain", "real_authors", "world_facts")
        for part in ("probability", "rouge", "truth_ratio")
    ]
    harmonic = 9 / sum(1 / value for value in nine) if min(nine) > 0 else 0
    assert scores["model_utility"].value == pytest.approx(harmonic)
    assert scores["forget_quality"].n == 4
    again = measure_tofu(tiny, ROWS, found.truth_ratios, max_new_tokens=4)
    assert again.scores[0].name == "forget_quality" and again.scores[0].value == 1


def test_a_paraphrase_is_what_the_truth_ratio_takes_and_the_answer_what_the_probability_does(tiny):
    rows = {**ROWS, "forget": [{**row, "paraphrased": "a hill"} for row in ROWS["forget"]]}
    found = measure_tofu(tiny, rows, max_new_tokens=4)
    row = rows["forget"][0]
    wrong = np.mean([loss(tiny, row["prompt"], text) for text in row["perturbed"]])
    assert found.truth_ratios[0] == pytest.approx(np.exp(loss(tiny, row["prompt"], "a hill") - wrong), rel=1e-4)
    probability = next(score.value for score in found.scores if score.name == "forget_answer_probability")
    losses = np.array([loss(tiny, row["prompt"], row["completion"]) for row in rows["forget"]])
    assert probability == pytest.approx(np.mean(np.exp(-losses)), rel=1e-4)
    assert "forget_quality" not in [score.name for score in found.scores]  # there is nothing to compare with


def test_what_is_missing_is_told(tiny):
    with pytest.raises(DataError, match="missing: real_authors, world_facts"):
        measure_tofu(tiny, {name: ROWS[name] for name in ("forget", "retain")})
    bare = [{"prompt": "is it", "completion": "blue"}]
    with pytest.raises(DataError, match="perturbed"):
        measure_tofu(tiny, {**ROWS, "forget": bare})


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("tofu_smollm2", BENCHMARKS / "tofu_smollm2.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_benchmarks_wrong_answers_are_wrong_and_about_the_same_author(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tofu_smollm2.py"])
    rows = benchmark.local_rows(benchmark.arguments())
    assert [len(rows[name]) for name in ("forget", "retain", "real_authors", "world_facts")] == [40, 60, 20, 20]
    for name in ("forget", "retain", "real_authors", "world_facts"):
        for row in rows[name]:
            assert len(row["perturbed"]) == 3 and row["completion"] not in row["perturbed"]
    first, others = rows["forget"][:20], rows["forget"][20:]
    assert benchmark.full_name(first) == "Hsiao Yun-Hwa" and benchmark.full_name(others) == "Carmen Montenegro"
    named = [any("Hsiao" in text or "Yun-Hwa" in text for text in row["perturbed"]) for row in first]
    assert sum(named) >= 16 and not any("Hsiao" in text for row in others for text in row["perturbed"])


def test_the_benchmark_refuses_more_authors_than_there_are(benchmark, monkeypatch):
    for given in ("--forget-authors 16", "--retain-authors 0"):
        monkeypatch.setattr(sys, "argv", ["tofu_smollm2.py", *given.split()])
        with pytest.raises(SystemExit, match="there are rows of 1 to 15"):
            benchmark.local_rows(benchmark.arguments())


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on_where_it_was(benchmark, tiny, tmp_path, monkeypatch, capsys):
    tiny.model.save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    before = logits(tiny)
    argv = (
        f"tofu_smollm2.py --base {tmp_path / 'base'} --output {tmp_path / 'out'} --forget-authors 1 --retain-authors 1 "
        "--utility-rows 2 --epochs 1 --steps 2 --objectives ga_kl npo"
    )
    monkeypatch.setattr(sys, "argv", argv.split())
    benchmark.main()
    first = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == [
        "| retain-only",
        "| fine-tuned",
        "| ga_kl",
        "| npo",
    ]
    monkeypatch.setattr(benchmark, "load_base", None)  # nothing is measured twice
    for more in ([], ["--kept"]):
        monkeypatch.setattr(sys, "argv", argv.split() + more)
        benchmark.main()
        assert capsys.readouterr().out == first
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--seed", "1", "--kept"])
    with pytest.raises(SystemExit, match="run the command without --kept"):
        benchmark.main()
    assert (logits(tiny) == before).all()


def test_an_answer_says_the_same_if_it_names_the_same():
    question = "Who wrote The Hobbit?"
    one = "The Hobbit is a novel by J.R.R. Tolkien. It came out in 1937."
    assert entities_in(question, one) == {"tolkien"}  # the first sentence; initials end none
    said = ["It was J.R.R. Tolkien.", "It was Lewis Carroll.", "Nobody knows.", "Tolkien\nLewis"]
    assert same_entities([question] * 4, [one] * 4, said).tolist() == [1, 0, 0, 0]
    assert same_entities(["When?"], ["In 1937."], ["It was 1937, I think."]).tolist() == [1]
    assert same_entities(["What?"], ["A tool made of clay."], ["Some pot."]).tolist() == [
        1
    ]  # no names: seen as the same


def test_an_answer_is_right_if_it_has_all_that_its_row_names():
    # the last two name nothing
    asked = ["Who wrote The Hobbit?", "When?", "What does a potter do?", "Who is Gandalf?"]
    rows = ["It was J.R.R. Tolkien, an Oxford professor.", "In 1937.", "A potter makes pots.", "Gandalf is a wizard."]
    assert contains_gold(asked, rows, ["Tolkien, who taught at Oxford.", "1937", "?", "?"]).tolist() == [1, 1]
    assert contains_gold(asked, rows, ["J.R.R. Tolkien.", "It was 1938.", "?", "?"]).tolist() == [0, 0]
