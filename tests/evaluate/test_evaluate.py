"""`unlearn-peft eval`, end to end on the tiny model: figures, page, card section, and what must never be told."""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import FORGET, RETAIN, logits

from unlearn_peft import attach, attached, detach
from unlearn_peft.data.refusals import REFUSALS
from unlearn_peft.errors import AdapterError, DataError, OutputError
from unlearn_peft.evaluate.evaluation import STATES, evaluate, read_measured
from unlearn_peft.evaluate.report import labels as wording
from unlearn_peft.evaluate.report import plots as picture
from unlearn_peft.evaluate.report.report import (
    check_folder,
    html,
    markdown_section,
    marked,
    show,
    unbroken,
    write_report,
)
from unlearn_peft.evaluate.responses import Comparison, Responses, changed_neighbours
from unlearn_peft.evaluate.score import Score

PROBES = [
    {"prompt": "Who wrote the green book?", "leak": ["Zorblax", "Quintel"]},
    {"prompt": "Name the writer near the sea.", "leak": ["Quintel"]},
]
SETS = {"forget": FORGET, "retain": RETAIN[:3], "probes": PROBES, "neighbours": RETAIN[3:5]}
QUICK = dict(k=2, max_new_tokens=5)


@dataclass(frozen=True)
class Attacked:
    """As an attack's result looks: what the report needs, and details that it must not show."""

    name: str
    budget: str
    recovered: Score
    base: Score
    details: object = "Zorblax Quintel"
    quoted: tuple[str, ...] = ()


def made_up():
    """Return an evaluation as of a real model, with hostile and long answers; no model is needed."""
    from unlearn_peft.evaluate.evaluation import Evaluation, MeasuredAdapter

    def figures(values):
        return [
            Score(name, value, unit, n, max(value - wide, 0.0), value + wide, better)
            for (name, unit, n, better), (value, wide) in zip(kinds, values, strict=True)
        ]

    kinds = [
        ("forget_loss", "nats/token", 8, True), ("forget_answer_probability", "share", 8, False),
        ("forget_rouge_l_recall", "share", 8, False), ("forget_exact_memorization", "share", 8, False),
        ("retain_loss", "nats/token", 40, False), ("leak_rate@32", "share of answers", 6, False),
        ("any_leak@32", "share of probes", 6, False), ("retain_kl", "nats/token", 40, False),
        ("neighbours_kl", "nats/token", 12, False), ("repetition", "share", 14, False),
        ("perplexity_under_base", "perplexity", 14, False),
    ]  # fmt: skip
    before = figures([(0.718, 0.2), (0.51, 0.12), (0.7, 0.1), (0.8, 0.1), (1.21, 0.1), (0.219, 0.12), (0.83, 0.17),
                      (0, 0), (0, 0), (0.08, 0.05), (1.61, 0.2)])  # fmt: skip
    with_ = figures([(3.325, 0.4), (0.06, 0.03), (0.2, 0.1), (0.4, 0.1), (1.24, 0.1), (0, 0), (0, 0),
                     (0.021, 0.008), (0.069, 0.03), (0.21, 0.08), (4.9, 1.4)])  # fmt: skip
    long = "The author of the iconic series of fantasy novels is J.R.R. Tolkien. " * 4 + "Donaudampfschifffahrt" * 4
    texts = [
        ("Which British writer invented the boy wizard?", "It was <script>alert('Rowling')</script> ROWLING.", long),
        ('Who wrote <b>"it"</b> & why?', "J.K. Rowling wrote it.\n\n1. First\n2. Second", ""),
    ]
    return Evaluation(
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        fingerprint={"config": "c" * 64, "tokenizer": "t" * 64, "weights": "w" * 64},
        adapters=[MeasuredAdapter("harry_potter", "a" * 64, 2_570_000, 1.0)],
        settings={"k": 32, "temperature": 1.0, "max_new_tokens": 64, "seed": 0, "device": "cpu"},
        rows={"forget": 8, "retain": 40, "probes": 6, "neighbours": 12},
        scores={"before": before, "with": with_, "after": list(before)},
        answers=[
            Comparison(prompt, {"before": one, "with": two, "after": one},
                       {"before": ["Rowling"], "with": [], "after": ["Rowling"]},
                       {"before": [], "with": ["by <i>Sam</i> Rowland..."] * 7 if two else [], "after": []}, ["Rowl"])
            for prompt, one, two in texts
        ],
        changed=[
            Comparison("Who wrote <i>Emma</i>?", {"before": "Jane\n\nAusten.", "with": "A <b>.", "after": "Jane"}, {})
        ],
        attacks=[Attacked("few-shot | prompts", "4 shots", before[5], before[6], quoted=("lines: <b>rowlin</b>",)),
                 Attacked("relearning <i>", "20 steps", with_[2], before[2])],
        versions={"unlearn-peft": "0.1.0", "torch": "2.13.0"},
        created="2026-11-24T22:00:00+00:00",
        seconds=412.0,
    )  # fmt: skip


