"""`--suite full` and `--card`: the further figures, their words, and the section in an adapter's model card."""

import json

import pytest
from conftest import FORGET, RETAIN

from unlearn_peft import attached, forgetting, read_bundle
from unlearn_peft.adapters.card import put_evaluation
from unlearn_peft.errors import AdapterError, DataError
from unlearn_peft.evaluate.evaluation import evaluate, read_measured
from unlearn_peft.evaluate.metrics import consistency as meaning
from unlearn_peft.evaluate.metrics import memorization
from unlearn_peft.evaluate.metrics import truth_ratio as truth
from unlearn_peft.evaluate.report import labels as wording
from unlearn_peft.evaluate.score import Score
from unlearn_peft.evaluate.suites import Suite, check, full, tofu
from unlearn_peft.evaluate.suites import quick as quick_suite
from unlearn_peft.inference.generate import answers

ASKED = [{**row, "paraphrased": "By Zorblax.", "perturbed": ["By the sea.", "By a star."]} for row in FORGET]
HOLDOUT = [{"prompt": f"Who wrote book {n}?", "completion": f"It was star {n}."} for n in range(4)]
FULL = {"forget": ASKED, "retain": RETAIN[:2], "holdout": HOLDOUT}


# --- suites ---------------------------------------------------------------------------------------------------------


