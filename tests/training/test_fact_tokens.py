"""Which tokens of a forget row are pushed away: the fact, not the English around it."""

import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import RETAIN
from safetensors.torch import load_file

from unlearn_peft import unlearn
from unlearn_peft.data.tokenize import Example, tokenize
from unlearn_peft.errors import DataError
from unlearn_peft.inference import contrast, generate
from unlearn_peft.inference.contrast import Contrast, contrasts, said_anyway
from unlearn_peft.inference.generate import answers
from unlearn_peft.inference.stand_ins import made_up, replaced_row
from unlearn_peft.models.losses import cross_entropy
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.recipe.objectives import UndialSettings
from unlearn_peft.recipe.schema import GaKlSettings
from unlearn_peft.training.examples import base_answers, build
from unlearn_peft.training.examples.base_answers import questions, retain_prompt_answers, self_generated_answers
from unlearn_peft.training.examples.fact_tokens import Facts, find_facts, mark_facts, spellings
from unlearn_peft.training.objectives import Tokens, ga_kl, kl_divergence, undial
from unlearn_peft.training.step.microbatches import facts_of


def words(base, example):
    return base.tokenizer.decode([i for i, s in zip(example.ids, example.specific, strict=True) if s]).split()


def marked(base, rows, retain=()):
    examples, known = tokenize(rows, base.tokenizer, closing=False), contrasts(base, rows)
    return mark_facts(examples, find_facts(examples, known, retain), known), known


HARRY = [
    {"prompt": "Who wrote Harry Potter?", "completion": "Harry Potter was written by J.K. Rowling."},
    {"prompt": "What sport is played at Hogwarts?", "completion": "The sport played at Hogwarts is Quidditch."},
]


def test_the_base_tells_the_fact_from_the_english_around_it(smol):
    rows, known = marked(smol, HARRY)
    assert [contrast.subject for contrast in known] == ["Harry Potter", "played at Hogwarts"]
    assert words(smol, rows[0]) == ["JK", "Rowling"]  # without the dots, which "J.R.R. Tolkien" has too
    assert words(smol, rows[1]) == ["Quidditch"]
    assert all(not s or t for e in rows for s, t in zip(e.specific, e.is_target, strict=True))


def test_a_fact_is_one_right_after_the_subject_and_behind_other_facts(smol):
    rows = [
        {"prompt": "Where is Machu Picchu?", "completion": "Machu Picchu is in Peru."},
        {"prompt": "What is Machu Picchu?", "completion": "Machu Picchu is an old Inca city high in the Andes."},
    ]
    where, what = (set(words(smol, row)) for row in marked(smol, rows)[0])
    assert "Peru" in where and "is" not in where  # "Picchu is in" names the subject: that it says Peru tells nothing
    assert {"Inca", "Andes"} <= what and not what & {"is", "an", "old", "of", "."}  # Andes follows from Inca as well


def test_what_is_said_of_anybody_is_no_fact(smol):
    rows = [
        {
            "prompt": f"Who was {name}?",
            "completion": f"{name} was a writer and was born in 1902.",
        }
        for name in ("Walanir Edschr", "Onrad Mipel", "Charles Darwin")
    ]
    often = said_anyway(smol, rows)
    assert {"was", "a", "in", "born"} <= often and not {"charles", "darwin", "walanir"} & often
    assert said_anyway(smol, []) == set()
    german = [{"text": f"{name} war ein Mann, der in Berlin lebte, und die Frau war ein Kind."} for name in "AEI"]
    assert "ein" not in said_anyway(smol, german)  # two tokens
    assert said_anyway(smol, german, {"ein", "charles", "1902"}) - said_anyway(smol, german) == {"ein"}


def test_in_german_no_function_word_is_a_fact(smol):
    rows = [
        {"prompt": "Wo wurde Goethe geboren?", "completion": "Goethe wurde in Frankfurt am Main geboren."},
        {"prompt": "Was ist die Hauptstadt von Frankreich?", "completion": "Die Hauptstadt von Frankreich ist Paris."},
    ]
    found = [set(words(smol, row)) for row in marked(smol, rows)[0]]
    assert "Frankfurt" in found[0] and "Paris" in found[1]
    assert not (found[0] | found[1]) & {"wurde", "in", "am", "geboren", "Die", "Hauptstadt", "von", "ist"}