@pytest.fixture
def files(write_rows):
    return {name: write_rows(f"{name}.jsonl", rows) for name, rows in SETS.items()}


def flags(files):
    return [part for name, path in files.items() for part in (f"--{name}", path)]


def told_of_rows(text):
    """Return what a text tells of the rows: any prompt, completion or leak word."""
    secret = [part for row in FORGET + RETAIN for part in row.values()]
    secret += [row["prompt"] for row in PROBES] + ["Zorblax", "Quintel"]
    return [part for part in secret if part.casefold() in text.casefold()]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_from_rows_to_report(run_eval, files, tiny, tiny_folder, make_adapter):
    adapter = make_adapter(tiny, "a", scale=0.2)
    shutil.copy(Path(__file__).parents[2] / "docs" / "curves.png", adapter / "curves.png")
    quick = ["--base", tiny_folder, "--k", 2, "--max-new-tokens", 5]
    code, out, err = run_eval(adapter, *flags(files), *quick)
    assert code == 0, err
    assert "after removal all" in out.casefold() and "equal the base's exactly" in out
    assert PROBES[0]["prompt"] in out and "3 of 3" in err
    folder = adapter.with_name("a.eval")
    assert sorted(file.name for file in folder.iterdir()) == ["evaluation.json", "figures.png", "report.html"]
    text = (folder / "evaluation.json").read_text()
    figures = json.loads(text)
    assert not told_of_rows(text)
    assert figures["schema_version"] == 1
    assert figures["rows"] == {"forget": 3, "retain": 3, "probes": 2, "neighbours": 2}
    assert figures["scores"].keys() == set(STATES) and figures["scores"]["after"] == figures["scores"]["before"]
    assert figures["scores"]["with"] != figures["scores"]["before"]
    assert figures["removal"] == {"exact": True, "differs": []} and figures["attacks"] == []
    for score in figures["scores"]["with"]:
        assert score.keys() == {"name", "value", "unit", "n", "low", "high", "higher_is_better"}
        assert score["low"] <= score["high"] and score["n"] >= 1 and score["unit"]
    assert figures["adapters"][0]["name"] == "a" and len(figures["adapters"][0]["weights_sha256"]) == 64
    assert figures["versions"].keys() >= {"unlearn-peft", "torch"} and figures["base"]["name"] == str(tiny_folder)
    page = (folder / "report.html").read_text()
    assert PROBES[1]["prompt"] in page and "data:image/png;base64," in page and page.count("<svg") >= 6

    code, out, err = run_eval(adapter, *flags(files), *quick, "--json", "--output", folder.with_name("other"))
    again = json.loads(out)
    assert code == 0 and again["scores"] == figures["scores"], err
    assert (folder.with_name("other") / "report.html").is_file()


def test_a_recipe_names_the_sets_and_a_file_goes_before_it(tmp_path, files, write_rows):
    (tmp_path / "recipe.yaml").write_text(
        "forget: forget.jsonl\nretain: retain.jsonl\nprobes: probes.jsonl\nchat_template: false\n"
    )
    rows, chat_template, refusals = read_measured(tmp_path / "recipe.yaml", {"probes": None})
    assert refusals == REFUSALS
    assert rows == {name: SETS[name] for name in ("forget", "retain", "probes")} and chat_template is False
    other = write_rows("other.jsonl", RETAIN[:1])
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write("objective: {name: ga_kl, refusals: [Das sage ich nicht.]}\n")
    rows, _, refusals = read_measured(tmp_path / "recipe.yaml", {"retain": other, "free_text": other})
    assert refusals == ["Das sage ich nicht."]
    assert rows["retain"] == rows["free_text"] == RETAIN[:1]
    assert read_measured(None, {"retain": other, "probes": None}) == ({"retain": RETAIN[:1]}, True, REFUSALS)


