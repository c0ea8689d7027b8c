"""The benchmarks of training run, on a tiny model; what they find there means nothing."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unlearn_peft import load_base, load_recipe
from unlearn_peft.training import trainer

FOLDER = Path(__file__).parent.parent / "benchmarks"
HEADS = ("original", "peft_head", "head")
LAYERS = ("full", "peft_lora", "lora", "top8")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_rows_are_64_tokens_and_come_once(benchmarks, smol, kind):
    from train_rows import ROWS, TOKENS, counts, data_sets

    found = data_sets(smol.tokenizer, kind, count=8)
    rows = [row for sets in found for row in (*sets.forget, *sets.retain)]
    assert len({tuple(row.ids) for row in rows}) == len(rows) == 8 * 2 * ROWS
    assert all(len(row.ids) == TOKENS and any(row.is_target) for row in rows)
    counted = counts(found[0], batch=4)
    assert counted["tokens"] == 512
    if kind == "text":
        assert counted["shared"] == 0 and counted["forget_targets"] == counted["retain_targets"] == 4 * 63
    else:
        assert counted["shared"] > 20  # the system prompt
        assert not rows[0].is_target[counted["shared"]]


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_all_sides_train_on_the_same_and_begin_alike(benchmarks, tiny_folder, kind, monkeypatch):
    import train_sides
    from train_sides import SIDES

    from unlearn_peft import load_base

    monkeypatch.setattr(train_sides, "RATE", 0.1)
    found = {}
    for side in (*HEADS, *LAYERS):
        step = SIDES[side](load_base(str(tiny_folder)), kind)
        found[side] = [step() for _ in range(3)]
    losses, kls = zip(*(steps[0] for steps in found.values()), strict=True)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    assert kls == pytest.approx([0] * len(kls), abs=1e-5)
    assert all(steps[2][1] > 1e-5 for steps in found.values())  # something was learned


@pytest.mark.long
def test_processes_take_turns(tiny_folder):
    found, printed = run("train.py", "head", "original", "--base", tiny_folder, "--steps", 2, "--json")
    assert found["head_speedup_vs_original"] > 0 and found["head_memory_vs_original"] > 0
    assert found["eight_top8_cost"] is None and "| head |" in printed


def test_floor_against_hand_counts(benchmarks):
    from floor import Shape, Step, parts, seconds

    shape = Shape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=2, inner=8, vocabulary=10, tied=True)
    assert shape.layer == 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8
    assert shape.parameters == 2 * (shape.layer + 8) + 4 + 40
    step = Step(tokens=16, width=4, forget_targets=3, retain_targets=2, shared=1)
    assert step.packed == 1 + 4 * 3
    forward, backward, bytes_read, adamw = parts("head", shape, step, r=1)
    assert forward.operations == 5 * (2 * 4 + 2 * 10)
    assert backward.operations == 5 * (4 * 10 + 2 * 4)
    assert bytes_read.bytes == 5 * 10 * 4 and adamw.bytes == 14 * 28
    rates = {"thin": 1.0, "head": 1.0, "layer": 1.0, "copy": 2.0}
    assert seconds([forward, bytes_read], rates) == forward.operations + 100
    assert sum(p.operations for p in parts("full", shape, step)) > sum(
        p.operations for p in parts("lora", shape, step, r=1)
    )


def test_section_is_written_between_the_markers(benchmarks, tmp_path):
    from performance import section, write

    doc = tmp_path / "page.md"
    doc.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    write(doc, section({}, "page.png"))
    text = doc.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "Llama-3.1-8B" in text and "Not measured yet." in text
    head = {"seconds": 0.0123, "peak_bytes": 4.5e9, "gpu": "a GPU"}
    found = {"TinyLlama-1.1B": {"head": head, "full": {"failed": 1}}}
    text = section({"large": {"machine": "some day", "found": found}}, "page.png")
    assert "on one a GPU (some day)" in text and "| TinyLlama-1.1B | head | 12.3 |" in text and "| 4.5 |" in text


@pytest.mark.slow
def test_larger_models_ways_run():
    found, _ = run("large.py", "--small", "--models", "TinyLlama-1.1B", "--rows", 16, "--steps", 1)
    assert all(one["seconds"] > 0 for one in found["TinyLlama-1.1B"].values()) and len(found["TinyLlama-1.1B"]) == 5


@pytest.mark.slow
def test_the_whole_page(tiny_folder, tmp_path):
    doc = tmp_path / "page.md"
    doc.write_text("<!-- measured --><!-- /measured -->")
    options = ["--small", "--base", tiny_folder, "--steps", 2, "--output", tmp_path / "kept", "--doc", doc]
    subprocess.run([sys.executable, FOLDER / "performance.py", *map(str, options)], check=True)
    assert "Not measured yet." not in doc.read_text() and (tmp_path / "page.png").is_file()


def run(script, *arguments):
    """Return a script's last line, read as JSON, and all that it printed."""
    command = [sys.executable, FOLDER / script, *map(str, arguments)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1]), printed