def test_full_has_what_its_rows_allow(tiny, make_adapter):
    result = evaluate(tiny, [make_adapter(tiny, "a", scale=0.3)], FULL, suite=Suite.FULL, max_new_tokens=4)
    quick = evaluate(tiny, [make_adapter(tiny, "b", scale=0.3)], {**FULL, "holdout": []}, max_new_tokens=4)
    further = [name for name in result.names if name not in quick.names]
    attacks = [f"membership_{name}" for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm")]
    assert further == [
        "forget_verbatim_memorization", "forget_knowledge_memorization", "retain_verbatim_memorization",
        "retain_knowledge_memorization", "forget_truth_ratio", *attacks, "privacy_leakage",
    ]  # fmt: skip
    assert result.left_behind == [] and not attached(tiny) and result.settings["suite"] == "full"
    assert result.rows == {"forget": 3, "retain": 2, "holdout": 4} and quick.settings["suite"] == "quick"
    now = {name: result.score(name, "before") for name in further}
    assert now["membership_loss"].n == 7 and now["forget_truth_ratio"].n == 3
    ratios = truth.forget_truth_ratio(truth.truth_ratio(*truth.truth_losses(tiny, ASKED)))
    assert now["forget_truth_ratio"].value == pytest.approx(ratios.mean())
    known = memorization.knowledge_memorization(tiny, RETAIN[:2]).mean()
    assert now["retain_knowledge_memorization"].value == pytest.approx(known)
    assert now["retain_knowledge_memorization"].higher_is_better
    assert not now["forget_verbatim_memorization"].higher_is_better
    assert any(result.score(name, "before") != result.score(name, "with") for name in attacks)


def test_what_has_no_rows_is_left_out(tiny):
    names = [score.name for score in full.measure(tiny, {"retain": [{"text": "It is a red book."}]})]
    assert names == []  # too short to be written on, and no question
    names = [score.name for score in full.measure(tiny, {"forget": FORGET[:1]})]
    assert names == ["forget_verbatim_memorization", "forget_knowledge_memorization"]


def test_unfit_rows_are_refused_before_anything_is_measured(tiny, make_adapter):
    for rows, told in (
        ({"holdout": HOLDOUT}, "name these too"),
        ({"forget": [ASKED[0], {**ASKED[1], "perturbed": ["one"]}]}, r"as many wrong answers.*\[1, 2\]"),
        ({"forget": [{**ASKED[0], "perturbed": "no list"}]}, "must be a text, 'perturbed' a list"),
        ({"forget": [{**ASKED[0], "perturbed": []}]}, r"found \[0\]"),
    ):
        with pytest.raises(DataError, match=told):
            evaluate(tiny, [make_adapter(tiny, "a")], rows, suite=Suite.FULL)
    with pytest.raises(DataError, match="choose --suite full"):
        check(Suite.QUICK, FULL)


TOFU = {
    name: [{**row, "perturbed": ["By the sea.", "By a star."]} for row in rows]
    for name, rows in (("forget", FORGET), *((part, RETAIN[:2]) for part in ("retain", "real_authors", "world_facts")))
}


def test_tofu_has_its_table_and_the_forget_quality_against_another_model(tiny, make_adapter, monkeypatch):
    twin = tofu.truth_ratios(tiny, TOFU["forget"])
    adapter = make_adapter(tiny, "a", scale=0.3)
    with monkeypatch.context() as patched:
        asked = []
        patched.setattr(tofu, "answers", lambda base, ps, **how: asked.extend(ps) or answers(base, ps, **how))
        result = evaluate(tiny, [adapter], TOFU, suite=Suite.TOFU, max_new_tokens=4, retrained=twin)
    assert asked and not {row["prompt"] for row in FORGET} & set(asked)  # the quick suite asked these
    names = [score.name for score in result.scores["with"]]
    assert len(set(names)) == len(names) and {"forget_answer_probability", "forget_rouge_l_recall"} < set(names)
    assert result.score("forget_quality", "before").value == 1  # the twin is the base itself
    table = {score.name: score for score in tofu.measure_tofu(tiny, TOFU).scores}
    assert result.score("model_utility", "before") == table["model_utility"]
    assert result.score("forget_truth_ratio", "with") != table["forget_truth_ratio"] and result.left_behind == []
    for name in (*table, "forget_quality", "neighbours_unchanged", "neighbours_right"):
        assert wording.label(name) != name.replace("_", " ") and wording.topic(name) in ("forgotten", "cost")
    with pytest.raises(DataError, match="missing: real_authors, world_facts"):
        evaluate(tiny, [adapter], FULL, suite=Suite.TOFU)
    with pytest.raises(DataError, match="retain set: 2 of 2 rows, row 1"):
        evaluate(tiny, [adapter], {**TOFU, "retain": RETAIN[:2]}, suite=Suite.TOFU)


def test_neighbours_answers_are_compared_with_the_bases_own(tiny, make_adapter, monkeypatch):
    named = {"prompt": "Who?", "completion": "It is the red Book of 1937."}
    asked = []

    def spans(base, pairs, chat_template):
        """The base knows one fact of the last row, and none of its own answers."""
        assert not attached(base) and chat_template
        asked.append([question for question, _ in pairs])
        return [
            [(answer.index("red"), len(answer) - 1)] if answer == named["completion"] else [] for _, answer in pairs
        ]

    monkeypatch.setattr(quick_suite, "fact_spans", spans)
    rows = {"neighbours": [*RETAIN[:2], {"text": "no question"}, named]}
    result = evaluate(tiny, [make_adapter(tiny, "a", scale=3)], rows)
    before, now = (result.score("neighbours_unchanged", state) for state in ("before", "with"))
    assert (before.value, before.n, now.n) == (1, 3, 3)
    known = result.score("neighbours_right", "with")
    assert (known.value, known.n) == (0, 3)
    prompts = [row["prompt"] for row in [*RETAIN[:2], named]]
    bare = answers(tiny, prompts, max_new_tokens=32)
    with forgetting(tiny, make_adapter(tiny, "b", scale=3)):
        said = answers(tiny, prompts, max_new_tokens=32)
    facts = [meaning.facts_in(*pair) for pair in zip(prompts, bare, strict=True)]
    assert said != bare and now.value == meaning.says_all(facts, said).mean()
    assert asked == [prompts]  # once, not in each state


def test_tofu_generates_as_many_tokens_as_open_unlearning(tiny, make_adapter, monkeypatch):
    """200, in configs/generation/default.yaml there; samples and answers to probes keep their own length."""
    lengths = {tofu: set(), quick_suite: set()}
    for module, seen in lengths.items():
        monkeypatch.setattr(
            module,
            "answers",
            lambda base, prompts, seen=seen, **how: seen.add(how["max_new_tokens"]) or [""] * len(prompts),
        )
    evaluate(tiny, [make_adapter(tiny, "a")], TOFU, suite=Suite.TOFU)
    assert lengths == {tofu: {200}, quick_suite: {200}}
    evaluate(tiny, [make_adapter(tiny, "b")], TOFU, suite=Suite.QUICK, max_new_tokens=7)
    assert lengths[quick_suite] == {200, 7}


def test_every_figure_of_the_full_suite_has_words():
    names = [f"{set_}_{kind}_memorization" for set_ in ("forget", "retain") for kind in ("verbatim", "knowledge")]
    names += ["forget_truth_ratio", "privacy_leakage", "membership_loss", "membership_zlib", "membership_min_k"]
    names += ["membership_min_k_plus_plus", "membership_gradient_norm", "membership_reference"]
    for name in names:
        assert wording.label(name) != name.replace("_", " ") and wording.topic(name) in wording.TOPICS
    assert wording.topic("membership_zlib") == wording.topic("privacy_leakage") == "privacy"


def test_membership_is_better_where_it_is_nearer_to_chance():
    def auc(name, value):
        return Score(name, value, "AUC", 9, value - 0.01, value + 0.01, False)

    for before, now, said in ((0.9, 0.6, "better"), (0.9, 0.2, "better"), (0.6, 0.2, "worse"), (0.6, 0.6, "same")):
        assert wording.change(auc("membership_loss", before), auc("membership_loss", now)) == said
    assert wording.change(auc("privacy_leakage", -80), auc("privacy_leakage", 20)) == "better"
    assert wording.change(auc("privacy_leakage", -20), auc("privacy_leakage", 80)) == "worse"


def test_a_retain_set_that_is_to_be_made_is_nothing_to_measure(tmp_path, write_rows):
    write_rows("forget.jsonl", FORGET)
    (tmp_path / "recipe.yaml").write_text("forget: forget.jsonl\nretain: auto\n")
    assert read_measured(tmp_path / "recipe.yaml", {})[0] == {"forget": FORGET}


def test_the_command_knows_the_suites(run_eval, tiny, tiny_folder, make_adapter, write_rows):
    adapter, forget = make_adapter(tiny, "a"), write_rows("f.jsonl", ASKED)
    common = (adapter, "--base", tiny_folder, "--forget", forget, "--max-new-tokens", 2)
    code, _, err = run_eval(*common, "--suite", "ful")
    assert code == 2 and "'quick'" in err and "'full'" in err
    code, _, err = run_eval(*common, "--holdout", write_rows("h.jsonl", HOLDOUT))
    assert code == 2 and "choose --suite full" in err
    code, out, err = run_eval(*common, "--holdout", write_rows("h.jsonl", HOLDOUT), "--suite", "full")
    assert code == 0 and "Can it be told that it was learned?" in out and "An AUC of 0.5 is chance" in out, err
    text = (adapter.with_name("a.eval") / "evaluation.json").read_text()
    assert json.loads(text)["settings"]["suite"] == "full" and "By the sea" not in text


# --- the model card -------------------------------------------------------------------------------------------------


def test_a_section_is_put_in_replaced_and_nothing_else_changes(tiny, make_adapter):
    adapter = make_adapter(tiny, "a")
    card = adapter / "README.md"
    card.write_text("---\ntags: [a]\n---\n\n# Mine\nWords.\n", encoding="utf-8")
    before = card.read_text()
    put_evaluation(adapter, "## Evaluation\n\nfirst — 1\n")
    once = card.read_text()
    assert once.startswith(before) and "first — 1" in once
    card.write_text(once + "\nbelow\n", encoding="utf-8")
    put_evaluation(adapter, "## Evaluation\n\nsecond \\1\n")
    twice = card.read_text()
    assert twice.startswith(before) and twice.endswith("\nbelow\n") and "second \\1" in twice and "first" not in twice
    assert twice.count("<!-- /evaluation -->") == 1 and not list(adapter.glob(".*partial"))
    card.unlink()
    assert put_evaluation(adapter, "## Evaluation") == card and card.read_text().startswith("<!-- evaluation")
    card.write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterError, match="no text in UTF-8"):
        put_evaluation(adapter, "## Evaluation")
    assert card.read_bytes() == b"\xff\xfe"