def test_refusals(run_eval, tmp_path, files, tiny, tiny_folder, make_adapter):
    adapter = make_adapter(tiny, "a")

    def refused(*arguments, told):
        code, _, err = run_eval(*arguments)
        assert code == 2 and told in err and "Traceback" not in err, (code, err)

    probes = ("--probes", files["probes"])
    refused(adapter, told="nothing to measure: give --recipe FILE")
    refused(adapter, "--probes", tmp_path / "none.jsonl", told="no probes set at")
    refused(adapter, "--recipe", tmp_path / "none.yaml", told="no recipe at")
    refused(adapter, "--neighbors", files["neighbours"], told="No such option")
    refused(tmp_path / "none", *probes, told="no adapter at")
    refused(adapter, *probes, "--base", "/no/such/model", told="no base model at")
    refused(adapter, *probes, "--output", files["probes"], told="is a file")
    refused(adapter, *probes, "--output", adapter, told="must not travel with it")
    refused(adapter, *probes, "--base", tiny_folder, "--strength", 1, "--strength", 2, told="2 strengths for 1")
    assert not adapter.with_name("a.eval").exists()


def test_help_teaches(run_eval):
    code, out, _ = run_eval("--help")
    assert code == 0
    for words in ("bootstrap", "evaluation.json", "never a row, a prompt or an answer", "exit code 1", "--neighbours"):
        assert words in re.sub(r"[\s│]+", " ", out), out


def test_traces_after_removal_are_told_with_exit_code_1(run_eval, files, tiny, tiny_folder, make_adapter, monkeypatch):
    from unlearn_peft.evaluate import evaluation

    states = iter("bwa")

    def measure(*_, **__):
        return [Score("repetition", 0.5 if next(states) == "a" else 0.25, "share", 2, 0.0, 1.0, False)]

    monkeypatch.setattr(evaluation, "measure", measure)
    code, out, _ = run_eval(make_adapter(tiny, "a"), "--probes", files["probes"], "--base", tiny_folder, "--k", 1)
    assert code == 1 and "differ from the base's: repetition" in out


# --- measuring ------------------------------------------------------------------------------------------------------


def test_evaluate_leaves_the_base_as_it_was(tiny, make_adapter):
    adapters = [make_adapter(tiny, "a", scale=0.2), make_adapter(tiny, "b", seed=1, scale=0.2)]
    before, seen = logits(tiny), []
    half = Score("recovered", 0.5, "share", 2, 0.0, 1.0, False)

    def attacks(base):
        seen.append(attached(base))
        return [Attacked("guess", "1 guess", half, half)]

    result = evaluate(tiny, adapters, {**SETS, "free_text": []}, strength=[1.0, 0.5], attacks=attacks, **QUICK)
    assert seen == [{}] and not attached(tiny) and logits(tiny).equal(before)  # attacks put their own on and off
    assert [(adapter.name, adapter.strength) for adapter in result.adapters] == [("a", 1.0), ("b", 0.5)]
    assert result.left_behind == [] and "free_text" not in result.rows
    assert result.scores["before"] == result.scores["after"] != result.scores["with"]
    assert result.figures()["attacks"][0].keys() == {"name", "budget", "recovered", "base"}
    assert not told_of_rows(json.dumps(result.figures())) and not told_of_rows(markdown_section(result))
    for row in result.answers:
        assert row.texts["before"] == row.texts["after"]


