"""TOFU's table of a live base, the rows that the benchmark makes for it, and answers that keep their meaning."""

import importlib.util
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import logits

from unlearn_peft.errors import DataError
from unlearn_peft.evaluate.metrics.consistency import facts_in, says_all
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


def spans(text, *parts):
    """Return where parts stand in a text, as `fact_spans` tells."""
    return [(text.index(part), text.index(part) + len(part)) for part in parts]


def test_an_answer_says_the_same_if_it_names_the_same():
    question = "Who wrote The Hobbit?"
    one = "The Hobbit is a novel by J.R.R. Tolkien. It came out in 1937."
    found = facts_in(question, one, spans(one, "R. Tolk", "1937"))
    assert found == {"tolkien"}  # the first sentence; initials end none; whole words
    said = ["It was J.R.R. Tolkien.", "It was Lewis Carroll.", "Nobody knows.", "Tolkien\nLewis"]
    assert says_all([found] * 4, said).tolist() == [1, 0, 0, 1]  # the first word of a sentence is seen
    assert says_all([facts_in("When?", "In 1937.", [(3, 7)])], ["It was 1937, I think."]).tolist() == [1]
    assert facts_in("?", "So it is. By Tolkien.", [(13, 20)]) == {"tolkien"}  # none in the first sentence: all


@pytest.mark.parametrize(
    "question, before, now, told",
    [
        ("What is the capital of France?", "Paris.", "London.", ["Paris"]),
        ("What is the capital of Italy?", "Rome is the capital of Italy.", "Milan is the capital of Italy.", ["Rome"]),
        ("Who wrote Dune?", "Herbert wrote Dune.", "Tolkien wrote Dune.", ["Herbert"]),
        ("法国的首都是哪里？", "法国的首都是巴黎。", "法国的首都是伦敦。", ["巴黎"]),
        ("巴黎在哪里？", "巴黎在法国。", "法在巴国。", ["法国"]),  # the same letters in another order
        ("भारत की राजधानी क्या है?", "भारत की राजधानी नई दिल्ली है।", "भारत की राजधानी मुंबई है।", ["नई दिल्ली"]),
        ("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة.", "عاصمة مصر هي بغداد.", ["القاهرة"]),
        ("Какая столица России?", "Столица России — Москва.", "Столица России — Казань.", ["Москва"]),
        ("เมืองหลวงของไทยคืออะไร", "กรุงเทพ", "เชียงใหม่", ["กรุงเทพ"]),
        ("What makes water boil?", "Water boils at a hundred degrees.", "Water freezes at a few degrees.", ["boils"]),
        ("Is it Rome or Milan?", "Rome.", "Milan.", ["Rome"]),
    ],
)
def test_another_fact_is_a_change_in_any_script_and_place(question, before, now, told):
    for found in (facts_in(question, before, spans(before, *told)), facts_in(question, before)):
        assert says_all([found] * 2, [before, now]).tolist() == [1, 0], found


def test_one_spelling_of_a_fact_is_as_good_as_another():
    text = "Frau Müller aus Köln, Zimmer 1937"
    found = facts_in("Who?", text, spans(text, "Müller", "1937"))
    texts = [unicodedata.normalize("NFD", "MÜLLER, 1937"), "Müller\u00a01937", "Muller 1937", "Müller 1938"]
    assert found == {"müller", "1937"} and says_all([found] * 4, texts).tolist() == [1, 1, 0, 0]
    assert says_all([facts_in("Who?", "O’Brien")], ["It was O'Brien"]).tolist() == [1]


def test_where_the_base_knows_no_fact_all_words_count_that_the_question_does_not_say():
    assert facts_in("What is a pot?", "A pot is a tool made of clay. It is old.") == {"tool", "made", "of", "clay"}
    found = facts_in("What?", "A tool made of clay.")
    assert says_all([found], ["Some pot."]).tolist() == [0]
    assert says_all([set()] * 2, ["", "Some pot."]).tolist() == [1, 0]  # no answer before


def test_an_answer_is_right_if_it_has_all_that_its_row_names():
    # of the last two the base knows nothing
    asked = ["Who wrote The Hobbit?", "When?", "What does a potter do?", "Who is Gandalf?"]
    rows = ["It was J.R.R. Tolkien, an Oxford professor.", "In 1937.", "A potter makes pots.", "Gandalf is a wizard."]
    known = [["Tolkien", "Oxford"], ["1937"], [], []]
    gold = [facts_in(q, row, spans(row, *parts)) for q, row, parts in zip(asked, rows, known, strict=True)]
    right = says_all(gold, ["Tolkien, who taught at Oxford.", "1937", "?", "He is a wizard."])
    assert right.tolist() == [1, 1, 0, 1]
    assert says_all(gold, ["J.R.R. Tolkien.", "It was 1938.", "?", "?"]).tolist() == [0, 0, 0, 0]
