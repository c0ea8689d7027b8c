"""Others of a subject's kind, as a base takes them."""

import pytest
import torch

from unlearn_peft.training.examples import others
from unlearn_peft.training.examples.fact_tokens import Facts
from unlearn_peft.training.examples.others import others_of

NOTHING = Facts.of([], set())
KINDS = {
    "Perl": "Python JavaScript Java C++ Rust SQL Linux".split(),
    "Harry Potter": ["Star Trek", "Doctor Who", "Star Wars", "Spider-Man", "James Bond", "Batman", "Cinderella"],
    "Toronto": ["Mumbai", "Delhi", "Tokyo", "Chicago", "Sydney", "Los Angeles", "San Francisco", "London", "Berlin"],
}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(others, "_names", lambda: ["Zorblax", "Quib", "Ann", "Bob", "Emma"])
    monkeypatch.setattr(others, "_TAKEN", {})


def test_names_that_a_base_takes_alike_come_first(tiny, few):
    found = others_of(tiny, "Quib", NOTHING)
    assert found[0] == "Quib" and sorted(found) == sorted(others._names())
    assert others_of(tiny, "Quib", NOTHING, 2) == found[:2]
    assert "Quib" not in others_of(tiny, "Quib", Facts.of(["Quib"], set()))


def test_a_base_reads_the_names_once(tiny, few, monkeypatch):
    others_of(tiny, "Quib", NOTHING)
    read = []
    states = others._states
    monkeypatch.setattr(others, "_states", lambda base, names: read.extend(names) or states(base, names))
    assert others_of(tiny, "Ann", NOTHING)[0] == "Ann" and read == ["Ann"]


def test_neither_the_names_beside_it_nor_padding_change_how_one_is_taken(tiny):
    rows = ["Al", "a very long name of a place"]
    alone = torch.cat([others._states(tiny, [name]) for name in rows])
    assert torch.allclose(others._states(tiny, rows), alone, atol=1e-5)


def test_the_file_holds_each_name_once():
    names = others._names()
    assert len(names) == len({name.casefold() for name in names}) and all(name == name.strip() for name in names)


@pytest.mark.long
@pytest.mark.parametrize("base", ["smol", "gemma"])
def test_real_bases_find_others_of_many_kinds(base, request):
    live = request.getfixturevalue(base)
    for subject, kind in KINDS.items():
        assert len(set(kind).intersection(others_of(live, subject, Facts.of([subject], set())))) >= 3, subject