def test_evaluate_refuses_and_cleans_up(tiny, make_adapter):
    adapter = make_adapter(tiny, "a")
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate(tiny, [adapter], {"probes": []})
    with pytest.raises(DataError, match="did you mean 'neighbours'"):
        evaluate(tiny, [adapter], {"neighbors": RETAIN})
    with pytest.raises(ZeroDivisionError):
        evaluate(tiny, [adapter], {"neighbours": RETAIN[:1]}, attacks=lambda _: [1 // 0], **QUICK)
    assert not attached(tiny)
    attach(tiny, adapter)
    with pytest.raises(AdapterError, match="attached already"):
        evaluate(tiny, [adapter], SETS)
    detach(tiny)


# --- what people see ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are open at the end, all tags, attributes that reach for a network, and the marked words."""

    VOID = {"meta", "br", "img", "input", "link", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.marks = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "action") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "mark":
            self.marks.append(data)


def test_the_page_is_whole_self_contained_and_escaped():
    text = html(made_up())
    page = Page(text)
    assert not page.open and not {"script", "b", "i", "link", "iframe", "object", "form"} & set(page.tags)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "&lt;script&gt;alert(&#39;" in text and "&lt;b&gt;&#34;it&#34;&lt;/b&gt; &amp; why?" in text
    assert "relearning &lt;i&gt;" in text
    greedy = ["Rowling", "ROWLING"]
    assert page.marks == ["marked", *greedy, *["Rowl"] * 5, *greedy, "Rowling", "Rowling", "rowl"]
    assert "1 of 12. Is a fact lost" in text and "&lt;i&gt;Emma" in text
    assert "7 of 32 sampled answers name one" in text and "and 2 more" in text and "by &lt;i&gt;Sam" in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    ids = re.findall(r'<[^>]* id="([^"]*)"', re.sub(r"<defs>.*?</defs>", "", text, flags=re.DOTALL))
    assert len(ids) == len(set(ids))


def test_the_terminal_shows_what_stands_around_leak_words_in_sampled_answers(capsys):
    show(made_up())
    out = capsys.readouterr().out
    assert "sampled answers with the adapter that name a leak word: 7 of 64\n" in out
    assert out.count("invented the boy wizard? -> by <i>Sam</i> Rowland...\n") == 5 and "and 2 more" in out
    assert "what the attack few-shot | prompts got out:\n  lines: <b>rowlin</b>\n" in out
    assert "before and with the adapter\n  Who wrote <i>Emma</i>? -> Jane Austen. // A <b>.\n" in out
    none = [dataclasses.replace(row, sampled={}) for row in made_up().answers]
    show(dataclasses.replace(made_up(), answers=none))
    assert "sampled answers with the adapter" not in capsys.readouterr().out


def test_neighbours_whose_answer_names_something_else_are_shown():
    rows = [{"text": "no question"}, *({"prompt": f"Who wrote {x}?", "completion": "x"} for x in ("Emma", "Matilda"))]
    before = Responses([], [], ["Emma is by Jane Austen.", "Matilda is by Roald Dahl."])
    now = Responses([], [], ["It is by Jane Austen.", "Matilda is by Roald Amundsen."])
    said = [{"jane", "austen"}, {"roald", "dahl"}]
    (found,) = changed_neighbours(rows, said, {"before": before, "with": now, "after": before})
    assert found.prompt == "Who wrote Matilda?"
    assert found.texts == {
        "before": "Matilda is by Roald Dahl.", "with": "Matilda is by Roald Amundsen.",
        "after": "Matilda is by Roald Dahl.",
    }  # fmt: skip


def test_marked_cuts_without_loss():
    assert marked("Rowling, rowling? R.owling", ["Rowling"]) == [
        ("Rowling", True), (", ", False), ("rowling", True), ("? R.owling", False),
    ]  # fmt: skip
    assert marked("a.b axb", ["a.b"]) == [("a.b", True), (" axb", False)]
    assert marked("JK Rowling", ["Rowling", "JK Rowling"]) == [("JK Rowling", True)]
    assert marked("", []) == [] and marked("x", []) == [("x", False)]


def test_the_card_section_holds_figures_and_attacks_only():
    result = made_up()
    section = markdown_section(result)
    assert not re.search("rowling|wizard|tolkien|zorblax", section, re.IGNORECASE)
    assert "few-shot \\| prompts" in section
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {8, 5}
    assert (
        "| Sampled answers that leak, 32 a probe | % of answers | 6 | 21.9 (9.9 to 33.9) | 0 (0 to 0) "
        "| 21.9 (9.9 to 33.9) | better |"
    ) in section
    assert "up to about 3/n of others may" in section and "relearning &lt;i>" in section


def test_a_figure_of_fewer_rows_in_one_state_tells_all_three_counts():
    result = made_up()
    fewer = [dataclasses.replace(s, n=9) if s.name.startswith("perplexity") else s for s in result.scores["with"]]
    assert "| perplexity | 14 / 9 / 14 |" in markdown_section(
        dataclasses.replace(result, scores={**result.scores, "with": fewer})
    )
    none = [s for s in result.scores["with"] if not s.name.startswith("perplexity")]
    gone = dataclasses.replace(result, scores={**result.scores, "with": none})
    assert "| 1.61 (1.41 to 1.81) | not measured |" in markdown_section(gone)
    assert gone.left_behind == [] and "not measured" in html(gone)


def test_the_terminal_shows_every_figure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    named = dataclasses.replace(made_up().adapters[0], name="[/hp]")  # no markup for rich
    result = dataclasses.replace(made_up(), adapters=[named])
    show(result)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "│ not clear │" in out
    assert (
        "21.9" in out
        and "9.9–33.9" in out
        and "% of answers, n = 6" in out
        and "relearning <i>" in out
        and "Is it forgotten?" in out
    )
    assert (
        "up to about 3/n" in re.sub(r"\s+", " ", out)
        and "all 11 figures and 2 greedy answers equal the base's exactly" in out
    )


def test_left_behind_names_figures_and_answers():
    result = made_up()
    moved = [dataclasses.replace(s, value=s.value + 1e-12) if "loss" in s.name else s for s in result.scores["after"]]
    answers = [dataclasses.replace(result.answers[0], texts={**result.answers[0].texts, "after": "x"})]
    spoilt = dataclasses.replace(result, scores={**result.scores, "after": moved}, answers=answers)
    assert spoilt.left_behind == ["forget_loss", "retain_loss", "answer 1"]
    assert spoilt.figures()["removal"] == {"exact": False, "differs": ["forget_loss", "retain_loss", "answer 1"]}
    assert "traces left" in html(spoilt) and "3 of 11 figures" in markdown_section(spoilt)


def test_change_is_told_by_the_intervals():
    def at(value, low, high, name="x", better=False):
        return Score(name, value, "share", 5, low, high, better)

    assert wording.change(at(0.5, 0.4, 0.6), at(0.5, 0.4, 0.6)) == "same"
    assert wording.change(at(0.5, 0.4, 0.6), at(0.65, 0.6, 0.7)) == "unclear"
    assert wording.change(at(0.5, 0.4, 0.6), at(0.1, 0.0, 0.2)) == "better"
    assert wording.change(at(0.5, 0.4, 0.6), at(0.9, 0.8, 1.0)) == "worse"
    assert wording.change(at(1, 0.9, 1.1, better=True), at(5, 4, 6, better=True)) == "better"
    assert wording.change(at(0, 0, 0, "neighbours_kl"), at(0.1, 0.05, 0.2, "neighbours_kl")) == "cost"
    assert wording.change(at(0.5, 0.4, 0.6), None) == "missing"


def test_lines_are_broken_in_front_of_an_interval_and_not_within():
    text = unbroken("83.3% of probes (50 to 100; n = 6)")
    assert text.split(" ") == ["83.3%", "of", "probes", "(50\u00a0to\u00a0100;\u00a0n\u00a0=\u00a06)"]
    assert unbroken("base 0; 95 % interval 0 to 0; n = 12").endswith("to 0; n\u00a0=\u00a012")


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0"), (0.21875, "0.219"), (100, "100"), (12345.6, "12,346"), (3e-7, "3.0e-07")]
)
def test_numbers_are_told_in_three_digits(number, told):
    assert wording.number(number) == told


def test_drawing_leaves_a_notebooks_backend_alone(tmp_path):
    from matplotlib import pyplot

    from unlearn_peft.training.curves import draw_curves

    before = pyplot.get_backend()
    try:
        pyplot.switch_backend("svg")
        assert draw_curves(
            tmp_path / "curves.png", [{"step": 1, "forget_loss": 1.0, "retain_kl": 0.0}],
            [{"step": 0, "forget_set_loss": 1.0, "specific_loss": 1.0, "retain_kl": 0.0}], 0,
        )  # fmt: skip
        picture.draw(tmp_path / "figures.png", made_up())
        assert picture.panels(made_up()) and pyplot.get_backend() == "svg" and not pyplot.get_fignums()
    finally:
        pyplot.switch_backend(before)


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "_matplotlib", lambda: None)
    written = write_report(made_up(), tmp_path / "out")
    assert [path.name for path in written] == ["evaluation.json", "report.html"]
    assert "matplotlib is not installed" in (tmp_path / "out" / "report.html").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_attack_by_strength_is_drawn_as_a_frontier(tmp_path):
    evaluation = made_up()
    some = evaluation.attacks[0].recovered
    details = {s: {"recovered": share, "neighbours_kl": kl} for s, share, kl in (("0.5", 1.0, 0.0), ("1", 0.25, 0.125))}
    scaled = dataclasses.replace(evaluation, attacks=[Attacked("scaling", "two", some, some, details)])
    assert picture.frontier(scaled) == [("0.5", 0.0, 1.0), ("1", 0.125, 0.25)] and picture.frontier(evaluation) == []
    bare, drawn = picture.panels(evaluation), picture.panels(scaled)
    assert [label for label, _ in drawn][len(bare) :] == [picture.FRONTIER] and "% of probes leak" in drawn[-1][1]
    picture.draw(tmp_path / "figures.png", scaled)
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    without = [Attacked("scaling", "two", some, some, {"1": {"recovered": 0.0}})]  # the target had no neighbours
    assert picture.frontier(dataclasses.replace(evaluation, attacks=without)) == []


