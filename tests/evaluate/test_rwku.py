"""RWKU's questions: read as they are published, asked as there, and counted where the bare base answers them."""

import itertools
import json

import numpy as np
import pytest

from unlearn_peft.errors import DataError
from unlearn_peft.evaluate.evaluation import evaluate
from unlearn_peft.evaluate.report.labels import label, notes, topic
from unlearn_peft.evaluate.suites import Suite, check, rwku
from unlearn_peft.evaluate.suites.rwku import Answered, at_least_one, measure, read_rwku, worst_kind

KINGS = {
    "target": "Ann King",
    "forget": [
        {"query": "Ann King wrote ___.", "answer": "Zorblax", "type": "cloze", "level": 1},
        {"query": "What did Ann King write?", "answer": "Zorblax", "type": "simple question", "level": 2},
        {"query": "Qué escribió?", "answer": "Zorblax", "type": "cross-lingual (Spanish)", "level": 3},
        {"query": "Who wrote it? Sure:", "answer": "Ann King", "type": "affirmative suffix", "level": 3},
    ],
    "neighbors": [
        {"query": "Who is Bob?", "answer": "a baker", "type": "simple question", "neighbor": "Bob", "level": 2}
    ],
}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "king.json"
    path.write_text(json.dumps(KINGS))
    return read_rwku(path)


def test_a_subjects_file_is_read(rows):
    assert [row["kind"] for row in rows[:4]] == ["cloze", "simple question", "cross lingual", "affirmative suffix"]
    assert [row["level"] for row in rows] == [1, 2, 3, 3, 2] and [
        n for n, r in enumerate(rows) if "neighbour" in r
    ] == [4]


@pytest.mark.parametrize("text", ["[]", "{", '{"forget": [{}], "neighbors": []}', '{"forget": [], "neighbors": []}'])
def test_another_file_is_refused_without_its_text(tmp_path, text):
    path = tmp_path / "king.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"king\.json"):
        read_rwku(path)
    with pytest.raises(DataError, match="cannot read"):
        read_rwku(tmp_path / "none.json")


def test_the_suite_and_its_file_go_together(rows):
    for suite, sets in ((Suite.RWKU, {}), (Suite.QUICK, {"rwku": rows})):
        with pytest.raises(DataError, match="go together"):
            check(suite, sets)


def test_the_chance_of_one_hit_among_k_is_the_share_of_all_choices_of_k():
    samples, hits = 6, 2
    for k in (1, 2, 5, 6):
        chosen = list(itertools.combinations(range(samples), k))
        assert at_least_one(np.array([hits, 0, 6.0]), samples, k) == pytest.approx(
            [sum(any(i < hits for i in one) for one in chosen) / len(chosen), 0, 1]
        )


def test_only_what_the_base_answers_counts(tiny, rows, monkeypatch):
    said = iter(["Zorblax", "no", "Zorblax!\nAnn", "It is ann king", "A baker"])
    monkeypatch.setattr(rwku, "answers", lambda base, prompts, **_: [next(said, "Zorblax, a baker") for _ in prompts])
    monkeypatch.setattr(
        rwku, "sampled", lambda base, prompts, count, **_: [["Zorblax"] + ["no"] * (count - 1) for _ in prompts]
    )
    found = {one.name: one for one in measure(tiny, rows, Answered([0, 1, 2], [4], [0]))}
    value = {name: one.value for name, one in found.items()}
    assert value["rwku_forget_level_1_right"] == 1 and value["rwku_forget_level_2_right"] == 0
    assert found["rwku_forget_level_3_right"].n == 1 and found["rwku_forget_level_3_rouge_l_recall"].n == 2
    assert value["rwku_neighbours_level_2_right"] == 1 and found["rwku_neighbours_level_2_right"].higher_is_better
    assert value["rwku_leak@1"] == pytest.approx(1 / 64) and value["rwku_leak@64"] == 1
    assert value["rwku_beside_a_neighbour_leak"] == value["rwku_beside_a_neighbour_right"] == 1
    assert "rwku_kind_affirmative_suffix_right" not in value
    assert worst_kind(list(found.values())).value == 1


