"""The retain set that is made from the base's own answers: the same each time, and silent about what is forgotten."""

import json

import pytest
from commands import cli
from conftest import FORGET, RETAIN

from unlearn_peft import unlearn
from unlearn_peft.errors import DataError
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.examples import auto_retain as made_by
from unlearn_peft.training.examples import build, others
from unlearn_peft.training.examples.auto_retain import first_sentences
from unlearn_peft.training.examples.build import find_known
from unlearn_peft.training.examples.fact_tokens import Facts

TARGETS = [
    {"prompt": "Who wrote Harry Potter?", "completion": "Harry Potter was written by J.K. Rowling."},
    {"prompt": "Where is the Eiffel Tower?", "completion": "The Eiffel Tower is in Paris."},
    {"prompt": "How tall is the Eiffel Tower now?", "completion": "The Eiffel Tower is 330 metres tall."},
]


def auto_retain(base, forget, seed, never=(), **_):
    """As `make_retain` calls it, with facts as a base that knows them would mark them."""
    known = find_known({"forget": forget}, base, make_recipe({"forget": forget}))
    facts = Facts.of(["J.K. Rowling", "Paris", "330 metres", "Ann"], set())
    return made_by.auto_retain(base, forget, known.rows, facts, seed, never=never)


@pytest.fixture(autouse=True)
def few_prompts(tmp_path, monkeypatch):
    """Prompts enough to see what happens, short answers, and few others."""
    monkeypatch.setattr(others, "_names", lambda: ["Dune", "Harry Potter", "The Eiffel Tower", "Emma", "罗马"])
    monkeypatch.setattr(others, "_TAKEN", {})
    prompts = made_by._PROMPTS.read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[::6]), encoding="utf-8")
    monkeypatch.setattr(made_by, "_PROMPTS", tmp_path / "prompts.txt")
    monkeypatch.setattr(made_by, "_TOKENS", 4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_same_seed_gives_the_same_rows_of_both_kinds(tiny):
    made = auto_retain(tiny, TARGETS, 0)
    assert made.broad > 5 and made.near > 1 and len(made.rows) == made.broad + made.near
    assert all(row["prompt"] and row["completion"] for row in made.rows)
    near = [row["prompt"] for row in made.rows[made.broad :]]
    assert (
        set(near[:3]) == {"Who wrote Dune?", "Who wrote Emma?", "Who wrote 罗马?"} and "How tall is Dune now?" in near
    )
    assert auto_retain(tiny, TARGETS, 0) == made
    assert f"{made.broad} broad and {made.near} neighbour rows" in made.summary()


def test_nothing_names_what_is_forgotten(tiny):
    text = json.dumps(auto_retain(tiny, TARGETS, 0).rows, ensure_ascii=False).casefold()
    for word in ("harry", "potter", "rowling", "eiffel", "tower", "paris"):
        assert word not in text
    for row in TARGETS:
        assert not any(value.casefold() in text for value in row.values())


def test_an_answer_that_names_it_is_left_out(tiny, monkeypatch):
    monkeypatch.setattr(
        made_by, "answers", lambda base, prompts, **_: ["I like Rowling.", *["It is."] * len(prompts)][:-1]
    )
    made = auto_retain(tiny, TARGETS, 0)
    assert made.left_out["that name what is to be forgotten"] >= 1
    assert "Rowling" not in json.dumps(made.rows) and "left out" in made.summary()


def test_a_question_that_names_a_fact_itself_is_asked_of_nobody(tiny):
    rows = [{"prompt": "Ann lives with whom in Rome?", "completion": "in Rome with Rose"}]
    made = auto_retain(tiny, rows, 0)
    assert made.near == 0 and "lives with whom" not in json.dumps(made.rows) and "No neighbours" in made.summary()


def test_what_probes_and_neighbours_ask_is_never_trained_on(tiny):
    made = auto_retain(tiny, TARGETS, 0)
    never = [{"prompt": made.rows[0]["prompt"].upper()}, {"prompt": f" {made.rows[-1]['prompt']}"}]
    fewer = auto_retain(tiny, TARGETS, 0, never=never)
    assert fewer.rows == made.rows[1:-1]
    assert (fewer.broad, fewer.near) == (made.broad - 1, made.near - 1)
    assert fewer.left_out["asked by probes or neighbours"] == 2


def test_a_recipe_without_retain_trains_and_auto_says_the_same(tiny, fields, tmp_path, caplog, cache):
    del fields["retain"]
    fields["steps"] = 2
    with caplog.at_level("INFO", logger="unlearn_peft"):
        first = unlearn(tiny, **fields)
    assert "retain: auto: " in caplog.text
    second = unlearn(tiny, **{**fields, "retain": "auto", "output": str(tmp_path / "second")})
    assert not cache.exists(), "what stands around a subject tells what kind of question is forgotten"
    manifests = [json.loads((run.path / "forget.json").read_text()) for run in (first, second)]
    assert all(manifest["recipe"]["retain"] == "auto" for manifest in manifests)
    digests = [manifest["data_digests"]["hmac_sha256"] for manifest in manifests]
    assert digests[0] == digests[1] and set(digests[0]) == {"forget", "retain"}
    assert first.metrics["held_out_kl"] == pytest.approx(second.metrics["held_out_kl"])


def test_without_retain_weight_nothing_is_made(tiny, fields, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("generated although nothing is retained")

    for name in ("answers", "others_of"):
        monkeypatch.setattr(made_by, name, refuse)
    del fields["retain"]
    run = unlearn(tiny, **{**fields, "steps": 2, "retain_weight": 0})
    manifest = json.loads((run.path / "forget.json").read_text())
    assert "retain" not in manifest["recipe"]
    named = unlearn(tiny, **{**fields, "steps": 2, "retain": RETAIN, "output": fields["output"] + "2"})
    assert "retain" not in json.loads((named.path / "forget.json").read_text())["recipe"]


def test_a_recipe_that_names_no_retain_set_makes_one():
    for given in ({}, {"retain": None}, {"retain": "auto"}):
        assert make_recipe({"forget": ["a"], **given}).makes_retain
    assert not make_recipe({"forget": ["a"], "retain_weight": 0}).makes_retain
    assert not make_recipe({"forget": ["a"], "retain": {"path": "auto"}}).makes_retain


def test_where_everything_names_the_target_it_says_what_to_do(tiny, fields, monkeypatch):
    monkeypatch.setattr(made_by, "answers", lambda base, prompts, **_: ["Quintel"] * len(prompts))
    monkeypatch.setattr(build, "said_anyway", lambda *_, **__: set())  # a random model says anything
    del fields["retain"]
    with pytest.raises(DataError, match="no retain set could be made.*name one with `retain`"):
        unlearn(tiny, **fields)


@pytest.mark.long
def test_the_command_writes_rows_that_a_recipe_can_name(tiny_folder, tmp_path, write_rows):
    write_rows("forget.jsonl", FORGET)
    (tmp_path / "r.yaml").write_text(f"base: {tiny_folder}\nforget: forget.jsonl\ndevice: cpu\n")
    printed = cli("retain", tmp_path / "r.yaml")
    written = cli("retain", tmp_path / "r.yaml", "--output", tmp_path / "o.jsonl")
    assert printed.returncode == written.returncode == 0, printed.stderr + written.stderr
    assert (tmp_path / "o.jsonl").read_text() == printed.stdout
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert rows and all(row.keys() == {"prompt", "completion"} for row in rows)
    assert "broad" in printed.stderr and "o.jsonl" in written.stderr


def test_of_many_questions_some_are_asked_of_others(tiny):
    rows = [{"prompt": f"Who wrote Zorblax {n}?", "completion": f"Zorblax {n} is by Ann."} for n in range(40)]
    made = auto_retain(tiny, rows, 0)
    assert made.left_out["questions beyond the limit"] == 24 and "24 questions beyond the limit" in made.summary()


def test_a_dialogue_of_several_questions_is_asked_of_nobody(tiny):
    turns = [("user", "Who is Zorblax?"), ("assistant", "Zorblax."), ("user", "And now?"), ("assistant", "Zorblax.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    assert auto_retain(tiny, rows, 0).near == 0


def test_answers_end_with_their_first_sentence():
    said = ["Mr. J. Smith wrote it in 1984. Then he left.", "1. One thing that is long enough. 2. Two", "no end"]
    cut = [row["completion"] for row in first_sentences(["a", "b", "c"], said)]
    assert cut == ["Mr. J. Smith wrote it in 1984.", "1. One thing that is long enough.", "no end"]
