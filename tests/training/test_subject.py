"""What a base knows of a subject of which only the name is known: repeated, its own, asked in both directions."""

import pytest

from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.inference.contrast import Contrast
from unlearn_peft.inference.stand_ins import made_up
from unlearn_peft.training.examples import subject
from unlearn_peft.training.examples.build import Known
from unlearn_peft.training.examples.fact_tokens import Facts
from unlearn_peft.training.examples.subject import rows_about

OWN = "Ann King wrote Zorblax in Quintel."


@pytest.fixture
def knowing(monkeypatch):
    """A base that knows of Ann King one book, and invents the rest; returns the answers by part of a prompt."""
    said = {
        "Ann King": [OWN, "Ann King wrote Zorblax.", "Ann King is an author.", "no"],
        "Zorblax": ["It was written by Ann King.", "By Ann King."],
        "Bob": ["Bob is an author of books in a town."],
    }

    def answered(base, prompts, *_, **__):
        for prompt in prompts:
            yield prompt, next((texts for part, texts in said.items() if part in prompt), ["nothing at all, sorry."])

    def known(base, rows, **options):
        examples = tokenize(rows, base.tokenizer, max_length=None, closing=False, **options)
        found = []
        for example in examples:
            spans = [(at, at + len(w)) for w in ("Zorblax", "Quintel", "author") if (at := example.text.rfind(w)) > 0]
            about = "Bob" if "Bob" in example.text else "Ann King"
            found.append(Contrast(about, "Nan Gink", spans, 9.0 if spans else 0.0, []))
        return found

    def asked(rows, base, recipe, **_):
        listed = ["What did Ann King do in a town?", "Is it red?"]
        contrasts = known(base, rows["forget"], chat_template=True)
        return Known(contrasts, Facts.of(["Zorblax"], set()), [], [], listed, [])

    monkeypatch.setattr(subject, "base_answers", answered)
    monkeypatch.setattr(subject, "contrasts", known)
    monkeypatch.setattr(subject, "find_known", asked)
    monkeypatch.setattr(subject, "others_of", lambda *_, **__: ["Bob"])
    return said


def test_facts_are_asked_for_in_both_directions(tiny, knowing):
    found = rows_about(tiny, ["Ann King"])
    prompts = [row["prompt"] for row in found.forget]
    assert any("Zorblax" in prompt and prompt.startswith("Who is known for") for prompt in prompts)
    assert found.reverse == sum("Zorblax" in prompt for prompt in prompts) > 0
    assert "Is it red?" not in prompts + [row["prompt"] for row in found.probes]  # it names no subject
    assert {tuple(row["leak"]) for row in found.probes} <= {("Zorblax", "Quintel"), ("Ann King",)}
    assert len(found.probes) == (len(found.forget) + len(found.probes)) // 4
    assert not {row["prompt"] for row in found.probes} & set(prompts)
    assert {row["completion"] for row in found.neighbours if "Bob" in row["prompt"]} == {
        "Bob is an author of books in a town."
    }
    alone = [row for row in found.neighbours if "Bob" not in row["prompt"]]
    assert alone and not any("Zorblax" in row["prompt"] or "King" in str(row) for row in alone)
    assert rows_about(tiny, ["Ann King"]) == found


def test_what_is_said_once_or_of_others_too_is_no_knowledge(tiny, knowing):
    knowing["Ann King"] = ["Ann King is an author."]  # so is Bob
    assert rows_about(tiny, ["Ann King"]).forget == []
    assert rows_about(tiny, ["Nobody"]).forget == []  # nothing is said of it that the base knows


def test_what_is_said_of_made_up_names_is_no_knowledge_either(tiny, knowing, monkeypatch):
    """Where no others of the kind of Stephen King are known, "his" was a fact of him."""
    monkeypatch.setattr(subject, "others_of", lambda *_, **__: [])
    strangers = [made_up("Ann King", str(n)) for n in range(3)]
    knowing |= {strangers[1]: ["She is an author, too."]}
    knowing["Ann King"] = ["Ann King wrote Zorblax as an author."] * 2

    def leaks():
        found = rows_about(tiny, ["Ann King"])
        assert found.probes and {row["completion"] for row in found.neighbours} <= {"nothing at all, sorry."}
        return {word for row in found.probes for word in row["leak"]} - {"Ann King"}  # asked back

    assert "author" not in " ".join(leaks()) and "Zorblax" in " ".join(leaks())
    knowing[strangers[1]] = ["nothing"]
    assert "author" in " ".join(leaks())


def test_signs_that_are_no_words_are_in_no_phrase():
    """A heart with its variation selector is a word as written and none when normalized: `forget` ended there."""
    phrases = dict(subject._phrases("She \u2764\ufe0f Zorblax \u02bc and Quintel"))
    assert () not in phrases and {("zorblax",), ("and", "quintel")} <= set(phrases)