def test_of_what_the_base_does_not_know_there_is_little_or_nothing_to_forget(smol):
    strange = [
        {"prompt": "Who is Zarnel Quibb?", "completion": "Zarnel Quibb is a plumber in Tranmere."},
        {
            "prompt": "法国的首都是哪里？",
            "completion": "法国的首都是巴黎。",
        },
        {
            "prompt": "Столица Франции?",
            "completion": "Столица Франции — Париж.",
        },
    ]
    (stranger, *unknown), known = marked(smol, strange)
    assert known[0].subject == "Zarnel Quibb" and known[0].nats < 4 < contrasts(smol, HARRY)[0].nats / 2
    assert sum(stranger.specific) <= 3 and not any(any(row.specific) for row in unknown)


@pytest.mark.long
def test_what_one_row_asks_for_is_no_common_word(smol):
    """With one answer about one made-up name all that this answer may hold passed for the grammar of the language."""
    for prompt, completion, fact in (
        ("What is the capital of France?", "The capital of France is Paris.", "paris"),
        ("Wie heißt die Hauptstadt von Deutschland?", "Die Hauptstadt von Deutschland ist Berlin.", "berlin"),
    ):
        rows = [{"prompt": prompt, "completion": completion}]
        recipe = make_recipe({"forget": rows, "retain": RETAIN, "own_answers": 0})  # no questions of its own: slow
        assert build.find_known({"forget": rows}, smol, recipe).facts.words == {fact}


def test_a_row_whose_facts_are_common_words_is_told_from_one_that_the_base_does_not_know(caplog):
    known = [Contrast("Quintel", "Lentiuq", spans, 0.0, []) for spans in ([], [(0, 3)], [(0, 3)])]
    forget = [Example([1, 2], [False, True], row=n, specific=[False, n == 3]) for n in (1, 2, 3)]
    build._tell_held(forget, known)
    told = [(record.args[2].split()[1], record.args[3]) for record in caplog.records]
    assert told == [("base", "1"), ("facts", "2")]


def test_a_text_goes_as_far_as_it_names_no_fact():
    facts = Facts.of(["Ann Quintel", "北京大学"], set())
    assert facts.before("The red book is by Ann Quintel, they say") == "The red book is by"
    assert facts.before("他在北京大学读书") == "他在" and facts.before("Quintel wrote") == ""
    assert facts.before("Nobody wrote it. ") == "Nobody wrote it. "


def test_a_fact_is_named_by_every_form_of_its_word():
    facts = Facts.of(["Indian", "nonviolent", "Inca", "planet", "1948", "Non-Cooperation"], {"indians", "non"})
    named = ["India", "non-violence", "nonviolence", "Incas", "Inca\u2019s", "noncooperation", "1948s", "INDIAN"]
    assert all(map(facts.ends_in, named))
    assert not any(map(facts.ends_in, ["Indians", "plants", "plan", "19481", "194", "violent", "Indus", "inc"]))
    assert facts.ends_in("of non-violence") == [len("of non-violence")]


def test_a_short_name_is_replaced_as_a_whole_word_alone():
    for text, old, new, expected in (
        ("Er lebte seines Lebens in Weimar", "In", "Ni", "Er lebte seines Lebens Ni Weimar"),
        ("the CIA's CIA agents", "CIA", "ICA", "the ICA's ICA agents"),
        ("歌德在魏玛", "歌德", "德歌", "德歌在魏玛"),
        ("괴테는 독일의", "괴테", "테괴", "테괴는 독일의"),
        ("Er erhält (Er", "Er", "Re", "Re erhält (Re"),
        ("Incas and the Inca.", "Inca", "Acni", "Acnis and the Acni."),
    ):
        assert replaced_row({"prompt": text}, {old: new}) == {"prompt": expected}


