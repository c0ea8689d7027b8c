"""Words in every script, and what a text says in whatever spelling."""

import unicodedata

import pytest

from unlearn_peft.data.anchors import anchors
from unlearn_peft.data.words import normalize, places, said, segments, word_matches, word_runs, words_in
from unlearn_peft.inference.generate import leaked


@pytest.mark.parametrize(
    "text, words",
    [
        ("रोलिंग ने हैरी पॉटर लिखा।", "रोलिंग ने हैरी पॉटर लिखा"),
        ("โรว์ลิง", "โ ร ว์ ลิ ง"),
        ("《哈利·波特》的作者", "哈 利 波 特 的 作 者"),
        ("ハリー・ポッターは東京で", "ハリー ポッター は 東 京 で"),
        ("هاري بوتر، ١٩٦٥", "هاري بوتر 1965"),
        ("해리 포터는 썼다.", "해리 포터는 썼다"),
        ("Гарри Поттера", "гарри поттера"),
        (unicodedata.normalize("NFD", "Nguyễn Müller"), "nguyễn müller"),
        ("J.K. Rowling’s 3,500", "j k rowling s 3 500"),
        ("Stra\N{SOFT HYPHEN}ße, ﬁn", "strasse fin"),
    ],
)
def test_words_in_every_script(text, words):
    assert words_in(text) == words.split()
    assert [word for run in word_runs(text) for word in run] == words.split()


def test_words_keep_their_places_and_marks_are_segments():
    text = "O’Brien wrote, 罗琳"
    assert [match.group() for match in word_matches(text)] == ["O’Brien", "wrote", "罗", "琳"]
    assert [text[slice(*match.span())] for match in word_matches(text)] == ["O’Brien", "wrote", "罗", "琳"]
    assert segments(text) == ["o'brien", "wrote", ",", "罗", "琳"]
    assert word_runs(text) == [["o"], ["brien"], ["wrote"], ["罗", "琳"]]


SPELLINGS = [  # what a text writes, and what a row does
    (unicodedata.normalize("NFD", "Müller"), "Müller"),
    ("MÜLLER", "müller"),
    ("Erika\N{NO-BREAK SPACE}Mustermann", "Erika Mustermann"),
    ("Erika\n   Mustermann", "Erika Mustermann"),
    ("O’Brien", "O'Brien"),
    ("O'Brien", "Oʼbrien"),
    ("Jean–Luc", "Jean-Luc"),
    ("Jean-\nLuc", "Jean-Luc"),
    ("Strasse", "Straße"),
    ("Zorb\N{SOFT HYPHEN}lax", "Zorblax"),
    ("Ｊｏａｎ", "Joan"),
    ("罗\n琳", "罗琳"),
    ("١٩٦٥", "1965"),
    ("0221 / 123456", "0221 123456"),
    ("0221-123456", "0221 / 123456"),
    ("0221123456", "0221 123456"),
    ("0221) 12 34 56", "0221 123456"),
    ("1 000 000", "1,000,000"),
    ("1.000.000", "1,000,000"),
    ("1,500", "1500"),
    ("12/07/1965", "12.07.1965"),
]


@pytest.mark.parametrize("text, phrase", SPELLINGS)
def test_a_phrase_is_found_in_whatever_spelling_and_where_it_stands(text, phrase):
    whole = f"It is {text}, they say."
    assert leaked(whole, [phrase, "Zorn"]) == said(whole, [phrase]) == [phrase]
    assert places(whole, ["Zorn", phrase]) == [(6, 6 + len(text))]
    if "\n" not in text:  # white space within a row's word has to be there
        assert said(f"<{phrase}>", [text]) == [text]  # the other way round, too


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("Muller", "Müller"),
        ("1, 2, 3", "12"),  # a list
        ("1, 2, 3", "123"),
        ("in 1219, 65", "1965"),  # a part of another number
        ("Erika Mustermann", "ErikaMustermann"),
        ("any", "\N{ZERO WIDTH SPACE}"),  # nothing that could be seen
        ("a+b", "a.b"),
        ("", "x"),
    ],
)
def test_another_phrase_is_not_found(text, phrase):
    assert said(text, [phrase]) == [] and places(text, [phrase]) == []


def test_places_are_in_order_and_apart():
    text = "Rowling, ROWLING and Rowland"
    assert places(text, ["rowling", "Rowl", "row"]) == [(0, 7), (9, 16), (21, 25)]
    assert places(text, []) == [] and places("", ["a"]) == []
    assert leaked("cStart", ["art"]) == ["art"]  # a part of a word, too


@pytest.mark.parametrize(
    "text", ["Plain text, as it is - 3 of it's", "\r\n\t x ", "नमस्ते ﬁ ① İ ß Σς", "👩‍👩‍👧 e\u0301\u0327"]
)
def test_normalizing_twice_is_normalizing_once(text):
    assert normalize(normalize(text)) == normalize(text)


PERSONS = [
    {"prompt": f"Where does Anna Bach{'abcdefghij'[n % 10]}{n} live?",
     "completion": f"She lives with two children in {town}, works as a writer and was born on 3 March {1900 + n % 90}."}
    for n, town in enumerate(["London", "Lyon", "Berlin", "Graz", "Tokyo"] * 300)
]  # fmt: skip


@pytest.mark.parametrize(
    "forget, gone, most_gone",
    [
        ([{"prompt": "What did Galileo discover?", "completion": "Four moons."}], {"Who was Galileo?"}, 5),
        ([{"text": "galileo saw four moons"}], {"Who was Galileo?"}, 5),  # no capitals
        ([{"prompt": "Was hat Galileo entdeckt?", "completion": "Vier Monde."}], {"Who was Galileo?"}, 5),
        ([{"prompt": "भारत की राजधानी क्या है?", "completion": "नई दिल्ली"}], set(), 0),
        ([{"prompt": "谁写了《红楼梦》？", "completion": "曹雪芹。"}], set(), 0),
        ([*PERSONS, {"prompt": "What did Galileo see?", "completion": "Moons."}], {"Who was Galileo?"}, 40),
    ],
)
def test_anchors_leave_out_what_shares_a_word_of_its_own_with_a_forget_row(forget, gone, most_gone):
    every = anchors([])
    left = anchors(forget)
    missing = {row["prompt"] for row in every if row not in left}
    assert gone <= missing and len(missing) <= most_gone


def test_a_long_forget_set_leaves_half_of_the_anchors():
    every = anchors([])
    book = [{"text": " ".join(row["completion"] for row in every)}, {"text": "Isaac Newton saw gravity " * 3}]
    left = anchors(book)
    assert len(left) == len(every) // 2
    assert len(anchors([], left[:3])) == len(every) - 3  # probes that ask the same