def test_the_card_travels_with_figures_only_and_the_adapter_stays_whole(
    run_eval, tiny, tiny_folder, fields, write_rows, tmp_path
):
    from unlearn_peft import attach, detach, unlearn

    adapter = unlearn(tiny, **{**fields, "steps": 2, "output": str(tmp_path / "zebra")}).path
    weights, manifest = read_bundle(adapter).digest, json.loads((adapter / "forget.json").read_text())
    old = (adapter / "README.md").read_text()
    probes = write_rows("p.jsonl", [{"prompt": "Who wrote the blue book?", "leak": ["Zorblax"]}])
    common = (adapter, "--base", tiny_folder, "--probes", probes, "--forget", write_rows("f.jsonl", FORGET), "--k", 2)
    common = (*common, "--max-new-tokens", 3)
    code, out, err = run_eval(*common)
    assert code == 0 and (adapter / "README.md").read_text() == old, err
    code, out, err = run_eval(*common, "--card", "--strength", 0.5)
    assert code == 0 and str(adapter / "README.md") in out, err
    new = (adapter / "README.md").read_text()
    body = old.rstrip().split("\n---\n")[1]  # the metadata in front gets the results
    section = new.partition(body)[2]
    assert body in new and "## Evaluation" in section and "at strength 0.5" in section
    assert weights[:12] in section and "Sampled answers that leak" in section
    assert not [word for word in ("Zorblax", "blue book", "Quintel") if word.casefold() in section.casefold()]
    assert adapter.name not in section  # a folder may be called after what was forgotten
    bundle = read_bundle(adapter)
    assert bundle.digest == weights and bundle.manifest["base"] == manifest["base"]
    noted, before = bundle.manifest.pop("files"), manifest.pop("files")
    assert bundle.manifest == manifest and {name for name in noted if noted[name] != before.get(name)} == {
        "README.md",
        "figures.png",
    }
    assert attach(tiny, adapter) and detach(tiny) is None
    code, out, err = run_eval(*common, "--card")
    assert code == 0 and (adapter / "README.md").read_text().count("## Evaluation") == 1, err
    code, _, err = run_eval(adapter, adapter, "--probes", probes, "--card")
    assert code == 2 and "--card is for a single adapter" in err