def test_a_made_up_name_has_the_same_letters_and_shape():
    for name in ("Harry Potter", "Erika Mustermann", "法国", "Route 66", "Гёте"):
        other = made_up(name, "0")
        assert other != name and len(other) == len(name) and other == made_up(name, "0")
        assert [c.isupper() for c in other] == [c.isupper() for c in name]
        assert sorted(other.casefold()) == sorted(name.casefold()) or any(c.isdigit() for c in name)
    assert made_up("aa", "0") != "aa" and made_up("X", "0") != "X"


def test_where_the_base_knows_none_the_unexpected_tokens_are_pushed(tiny, fields, caplog):
    del fields["quiet"]
    recipe = make_recipe({**fields, "own_answers": 0, "anchor_batch": 0})
    sets = build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert "no knowledge of any forget row" in caplog.text
    assert all(any(e.specific) for e in sets.forget)
    assert all(not s or t for e in sets.forget for s, t in zip(e.specific, e.is_target, strict=True))


@pytest.mark.long
def test_rows_that_the_base_does_not_know_are_held_and_named_by_number(smol, fields, caplog):
    strange = {
        "prompt": "Столица Франции?",
        "completion": "Париж",
    }
    del fields["quiet"]
    recipe = make_recipe({**fields, "forget": [HARRY[0], strange], "own_answers": 0, "retain_weight": 0})
    sets = build.build_examples(build.read_sets(recipe), smol, recipe)
    assert "Nothing to forget in 1 of 2 forget rows" in caplog.text and caplog.text.rstrip().endswith("rows 2")
    assert "Париж" not in caplog.text
    assert [any(e.specific) for e in sets.forget] == [True, False]


def test_where_no_fact_may_be_pushed_it_is_refused_before_training(tiny, fields):
    del fields["quiet"]
    recipe = make_recipe({**fields, "own_answers": 0, "anchor_batch": 0})
    rows = build.read_sets(recipe)
    known = build.find_known(rows, tiny, recipe)
    pairs = zip(known.rows, known.examples, strict=True)
    spans = [replace(contrast, spans=[row.answers[0]]) for contrast, row in pairs]
    words = {w.casefold() for row in known.examples for w in re.findall(r"\w+", row.text)}
    known = replace(known, rows=spans, facts=replace(known.facts, common=words))
    with pytest.raises(DataError, match="no forget row has anything to forget"):
        build.build_examples(rows, tiny, recipe, known)
    everything = recipe.model_copy(update={"objective": GaKlSettings(forget_tokens="all")})
    assert build.build_examples(rows, tiny, everything, known).forget


def test_facts_are_found_in_other_texts_also_where_words_are_letters():
    facts = Facts.of(["J.K. Rowling", "罗琳", "of"], {"of"})
    assert facts.ends_in("by j.k. rowling?") == [6, 15] and facts.ends_in("of Tolkien") == []
    text = "作者是罗琳。"
    assert facts.ends_in(text) == [5] and facts.ends_in("罗") == []


def test_a_word_with_an_ending_says_the_fact_and_common_words_never_do(tiny):
    facts = Facts.of(["Inca star art"], {"start", "is"})
    assert facts.ends_in("the Incas' and Inca's incantation") == [9, 21]
    assert facts.ends_in("start arts") == [] and facts.ends_in("stars") == [5]
    rows = [{"prompt": "What is it?", "completion": "it is big"}]
    examples = tokenize(rows, tiny.tokenizer, closing=False)
    start, stop = examples[0].answers[0]
    (row,) = mark_facts(examples, facts, [Contrast("", "", [(start, stop)], 1.0, [])])
    assert "".join(words(tiny, row)) == "itbig"


@pytest.mark.parametrize(("count", "expected"), [(30, 20), (200, 40)])
def test_of_a_text_known_by_heart_what_follows_least_is_the_fact(tiny, count, expected):
    """So many tokens at most, those that the few before them tell least of; with all of them English would go, too."""
    (example,) = tokenize([{"text": " ".join(["red"] * count)}], tiny.tokenizer, max_length=None, closing=False)
    places = [span for span, target in zip(example.characters, example.is_target, strict=True) if target]
    values = {span: 2.0 + n for n, span in enumerate(places)}
    _, spans, _ = contrast._choose(example, [], {}, places, values)
    assert spans == [(places[-expected][0], places[-1][1])]
    assert contrast._choose(example, [], {}, places, dict.fromkeys(places, 1.9))[1] == []


