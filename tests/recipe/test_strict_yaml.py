"""YAML that drops, hides or exhausts something is refused, with a line and without its words."""

import pytest

from unlearn_peft.errors import RecipeError
from unlearn_peft.files.strict_yaml import parse_yaml
from unlearn_peft.recipe.load import load_recipe

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: 1\nseed: 2\nsteps: 3", "line 3, column 1: 'steps' is given twice, first in line 1"),
        ("steps: 1\n'steps': 3", "line 2, column 1: 'steps' is given twice"),
        ("adapter:\n  r: 1\n  r: 2", "line 3, column 3: 'r' is given twice"),
        ("- {Zorblax: 1, Zorblax: 2}", "line 1, column 16: a key is given twice"),
        (BOMB, "this alias stands for too much"),
        ("a: &a [*a]", "this alias stands for too much"),
        ("a: &a {b: *a}", "this alias stands for too much"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 50)),
            "this alias stands for too much",
        ),
        ("[" * 10_000, "nested deeper than 32 levels"),
        ("{a: " * 10_000, "nested deeper than 32 levels"),
        ("- " * 10_000, "nested deeper than 32 levels"),
        ("a: !!python/object/apply:os.system [Zorblax]", "could not determine a constructor"),
        ("a: !Zorblax x", "could not determine a constructor"),
        ("a: *Zorblax", "undefined alias"),
        ("a: {b: 1}\nc:\n  <<: {b: 2}", "line 3, column 3: '<<' is not taken here"),
        ("a: !!bool Zorblax", "cannot be read"),
        ("a: !!int ''", "cannot be read"),
        ("a: 2001-99-99", "cannot be read"),
        ("? [a]\n: b", "unhashable key"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \0", "no text in UTF-8"),
        (b"a: \xff\xfe", "no text in UTF-8"),
        (b"#" * 17_000_000, "more than 16 MB"),
    ],
)
def test_what_is_refused(text, told):
    with pytest.raises(ValueError) as error:
        parse_yaml(text)
    assert told in str(error.value) and "Zorblax" not in str(error.value)


def test_what_is_read():
    assert parse_yaml("a: &x {b: [1, y]}\nc: *x\nd: *x") == {name: {"b": [1, "y"]} for name in "acd"}
    assert parse_yaml("\ufeffa: ü".encode()) == {"a": "ü"} and parse_yaml("a: ü".encode("utf-16")) == {"a": "ü"}
    assert parse_yaml("") is None


@pytest.mark.parametrize("data", [b"a: \xfc", b"", b"- x", b"x", b"forget: x\nforget: y", b"[" * 5000])
def test_a_recipe_of_any_bytes(tmp_path, data):
    (tmp_path / "r.yaml").write_bytes(data)
    with pytest.raises(RecipeError, match="r.yaml"):
        load_recipe(tmp_path / "r.yaml")
    for other in (tmp_path, tmp_path / "r.yaml" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(RecipeError, match="recipe"):
            load_recipe(other)