def test_the_subjects_are_whole(benchmarks):
    import subjects
    from languages import FOLDER as LANGUAGES

    from unlearn_peft.inference.generate import leaked

    chosen, confirmed = subjects.subjects("choose"), subjects.subjects("confirm")
    assert len(chosen) == 12 and len(confirmed) == 4
    for subject in (chosen | confirmed).values():
        assert len(subject["forget"]) == len(subject["neighbours"]) == 8 and len(subject["probes"]) >= 15
        assert len({row["kind"] for row in subject["probes"]}) == 6
        asked = {row["prompt"] for row in subject["forget"]}
        assert not asked & {row["prompt"] for row in (*subject["probes"], *subject["neighbours"])}
        # a question that says the word itself cannot measure whether the answer knows it
        assert not any(leaked(row["prompt"], row["leak"]) for row in subject["probes"])
    for path in LANGUAGES.glob("*.json"):
        language = json.loads(path.read_text())
        assert len(language["forget"]) == len(language["probes"]) == 6 and len(language["neutral"]) >= 10
        assert not any(leaked(row["prompt"], row["leak"]) for row in language["probes"]), path.name


@pytest.mark.long
def test_subjects_and_languages_run(benchmarks, tiny_folder, tmp_path, monkeypatch, capsys):
    import languages
    import subjects

    fast = ["--base", tiny_folder, "--set", "steps=1", "--set", "own_answers=0", "--set", "eval_every=1"]
    out = tmp_path / "out.jsonl"
    for main, arguments in ((subjects.main, ["--only", "darwin", "--samples", 1]), (languages.main, ["zh"])):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, [*arguments, *fast, "--output", out])])
        main()
    subject, language = map(json.loads, out.read_text().splitlines())
    for key in ("kinds_answered", "kinds_leaking"):
        subject[key] = Counter(subject[key])
    both = subjects.total([subject, subject])
    assert both["n_probes"] == 38 and both["neighbour_kl"] == pytest.approx(subject["neighbour_kl"])
    assert "| all |" in subjects.line(both)
    assert subject["n_probes"] == 19 and 0 <= subject["unchanged"] <= subject["n_neighbours"] == 8
    assert 0 < language["fact_tokens"] <= language["target_tokens"] and language["neutral_kl"] >= 0
    assert "| darwin |" in capsys.readouterr().out


@pytest.fixture
def comparison(benchmarks, tiny, tmp_path, monkeypatch):
    """benchmarks/open_unlearning.py on a tiny base, and a checkout whose training changes nothing."""
    import open_unlearning as both

    def train(command, **_):
        settings = json.loads(Path(command[-1]).read_text())
        assert {"question", "answer"} == set(json.loads(Path(settings["forget"]).read_text())[0])
        shutil.copytree(settings["model"], settings["output"])
        return SimpleNamespace(
            returncode=0, stdout='{"seconds": 1, "tflop": 0.1, "peak_gb": 1, "steps": 2}\n', stderr=""
        )

    (tmp_path / "src" / "trainer").mkdir(parents=True)
    monkeypatch.setattr(both.subprocess, "run", train)
    monkeypatch.setattr(both, "load_base", lambda name, dtype: tiny if name == "demo" else load_base(name))
    fast = ["steps=1", "own_answers=0", "eval_every=1", "retain_answers=0", "stand_in_answers=false"]
    monkeypatch.setattr(both, "load_recipe", lambda path, **more: load_recipe(path, fast, **more))
    return both


