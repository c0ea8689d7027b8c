"""The package's shape: imports go downwards only, names are what they say, --help is quick to import."""

import ast
import subprocess
import sys
from pathlib import Path

import unlearn_peft

PACKAGE = Path(unlearn_peft.__file__).parent
RANKS = {
    "errors": 0, "files": 1, "mapped": 1, "functions": 1, "objective_settings": 1, "quantized": 1, "recipe": 2,
    "base": 2, "data": 3, "objectives": 3, "adapters": 4, "batch": 4, "cache": 4, "layers": 4, "pieces": 4,
    "specific": 4, "refusals": 4, "schedule": 4, "sharded": 4, "compiled": 4, "bundle": 5, "forward": 5, "trunk": 5,
    "checkpoints": 5, "signals": 5, "frozen": 6, "gates": 6, "residents": 7, "bank": 8, "attaching": 9,
    "engine": 7, "compose": 7, "export": 8, "generate": 7, "learner": 8, "train": 9, "own_answers": 8, "compare": 10,
    "auto_retain": 8, "card": 6, "evaluate": 10, "save": 10, "run": 11, "serve": 11, "cli_options": 12,
    "cli_evaluate": 13, "cli_export": 13, "cli_help": 13, "cli_serve": 13, "cli_tenant": 13, "cli": 14,
    "untrusted": 1, "adapter_config": 3, "trust": 2, "signing": 6, "cli_trust": 13,
    "dotted": 1, "packed": 2, "archive": 3, "download": 2, "sources": 4, "hub": 6, "shrink": 9, "cli_hub": 13,
}  # fmt: skip


def _imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            depth = len(file.relative_to(PACKAGE).parts)
            if node.level == depth or (depth == 2 and node.level == 2):
                yield (node.module or "").split(".")[0]


def test_imports_go_downwards_only():
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        for imported in _imports(file):
            if imported in RANKS and imported != name:
                same_rank_ok = {("files", "errors"), ("recipe", "objective_settings")}
                assert RANKS[imported] < RANKS[name] or (name, imported) in same_rank_ok, f"{name} imports {imported}"


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