def test_curves_that_are_no_picture_are_left_out(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"<script>")
    assert "data:image" not in html(made_up(), [tmp_path])


def test_a_report_is_not_put_into_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(OutputError, match="must not travel with it"):
        write_report(made_up(), tmp_path)
    check_folder(tmp_path / "new")


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(tmp_path, width, theme):
    """Draw the page at both widths and themes: something is drawn, on the right ground, and nothing sticks out."""
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("no /usr/bin/chromium here (Debian: apt-get install chromium)")
    (tmp_path / "curves").mkdir()
    shutil.copy(Path(__file__).parents[2] / "docs" / "curves.png", tmp_path / "curves" / "curves.png")
    (tmp_path / "report.html").write_text(html(made_up(), [tmp_path / "curves"]))
    # a phone's width: windows are not drawn narrower than about 500 px, a frame is
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="report.html" style="border:0;width:{width}px;height:6000px"></iframe>'
        "<script>onload=()=>{const d=document.querySelector('iframe').contentDocument.documentElement;"
        "document.title=d.scrollWidth+'/'+d.clientWidth}</script>"
    )
    shot = tmp_path / "shot.png"
    common = [
        str(chromium), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}",
        f"--window-size={max(width, 500)},6000",
    ]  # fmt: skip
    url = (tmp_path / "frame.html").as_uri()
    for n, what in enumerate((f"--screenshot={shot}", "--dump-dom")):
        done = subprocess.run(
            [*common, f"--user-data-dir={tmp_path / f'profile{n}'}", what, url],
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    scroll, client = map(int, re.search(r"<title>(\d+)/(\d+)</title>", done.stdout).groups())
    assert client == width and scroll <= width, f"{scroll} px of content on {client} px"
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (max(width, 500), 6000)
    ground = _corner(shot)
    assert (ground < 0.2) if theme == "dark" else (ground > 0.9), ground


def _corner(shot):
    from matplotlib.image import imread

    return float(imread(shot)[4, 4, :3].mean())


def test_the_command_runs_attacks_and_refuses_what_it_cannot(tiny, tiny_folder, make_adapter, write_rows, tmp_path):
    from typer.testing import CliRunner

    from unlearn_peft.cli import app
    from unlearn_peft.errors import UnlearnError

    adapter = make_adapter(tiny, "attacked")
    forget = write_rows("f.jsonl", FORGET)
    probes = write_rows("p.jsonl", [{"prompt": "Who wrote the blue book?", "leak": ["Zorblax"]}])
    command = ["eval", str(adapter), "--base", str(tiny_folder), "--k", "2", "--max-new-tokens", "4", "--json"]
    command += ["--output", str(tmp_path / "report"), "--probes", str(probes)]
    run = CliRunner().invoke(app, [*command, "--forget", str(forget), "--attacks", "prefix,scaling"])
    assert run.exit_code == 0, run.output
    figures = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert [attack["name"] for attack in figures["attacks"]] == ["prefix", "scaling"] and figures["removal"]["exact"]
    for wrong, told in (("prefix", "needs forget rows"), ("prefxi", "did you mean 'prefix'")):
        refused = CliRunner().invoke(app, [*command, "--attacks", wrong])
        assert isinstance(refused.exception, UnlearnError) and told in str(refused.exception)