def test_ours_and_theirs_are_measured_alike(comparison, tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "out.jsonl", tmp_path / "docs" / "comparison.md"
    arguments = [tmp_path, "--methods", "NPO", "--rates", "1e-5", "--output", out]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    comparison.main()
    found = [json.loads(text) for text in out.read_text().splitlines()]
    assert [(one["way"], one.get("strength")) for one in found] == [
        *(("unlearn_peft", strength) for strength in comparison.STRENGTHS), ("NPO", None),
    ]  # fmt: skip
    assert (
        found[-1]["neighbour_kl"] == pytest.approx(0, abs=1e-6) and found[-1]["unchanged"] == found[-1]["n_neighbours"]
    )
    assert found[0]["neighbour_kl"] > 0 and found[0]["tflop"] > 0
    assert "| NPO, rate 1e-05, 2 steps |" in capsys.readouterr().out
    comparison.main()
    assert len(out.read_text().splitlines()) == len(found)  # what is kept is not made again
    page.parent.mkdir()
    page.write_text("a\n<!-- theirs -->\nold\n<!-- /theirs -->\nb\n")
    monkeypatch.setattr(comparison, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--page", "--output", str(out)])
    comparison.main()
    assert "| NPO, rate 1e-05, 2 steps |" in page.read_text() and "old" not in page.read_text()
    assert (page.parent / "open_unlearning.png").stat().st_size > 0


def test_the_cost_of_a_recipe_is_counted_by_phase(benchmarks, tiny_folder, tmp_path, monkeypatch, capsys):
    import cost
    from conftest import FORGET, RETAIN

    rows = {"forget": FORGET, "retain": RETAIN, "probes": [{**FORGET[0], "leak": ["x"]}], "neighbours": RETAIN}
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = {"base": str(tiny_folder), "steps": 2, "own_answers": 1, **{name: f"{name}.jsonl" for name in rows}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["cost.py", str(tmp_path / "recipe.yaml"), "--json", str(out)])
    cost.main()
    found = json.loads(out.read_text())
    assert set(found) == {"load", "facts", "compare", *cost.PHASES}
    for name in ("facts", "asking", "reference", "steps", "evaluations", "finish", "compare"):
        one = found[name]
        assert one["gflop"] > 0.999 * one["weights_gflop"] > 0 and one["layer_tokens"] > 0 and one["head_tokens"] > 0, (
            name
        )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| all |") and len(lines) == len(found) + 3
    assert "counted" not in trainer.Training.one_step.__qualname__


def test_a_folder_that_is_no_checkout_is_refused(comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "src")])
    with pytest.raises(SystemExit):
        comparison.main()
    assert "is no checkout of open-unlearning" in capsys.readouterr().err


def test_a_line_by_name_counts_the_questions_that_are_still_answered(benchmarks):
    from names import figures, line

    from unlearn_peft.evaluate.score import score
    from unlearn_peft.evaluate.suites.rwku import Answered

    answered = Answered([0, 1, 2], [3, 4], [0])

    def scores(first, others, near):
        values = {
            "rwku_forget_level_1_right": first, "rwku_forget_level_1_rouge_l_recall": [1.0],
            "rwku_forget_level_2_right": others, "rwku_neighbours_level_2_right": near, "rwku_leak@8": [0.5, 0.25],
            "rwku_known_leak@8": [0.5],
            "rwku_kind_cloze_right": first, "rwku_kind_reverse_query_right": others,
        }  # fmt: skip
        return [score(name, "share", False, values) for name, values in values.items()]

    before, after = scores([1.0], [1.0, 1.0], [1.0, 1.0]), scores([0.0], [1.0, 0.0], [1.0, 0.0])
    settings = {"base": "a/b.gguf", "abstain": True, "set": ["seed=1"]}
    one = {"subject": "001", "forget_rows": 9, **settings, **figures("before", before, answered)}
    assert one["before"] == {"forget": 3, "neighbours": 2, "leak@8": 0.375, "known_leak@8": 0.5}
    assert one["n"] == {"forget": 3, "known": 1, "neighbours": 2}
    measured = {"kl": {"neighbours": 0.01, "neutral": 0.002}, "minutes": {"asking": 1.0, "training": 2.0}}
    shown = line({**one, **figures("with", after, answered), **measured})
    for figure in (
        "| 001 | b, abstain, seed=1 | 9 | 3, 1 | 38%, 38% | 50%, 50% of 1 |",
        "reverse_query: 50% of 2",
        "| 2, 1 | 0.0100, 0.0020 | 1.0, 2.0 |",
    ):
        assert figure in shown


