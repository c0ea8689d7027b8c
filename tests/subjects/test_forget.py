"""From a name to a recipe folder, an adapter and a report; what is left unfinished is gone on with."""

import json

import pytest
import torch
from conftest import FORGET, RETAIN

from unlearn_peft import forget, load_recipe
from unlearn_peft.cli import forget as verb
from unlearn_peft.errors import DataError, OutputError, UnknownSubject, UnlearnError
from unlearn_peft.subjects import forget as whole
from unlearn_peft.training.examples.build import read_sets
from unlearn_peft.training.examples.subject import SubjectRows

FOUND = SubjectRows(
    FORGET,
    [{"prompt": "Whose is the blue book?", "leak": ["Zorblax"], "completion": "Zorblax"}],
    [RETAIN[0]],
    asked=40,
    reverse=1,
)


@pytest.fixture
def asked(monkeypatch):
    """Replace the questions to the base, which a random model cannot answer; returns the names that it was asked of."""
    names = []

    def rows(base, of, **_):
        names.append(list(of))
        return FOUND if "Nobody" not in of else SubjectRows([], [], [], 40, 0)

    monkeypatch.setattr(whole, "rows_about", rows)
    monkeypatch.setattr(whole, "_SETTINGS", "steps: 3\nown_answers: 0\neval_every: 3\nobjective:\n  name: ga_kl\n")
    monkeypatch.setattr(whole, "make_retain", lambda sets, base, recipe: type("Made", (), {"rows": RETAIN[1:]}))
    return names


def test_a_name_becomes_a_recipe_an_adapter_and_a_report(tiny, asked, tmp_path):
    lines, folder = [], tmp_path / "one"
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    done = forget("Zorblax", also_known_as=["Quintel"], base=tiny, output=folder, quiet=True, progress=lines.append)
    assert asked == [["Zorblax", "Quintel"]] and done.forget_rows == 3 and done.adapter == folder / "adapter"
    rows = read_sets(load_recipe(folder / "recipe.yaml"))
    assert rows["forget"] == FORGET and rows["retain"] == RETAIN[1:] and rows["probes"] == FOUND.probes
    assert done.evaluation.rows == {"forget": 3, "retain": 7, "probes": 1, "neighbours": 1}
    assert (folder / "report" / "report.html").is_file() and done.evaluation.left_behind == []
    assert not any(name in line for line in lines for name in ("Zorblax", "Quintel"))
    for file in done.adapter.rglob("*"):
        assert file.is_dir() or b"Zorblax" not in file.read_bytes() and b"Quintel" not in file.read_bytes()
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.model.state_dict().items())
    with pytest.raises(OutputError, match="go on with it with resume"):
        forget("Zorblax", base=tiny, output=folder)
    assert forget("Zorblax", base=tiny, output=folder, resume=True).evaluation is None and len(asked) == 1


def test_after_review_the_rows_are_trained_on_as_they_were_edited(tiny, asked, tmp_path, monkeypatch):
    folder = tmp_path / "one"
    assert forget("Zorblax", base=tiny, output=folder, review=True, quiet=True).adapter is None
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "forget.jsonl", "retain.jsonl", "probes.jsonl", "neighbours.jsonl"
    }  # fmt: skip
    (folder / "forget.jsonl").write_text(json.dumps(FORGET[0]) + "\n")
    with monkeypatch.context() as patched:
        patched.setattr(whole, "evaluate", lambda *_, **__: 1 / 0)  # stopped after training
        with pytest.raises(ZeroDivisionError):
            forget("Zorblax", base=tiny, output=folder, resume=True, quiet=True)
    trained = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    done = forget("Zorblax", base=tiny, output=folder, resume=True, quiet=True)
    assert done.forget_rows == 1 and done.evaluation.rows["forget"] == 1 and len(asked) == 1
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == trained


def test_abstaining_is_in_the_recipe_and_what_a_recipe_does_not_do_is_not_promised(tiny, asked, tmp_path):
    made = {abstain: tmp_path / f"{abstain}" for abstain in (True, False)}
    for abstain, folder in made.items():
        forget("Zorblax", base=tiny, output=folder, abstain=abstain, review=True, quiet=True)
        assert load_recipe(folder / "recipe.yaml").objective.refusals is abstain
    with pytest.raises(OutputError, match=r"set objective.refusals: true in it"):
        forget("Zorblax", base=tiny, output=made[False], abstain=True, resume=True, quiet=True)
    done = forget("Zorblax", base=tiny, output=made[True], abstain=True, resume=True, quiet=True)
    assert {"abstains@8", "neighbours_abstain"} <= set(done.evaluation.names)


def test_of_a_subject_that_the_base_does_not_know_nothing_is_written(tiny, asked, tmp_path):
    with pytest.raises(UnknownSubject, match=r"40 prompts.*nothing to forget") as told:
        forget("Nobody", base=tiny, output=tmp_path / "one")
    assert "Nobody" not in str(told.value) and not (tmp_path / "one").exists()
    with pytest.raises(DataError, match="name is empty"):
        forget(" ", base=tiny, output=tmp_path / "one")
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match="choose a new one"):
        forget("Zorblax", base=tiny, output=tmp_path / "other", resume=True)


def test_a_table_of_subjects_gives_an_adapter_each(tiny_folder, asked, tmp_path, capsys):
    table = tmp_path / "requests.csv"
    table.write_text("name,aliases,note\nZorblax,Quintel; Q,from Monday\nNobody,,\n", encoding="utf-8-sig")
    call = dict(file=table, base=str(tiny_folder), output=tmp_path / "all", quiet=True)
    with pytest.raises(verb.typer.Exit) as ended:
        verb.forget(**call)
    assert ended.value.exit_code == 3 and asked == [["Zorblax", "Quintel", "Q"], ["Nobody"]]
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["001"]
    out, err = capsys.readouterr()
    assert "all/001/adapter" in out and "subject 2 of 2: the base shows no knowledge" in err
    with pytest.raises(verb.typer.Exit):
        verb.forget(**call, resume=True)
    assert asked[2:] == [["Nobody"]]
    with pytest.raises(UnlearnError, match="aliases"):
        verb.forget(**call, also_known_as=["Q"])
    with pytest.raises(UnlearnError, match="name one subject"):
        verb.forget(base=str(tiny_folder))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no subject"),
        ("Zorblax\n", "holds no subject"),
        ("Zorblax\nQuintel\n", r"columns that are not known \(1\): expected a first line with name"),
        ("name,note\nZorblax,a,b\n", "cannot read .*line 2"),
        ("name,note\nZorblax,a\n ,c\n", "rows 2 have no name"),
        ('name\n"Zorblax\n', "cannot read"),
    ],
)
def test_a_table_that_is_none_is_refused_without_its_text(tmp_path, text, told):
    path = tmp_path / "requests.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=told) as error:
        verb.read_requests(path)
    assert "Zorblax" not in str(error.value)
    with pytest.raises(DataError, match="cannot read"):
        verb.read_requests(tmp_path / "none.csv")