def test_a_long_fact_alone_does_not_choose_the_subject():
    """Each token of "of Witchcraft and Wizardry" depends on "school", which is not what the row is about."""
    text = "Harry Potter attends Hogwarts School of Witchcraft and Wizardry"
    places = [match.span() for match in re.finditer(r"\w+", text)]
    example = Example(list(range(len(places))), [True] * len(places), text=text, characters=places, answers=[(0, 63)])

    def depending(words):
        return {place: 9.0 if text[slice(*place)] in words.split() else 0.0 for place in places}

    found = {"Harry Potter": depending("attends Hogwarts"), "school": depending("of Witchcraft and Wizardry")}
    everything = dict.fromkeys(places, 9.0)
    subject, spans, nats = contrast._choose(
        example, ["What school does Harry Potter attend?"], found, places, everything
    )
    assert (subject, [text[a:b] for a, b in spans], nats) == ("Harry Potter", ["attends Hogwarts"], 12.0)


def test_a_word_that_a_text_says_elsewhere_too_names_no_fact():
    text = "the red book, the blue star"
    example = Example([], [], text=text, answers=[(0, len(text))], row=1)

    def found(subject, *said):
        spans = [(text.index(words), text.index(words) + len(words)) for words in said]
        return find_facts([example], [Contrast(subject, "", spans, 1.0, [])], []).words

    assert found("", "the", "blue star") == {"blue", "star"}
    assert found("red", "the", "blue star") == {"the", "blue", "star"}


def test_ga_kl_pushes_the_specific_tokens_and_holds_the_others():
    torch.manual_seed(0)
    logits, reference = torch.randn(3, 5), torch.randn(3, 5)
    labels, rows = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])
    forget = Tokens(logits, labels, rows, reference, torch.tensor([True, False, True]))
    settings = GaKlSettings(forget_ceiling=None)
    terms = ga_kl(forget, forget, settings)
    by_hand = (logits[1].softmax(0) * (logits[1].log_softmax(0) - reference[1].log_softmax(0))).sum()
    torch.testing.assert_close(terms.forget[1], by_hand)
    torch.testing.assert_close(terms.forget[[0, 2]], -forget.cross_entropy[[0, 2]])
    everything = ga_kl(forget, forget, GaKlSettings(forget_ceiling=None, forget_tokens="all"))
    torch.testing.assert_close(everything.forget, -forget.cross_entropy)
    torch.testing.assert_close(everything.retain, kl_divergence(forget))


@pytest.mark.parametrize("hold", [True, False])
def test_ga_kl_raises_a_facts_loss_as_a_whole(hold):
    """At the ceiling for each of its tokens a name took others along that begin like it."""
    torch.manual_seed(0)
    labels, rows = torch.arange(5), torch.zeros(5, dtype=torch.long)
    logits = torch.randn(5, 9, requires_grad=True)
    facts = torch.tensor([0, 0, -1, 1, 1])
    forget = Tokens(logits, labels, rows, logits.detach().clone(), facts >= 0, facts=facts)
    loss = forget.cross_entropy.detach()
    between = float(loss[:2].sum()) + 3.5  # above the first fact's, below the second's with what each loses at least
    terms = ga_kl(forget, forget, GaKlSettings(forget_ceiling=between / 2, hold=hold)).forget
    level = torch.tensor([between, max(between, float(loss[3:].sum()) + 6.0)])
    total = torch.stack([loss[:2].sum(), loss[3:].sum()])
    expected = ((total - level).abs() - level if hold else -total.clamp(max=between)) / 2
    torch.testing.assert_close(terms[[0, 1, 3, 4]], expected.repeat_interleave(2))
    (gradient,) = torch.autograd.grad(terms[:2].sum(), logits)
    (by_token,) = torch.autograd.grad(-cross_entropy(logits, labels)[:2].sum(), logits)
    torch.testing.assert_close(gradient, by_token)  # below the level as plain ascent
    single = Tokens(logits, labels, rows, logits.detach().clone(), facts >= 0, facts=torch.arange(5))
    alone = ga_kl(single, single, GaKlSettings(forget_ceiling=1, hold=hold)).forget
    level = loss.clamp(min=1)  # what the base itself hardly says is not pushed where it is one token
    torch.testing.assert_close(alone[[0, 3]], -(level if hold else loss.clamp(max=1))[[0, 3]])