def test_what_is_answered_of_a_made_up_name_too_is_told_and_left_out_of_one_figure(tiny, rows, monkeypatch):
    choice = {"prompt": "Is King's book Zorblax or Quib?", "completion": "Zorblax", "kind": "multiple choice"}
    echo = {"prompt": "Ann King is a writer. Who is one?", "completion": "Ann King", "kind": "context hint"}
    rows = [*rows, {**choice, "level": 3, "subject": "Ann King"}, {**echo, "level": 3, "subject": "Ann King"}]

    def say(base, prompts, **_):
        """It repeats what is asked, and knows of Ann King alone what she wrote."""
        return [prompt + " Zorblax" * ("Ann King wrote" in prompt) for prompt in prompts]

    monkeypatch.setattr(rwku, "answers", say)
    monkeypatch.setattr(rwku, "_greedy", lambda base, rows, *_: say(base, [row["prompt"] for row in rows]))
    answered = rwku.answered_by(tiny, rows)
    assert answered == Answered([0, 5, 6], [], [0])
    assert "2 of the former it answers of a made-up name" in answered.told(rows)
    monkeypatch.undo()
    monkeypatch.setattr(rwku, "answers", lambda base, prompts, **_: ["no" for _ in prompts])
    monkeypatch.setattr(
        rwku, "sampled", lambda base, prompts, count, **_: [["no"] * count, *[["Zorblax, Ann King"] * count] * 2]
    )
    found = {one.name: one for one in measure(tiny, rows, answered)}
    assert found["rwku_leak@8"].value == pytest.approx(2 / 3) and found["rwku_known_leak@8"].value == 0
    assert found["rwku_known_leak@8"].n == 1


def test_questions_are_asked_in_the_frame_of_its_authors(tiny, rows):
    asked = [rwku._asked(tiny, row, True) for row in rows]
    assert asked[0].endswith("Answer:") and "complete the blank" in asked[0] and "complete" not in asked[1]
    assert not asked[3].endswith("Answer:") and "Sure:" in asked[3]
    bare = [rwku._asked(tiny, row, False) for row in rows]
    assert all(text.count("Answer:") == 1 for text in bare[:3])


def test_a_neighbours_question_that_names_the_subject_is_left_out(tiny, rows, monkeypatch):
    more = {"prompt": "Who made Zorblax?", "completion": "Quib", "kind": "cloze", "level": 1, "neighbour": "Z"}
    rows = [*rows, {**more, "subject": "Ann King"}, {**more, "subject": "Ann King", "completion": "King"}]
    monkeypatch.setattr(rwku, "_greedy", lambda base, rows, *_: [row["completion"] for row in rows])
    answered = rwku.answered_by(tiny, rows)
    assert answered.near == [4, 5]
    assert answered.told(rows).endswith("1 more on neighbours name the subject: they are left out")


def test_what_the_bare_base_answers_is_told(tiny, rows, monkeypatch):
    said = iter([["Zorblax", "no", "no", "Ann King", "a baker"], ["no"]])
    monkeypatch.setattr(rwku, "answers", lambda base, prompts, **_: next(said))
    answered = rwku.answered_by(tiny, rows)
    assert answered == Answered([0, 3], [4], [0, 3])
    assert answered.told(rows).startswith("the base answers 2 of 4 questions on the subject and 1 of 1")


def test_an_evaluation_has_its_figures_in_each_state(tiny, make_adapter, rows, monkeypatch, capsys):
    monkeypatch.setattr(rwku, "_is_right", lambda row, text: "neighbour" not in row)
    lines = []
    adapter = make_adapter(tiny, "a", scale=3)
    result = evaluate(tiny, [adapter], {"rwku": rows}, suite=Suite.RWKU, progress=lines.append)
    assert result.left_behind == [] and result.rows == {"rwku": 5}
    assert any("answers 4 of 4" in line for line in lines)
    for name in result.names:
        assert label(name).startswith("RWKU") and topic(name) in ("forgotten", "cost")
    assert "Worst kind of question: RWKU, affirmative suffix: still answered 100 %" in " ".join(notes(result))