def test_an_edit_in_closed_form_moves_a_name_to_a_stranger(benchmarks, tiny, monkeypatch):
    import closed_form
    from conftest import FORGET, RETAIN

    from unlearn_peft.data.tokenize import tokenize

    name = "Zorblax"
    known = SimpleNamespace(rows=[SimpleNamespace(subject=name), SimpleNamespace(subject="")])
    kept = tokenize(RETAIN, tiny.tokenizer)
    weights = {key: value.clone() for key, value in tiny.model.state_dict().items()}

    def missing(deltas):
        """Of what lies between a name and strangers, the share that is left with the edit on."""
        with closed_form.Inputs(tiny.model, [0], "down_proj") as seen, torch.no_grad():
            jobs = closed_form.targets(tiny, FORGET, [name], seen, 0)
            lengths = []
            for on in (False, True):
                weight, (b, a) = seen.linear[0].weight, deltas[0]
                weight.data = weights["model.layers.0.mlp.down_proj.weight"] + on * (b @ a)
                apart = []
                for ids, places, wanted in jobs:
                    closed_form.run(tiny, ids)
                    apart.append(wanted - seen.states[0][places])
                lengths.append(float(torch.cat(apart).norm()))
            weight.data = weights["model.layers.0.mlp.down_proj.weight"]
        return lengths[1] / lengths[0]

    monkeypatch.setattr(closed_form, "_OVERSHOOT", 1.0)
    left = {}
    for retained in (1e-6, 1.0, 1e9):
        monkeypatch.setattr(closed_form, "_RETAINED", retained)
        left[retained] = missing(closed_form.edit(tiny, FORGET, known, kept, kept[:2], [0], rank=32))
    assert left[1e-6] < 0.1 and left[1e-6] < left[1.0] < left[1e9] and left[1e9] > 0.999
    after = tiny.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())


def test_a_name_is_changed_from_where_the_base_knows_the_rest(benchmarks, smol):
    from closed_form import tokens_that_tell

    with torch.no_grad():
        assert tokens_that_tell(smol, "Mahatma Gandhi") == 2
        assert tokens_that_tell(smol, "Star Wars") == 1  # "Star" may go on otherwise


def test_stand_ins_predict_fact_tokens_without_their_names(benchmarks, smol):
    from stand_in_targets import predictions

    from unlearn_peft.data.tokenize import tokenize

    rows = [{"prompt": "Who wrote Harry Potter?", "completion": "Harry Potter was written by J.K. Rowling."}]
    (found,) = predictions(smol, rows, SimpleNamespace(rows=[SimpleNamespace(subject="Harry Potter")])).values()
    (example,) = tokenize(rows, smol.tokenizer, max_length=None, closing=False)
    places = [place for place, target in enumerate(example.is_target) if target]
    targets = [example.ids[place] for place in places]
    assert found.shape[0] == len(targets) and torch.allclose(found.sum(-1), torch.ones(len(targets)), atol=1e-4)
    first = targets.index(smol.tokenizer(" J", add_special_tokens=False)["input_ids"][0])
    with torch.no_grad():
        of_base = smol.model(torch.tensor([example.ids])).logits[0].softmax(-1)[places[first] - 1, targets[first]]
    assert found[first, targets[first]] < of_base / 2


@pytest.mark.long
def test_the_ways_run_and_go_on(benchmarks, tiny_folder, tmp_path, monkeypatch, capsys):
    import ways

    few = {"steps": 2, "warmup_steps": 0}
    ways_here = {
        "plain": ways.Way(fields=few), "targets": ways.Way(fields=few, target="beside"),
        "closed": ways.Way(0.0, 0.5, ("down_proj",), {"steps": 1}, start=True),
        "closed, then": ways.Way(0.0, 0.5, ("down_proj",), few, start=True),
    }  # fmt: skip
    monkeypatch.setattr(ways, "WAYS", ways_here)
    monkeypatch.setattr(ways, "STRENGTHS", (1.0,))
    arguments = [
        "--only",
        "darwin",
        "--base",
        tiny_folder,
        "--output",
        tmp_path / "kept",
        "--picture",
        tmp_path / "p.png",
    ]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    ways.main()
    first = capsys.readouterr().out
    assert all(f"\n| {way} | 1 | " in first for way in ways_here) and (tmp_path / "p.png").stat().st_size
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), "--kept"])
    ways.main()
    assert capsys.readouterr().out == first