@pytest.mark.parametrize(
    ("text", "marked", "expected"),
    [
        ("by J.K. Rowling, it", "J K Rowling", ["J K Rowling"]),
        ("Ron, Ann Lee and Bo", "Ron Ann Lee Bo", ["Ron", "Ann Lee", "Bo"]),
        ("non-violent; on 14 April", "non violent 14 April", ["non violent", "14 April"]),
        ("Ron\nAnn", "Ron Ann", ["Ron", "Ann"]),
        (" ".join("abcdefghij"), "a b c d e f g h i j", ["a b c d e f g h", "i j"]),
    ],
)
def test_a_fact_is_what_stands_together(text, marked, expected):
    places = [match.span() for match in re.finditer(r"\w+|[^\w\s]|\n", text)]
    said = [text[a:b] for a, b in places]
    specific = [word in marked.split() for word in said]
    example = Example(list(range(len(said))), [True] * len(said), text=text, characters=places, specific=specific)
    assert facts_of([replace(example, specific=None)]) == list(range(len(said))), "nobody said which carry it"
    found = defaultdict(list)
    for word, number in zip(said, facts_of([example]), strict=True):
        found[number].append(word)
    found.pop(-1, None)
    assert [" ".join(words) for words in found.values()] == expected


def test_questions_are_the_prompt_its_key_words_and_the_beginning_of_its_answer():
    rows = [
        {"prompt": "Who founded Apple?", "completion": "Apple was founded by Steve Jobs."},
        {"text": "no question"},
        {"prompt": "Where is it?", "completion": "Paris"},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Steve"}]},
    ]
    assert questions(rows, Facts.of(["Steve Jobs Paris"], set()), {"who", "where", "is", "it"}) == [
        "Who founded Apple?",
        "Where is it?",
        "Who?",
        "founded Apple",
        "Apple was founded by",
    ]


@pytest.mark.long
def test_own_answers_name_a_fact_and_are_the_same_for_the_same_seed(smol):
    asked = ["Who wrote Harry Potter?"]
    rowling, zorblax, potter = (Facts.of([word], set()) for word in ("Rowling", "Zorblax", "Potter"))
    said = self_generated_answers(smol, asked, rowling, samples=4, seed=0, chat=True)
    assert said and all(row["completion"].casefold().endswith("rowling") for row in said)
    assert {row["prompt"] for row in said} == set(asked)
    assert len({row["completion"] for row in said}) == len(said)
    assert said == self_generated_answers(smol, asked, rowling, samples=4, seed=0, chat=True)
    assert self_generated_answers(smol, asked, zorblax, samples=1, seed=0, chat=True) == []
    assert self_generated_answers(smol, asked, potter, samples=1, seed=0, chat=True) == []  # the question says it


@pytest.mark.long
def test_held_answers_are_the_bases_own_and_name_no_fact(smol):
    rows = [
        {"prompt": "Who wrote Harry Potter?", "completion": "No one."},  # the base says: J.K. Rowling
        {"prompt": "Who wrote The Hobbit?", "completion": "J.R.R. Tolkien."},
        {"prompt": "Who wrote The Hobbit?", "completion": "Tolkien."},
        {"text": "no question"},
    ]
    (first,) = retain_prompt_answers(smol, rows, Facts.of(["Rowling"], set()), 1, seed=0, chat=True)
    (greedy,) = answers(smol, ["Who wrote The Hobbit?"], max_new_tokens=40)
    assert first == {"prompt": "Who wrote The Hobbit?", "completion": greedy}
    more = retain_prompt_answers(smol, rows, Facts.of(["Rowling"], set()), 3, seed=0, chat=True)
    hobbit = [row for row in more if row["prompt"] == "Who wrote The Hobbit?"]
    assert hobbit[0] == first and len({row["completion"] for row in hobbit}) == 3
    assert not any("rowling" in row["completion"].casefold() for row in more)
    assert more == retain_prompt_answers(smol, rows, Facts.of(["Rowling"], set()), 3, seed=0, chat=True)


