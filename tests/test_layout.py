"""The package's shape: rooms on floors, imports downwards only and in no circle, short files, a quick --help."""

import subprocess
import sys
from pathlib import Path

import unlearn_peft

PACKAGE = Path(unlearn_peft.__file__).parent
sys.path.insert(0, str(PACKAGE.parent / "docs"))
import rooms  # noqa: E402


def upwards(graph):
    return {
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if rooms.room_of(module) != rooms.room_of(name)
        and rooms.FLOOR[rooms.room_of(module)] <= rooms.FLOOR[rooms.room_of(name)]
    }


def test_the_rooms_are_the_package():
    entries = [path.name for path in PACKAGE.iterdir()]
    assert {name.removesuffix(".py") for name in entries} - {"__init__", "__pycache__"} == set(rooms.FLOOR)
    assert len(entries) <= 14


def test_a_room_imports_only_rooms_on_lower_floors():
    """At a file's top, in functions and for types; so training, evaluate and serve never import each other."""
    assert upwards(rooms.imports()) == set()
    assert len(rooms.arrows()) <= 42


def test_no_circle_of_imports():
    assert rooms.circles(rooms.imports()) == []


def test_a_wrong_import_would_be_found():
    assert upwards({"serve.handler": {"training.run"}}) and upwards({"training.run": {"serve.handler", "data.rows"}})
    assert not upwards({"serve.handler": {"inference.bank", "serve.request", "errors"}})
    assert rooms.circles({"a.x": {"a.y"}, "a.y": {"a.z"}, "a.z": {"a.x"}, "b": {"a.x"}})
    assert not rooms.circles({"a.x": {"a.y"}, "a.y": {"a.z"}, "a.z": set(), "b": {"a.x"}})
    assert "training.step.runner" in rooms.imports()["training.trainer"], "relative imports are read"


def test_the_picture_and_the_table_are_those_of_the_imports():
    assert rooms.PICTURE.read_text() == rooms.picture(rooms.arrows()), "run python docs/rooms.py"
    text = rooms.PAGE.read_text()
    assert text == rooms.page(text), "run python docs/rooms.py"


def test_public_names_exist_and_are_listed():
    assert set(unlearn_peft.__all__) == set(unlearn_peft._PUBLIC)
    for name in unlearn_peft.__all__:
        assert getattr(unlearn_peft, name).__name__ == name


def test_files_are_short_and_recipes_too():
    assert not [f.name for f in PACKAGE.rglob("*.py") if len(f.read_text().splitlines()) > 350]
    for recipe in (PACKAGE.parent / "recipes").glob("*.yaml"):
        assert len(recipe.read_text().splitlines()) < 40


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "datasets")
    code = f"import sys, unlearn_peft.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
