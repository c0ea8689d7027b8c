"""The package's shape: imports go downwards only, in no circle; names are what they say, --help is quick to import."""

import subprocess
import sys
from pathlib import Path

import unlearn_peft

PACKAGE = Path(unlearn_peft.__file__).parent
sys.path.insert(0, str(PACKAGE.parent / "docs"))
import rooms  # noqa: E402


def test_a_room_imports_only_rooms_below_it():
    here = set(rooms.FLOOR)
    upwards = {
        f"{module} imports {name}"
        for module, names in rooms.imports().items()
        for name in names
        if {rooms.room_of(module), rooms.room_of(name)} <= here
        and rooms.room_of(module) != rooms.room_of(name)
        and rooms.FLOOR[rooms.room_of(module)] <= rooms.FLOOR[rooms.room_of(name)]
    }
    assert not upwards


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