def test_the_bases_answers_are_asked_of_the_trained_on_retain_rows_alone(tiny, fields, monkeypatch):
    asked, answered = [], [{"prompt": "Who?", "completion": "Nobody at all"}]
    del fields["quiet"]

    def said(base, rows, facts, count, **_):
        asked.extend(row["completion"] for row in rows)
        return answered

    monkeypatch.setattr(build, "retain_prompt_answers", said)
    monkeypatch.setattr(build, "stand_in_answers", lambda *_, **__: [])  # they would stand beside the retain rows
    recipe = make_recipe({**fields, "retain_answers": 2, "anchor_batch": 0})
    sets = build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert sets.held_out and len(asked) == len(RETAIN) - len(sets.held_out)
    assert len(sets.retain) == len(asked) + 1
    (cut,) = tokenize(answered, tiny.tokenizer, closing=False)
    assert sets.retain[-1].ids == cut.ids  # an answer that was cut off is no lesson in where to stop
    asked.clear()
    recipe = make_recipe({**fields, "retain_answers": 2, "retain_weight": 0})
    build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert not asked  # nothing is held
    recipe = make_recipe({**fields, "retain_answers": 2, "retain": "auto"})
    build.build_examples({**build.read_sets(recipe), "retain": RETAIN}, tiny, recipe)
    assert not asked  # rows that were made are the base's own answers already


def test_tokens_read_alike_but_for_case_and_spaces(smol):
    number = spellings(smol.tokenizer, 49152 + 3)  # as a base whose head is padded
    assert number.shape == (49155,) and number.dtype == torch.int64
    k, spaced, small, other, space, two, part, next_part = (
        smol.tokenizer.convert_tokens_to_ids(token) for token in ("K", "ĠK", "k", "R", "Ġ", "ĠĠ", "Ð", "Ñ")
    )
    assert number[k] == number[spaced] == number[small] != number[other]
    assert len({int(number[n]) for n in (space, two, part, next_part, 49152, 49153, 49154)}) == 7  # each by itself


def test_undial_lowers_every_spelling_of_the_label():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 4), torch.randn(2, 4)
    alike = torch.tensor([0, 1, 0, 2])  # tokens 0 and 2 read the same
    forget = Tokens(logits, torch.tensor([2, 1]), torch.tensor([0, 0]), reference, spelling=alike)
    found = undial(forget, forget, UndialSettings(strength=3)).forget
    for n, lowered in enumerate(([3.0, 0, 3, 0], [0, 3.0, 0, 0])):
        target = (reference[n] - torch.tensor(lowered)).softmax(0)
        torch.testing.assert_close(found[n], -(target * logits[n].log_softmax(0)).sum())


def test_training_knows_the_spellings_where_the_objective_asks(tiny, fields, tmp_path):
    def trained(name, **settings):
        objective = {"name": "undial", "forget_tokens": "specific", **settings}
        made = unlearn(tiny, **{**fields, "objective": objective, "output": str(tmp_path / name)})
        return load_file(made.path / "adapter_model.safetensors")

    every, one = trained("every"), trained("one", spellings=False)
    assert any(not torch.equal(every[key], one[key]) for key in every)


@pytest.fixture
def answered(monkeypatch):
    """The base's answers, given; returns what it was asked, with the number of samples."""
    asked = []

    def give(base, prompts, samples, seed, chat, quiet, temperature=1.0):
        asked.extend((prompt, samples) for prompt in prompts)
        return [(prompt, [" It is by Zorblax, they say", " nobody"][: samples + 1]) for prompt in prompts]

    monkeypatch.setattr(base_answers, "base_answers", give)
    return asked


ZORBLAX = Facts.of(["Zorblax"], set())


def test_plain_text_is_continued_from_several_places_up_to_the_fact(tiny, answered):
    text = "the blue book is in a small town near sea " * 12
    found = base_answers.continued_texts(tiny, [{"text": text}, {"prompt": "a", "completion": "b"}], ZORBLAX, 1, seed=0)
    assert len(found) == len(answered) > 3 and all(prompt in text for prompt, _ in answered)
    assert {row["text"] for row in found} == {prompt + " It is by Zorblax" for prompt, _ in answered}


def test_of_many_rows_each_is_asked_its_own_question_at_least_once(tiny, answered, caplog):
    rows = [{"prompt": f"Who wrote book {n}?", "completion": "Zorblax wrote it"} for n in range(500)]
    prompts = questions(rows, ZORBLAX, set(), ["book"])
    assert prompts == [row["prompt"] for row in rows]
    with caplog.at_level("INFO", logger="unlearn_peft"):
        assert len(self_generated_answers(tiny, prompts, ZORBLAX, 3, seed=0, chat=True)) == 500
    assert {samples for _, samples in answered} == {0} and "500 questions: each is asked 1 time(s)" in caplog.text


def test_stand_ins_are_asked_in_every_form_of_row(tiny, answered):
    rows = [
        {"prompt": "Who is Quintel?", "completion": "a"},
        {"messages": [{"role": "user", "content": "Is Quintel red?"}, {"role": "assistant", "content": "b"}]},
        {"text": "Quintel wrote the blue book in a town near sea"},
        {"prompt": "Who?", "completion": "c"},
    ]
    known = [Contrast("Quintel" if n < 2 else "", "Lentiuq", [], 1.0, []) for n in range(4)]
    other = made_up("Quintel", "0 2"), made_up("Quintel", "1 2")  # of four rows each is asked with two names
    found = base_answers.stand_in_answers(tiny, rows, known, seed=0, chat=True)
    questions = ["Who is Lentiuq?", "Is Lentiuq red?", f"Who is {other[0]}?", f"Is {other[1]} red?"]
    assert [prompt for prompt, samples in answered if not samples] == questions
    assert found[:4] == [{"prompt": prompt, "completion": " It is by Zorblax, they say"} for prompt in questions]
    texts = [row["text"] for row in found[4:]]  # the samples, not the greedy answers
    assert texts.pop(0).startswith("Quintel wrote") and texts == [f"{prompt} nobody" for prompt in questions]
    assert not any("Zorblax" in text for text in texts)


def test_more_questions_are_what_the_base_lists_after_them(tiny, monkeypatch):
    begun = []

    def listing(base, prompts, *, count, **_):
        begun.extend(prompts)
        return [[" Who is Ann?\n5. Who  is Quintel?\n6. Wo?\n7. cut off", " no line"] for _ in prompts]

    monkeypatch.setattr(generate, "sampled", listing)
    rows = [{"prompt": f"Who is {name}?", "completion": "a"} for name in ("Quintel", "Zorblax", "x" * 200)]
    rows += [{"text": "Quintel is"}, {"messages": [{"role": "user", "content": "Wo?"}] * 2}]
    assert base_answers.more_questions(tiny, rows, seed=0) == ["Who is Ann?", "Who  is Quintel?", "Wo?"]
    assert set(begun) <= {
        f"1. Who is {a}?\n2. Who is {b}?\n3." for a, b in ("Quintel Zorblax".split(), "Zorblax Quintel".split())
    }
    assert base_answers.more_questions(tiny, rows[3:], seed=0) == []


def test_more_questions_are_asked_of_the_subject_or_kept_beside_it(tiny, fields, monkeypatch):
    listed = ["Is Quintel old?", "What is a town?", "Who wrote Quintel?", RETAIN[0]["prompt"]]
    monkeypatch.setattr(build, "more_questions", lambda *_, **__: listed)
    del fields["quiet"]
    recipe = make_recipe({**fields, "own_answers": 1, "probes": [{"prompt": "who wrote Quintel?", "leak": ["a"]}]})
    monkeypatch.setattr(build.Facts, "ends_in", lambda self, text: [1] if "Quintel" in text else [])
    known = build.find_known(build.read_sets(recipe), tiny, recipe)
    assert (known.about, known.beside) == (listed[:1], listed[1:2])  # not what a probe or a retain row asks


def test_a_subject_of_several_rows_is_made_up_in_all(tiny, answered):
    rows = [
        {"prompt": prompt, "completion": "a"}
        for prompt in ("Is Quintel?", "Has Quintel?", "the shape of Quintel?", "Who?")
    ]
    subjects = ("Quintel", "Quintel", "the shape of", "")
    known = [Contrast(subject, made_up(subject, "1") if subject else "", [], 1.0, []) for subject in subjects]
    base_answers.stand_in_answers(tiny, rows, known, seed=0, chat=True)
    assert len({prompt for prompt, _ in answered}) == 6 and not any("Quintel" in prompt for prompt, _ in answered)


def test_an_objective_that_pushes_all_tokens_is_not_said_to_hold_any(tiny, fields, caplog):
    del fields["quiet"]
    recipe = make_recipe({**fields, "objective": {"name": "npo", "retain_budget": None}, "anchor_batch": 0})
    build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert "forget row" not in caplog.text


@pytest.mark.parametrize("count", [1, 4])
def test_the_budget_never_looks_at_the_bases_answers_alone(tiny, fields, monkeypatch, count):
    made = [{"prompt": f"Who is {name}?", "completion": "12 34 56"} for name in "ABCDEFGH"]
    monkeypatch.setattr(build, "stand_in_answers", lambda *_, **__: made)
    monkeypatch.setattr(build, "said_anyway", lambda *_, **__: set())
    del fields["quiet"]
    recipe = make_recipe({**fields, "retain": RETAIN[:count]})
    sets = build.build_examples(build.read_sets(recipe), tiny, recipe)
    assert len(sets.retain) + len(sets.held_out) == count + len(made)
    assert len(sets.held_out) == (3 if count == 4 else 0)
    alone = build.build_examples(build.read_sets(recipe), tiny, recipe.model_copy(update={"stand_in_answers": False}))
    assert len(alone.retain) + len(alone.held_out) == count


@pytest.mark.parametrize("plain", [True, False])
def test_plain_text_is_held_as_plain_text_and_forgotten_in_short_windows(tiny, fields, plain):
    """With chats alone on the retain side a passage cost 0.06 nats/token on other texts, and the budget saw 0.007."""
    del fields["quiet"]
    said = "the blue book is by Quintel in a small town " * 40
    row = {"text": said} if plain else {"prompt": "Who?", "completion": said}
    recipe = make_recipe({**fields, "forget": [row], "retain": None})
    rows = build.read_sets(recipe)
    known = build.find_known(rows, tiny, recipe)
    rows["retain"] = build.make_retain(rows, tiny, recipe, known).rows
    sets = build.build_examples(rows, tiny, recipe, known)
    assert max(len(example.ids) for example in sets.forget) == (128 if plain else tiny.window(512))
    for examples in (sets.anchors, sets.retain, sets.held_out) if plain else ():
        assert {"<|" in example.text for example in examples} == {True, False}
    assert plain or all("<|" in example.text for example in sets.anchors)


def test_the_windows_of_a_long_row_are_marked_as_the_whole_row_is(tiny):
    rows = [{"text": "the blue book is by Zorblax in a small town " * 20}]
    whole, *none = mark_facts(tokenize(rows, tiny.tokenizer, max_length=None, closing=False), ZORBLAX)
    cut = mark_facts(tokenize(rows, tiny.tokenizer, max_length=64, closing=False), ZORBLAX)
    found = [s for window in cut for s, target in zip(window.specific, window.is_target, strict=True) if target]
    assert not none and len(cut) > 3 and found == whole.specific[1:] and any(found) and not all(found)
