"""The rooms of `unlearn_peft/` and the arrows between them, read from the imports of every file.

`python docs/rooms.py` writes the picture into docs/architecture.md; tests/test_layout.py checks it and the rules.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unlearn_peft"
FLOORS = [
    ["errors"], ["files"], ["data"], ["recipe", "models"], ["adapters"], ["inference"],
    ["training", "evaluate", "serve"], ["cli"],
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_of(file: Path) -> str:
    """Return a file's module name below the package, e.g. `training.step.runner`; of an `__init__.py` its package's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, wherever in it: at its top, in functions, for types."""
    package = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        base = ".".join(filter(None, above))
        for alias in node.names:
            inner = PACKAGE.joinpath(*base.split("."), alias.name) if base else PACKAGE / alias.name
            is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
            yield f"{base}.{alias.name}".strip(".") if is_module else base


def imports() -> dict[str, set[str]]:
    """Return each module's imports within the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {module_of(file): {name for name in imports_of(file) if name} for file in files if module_of(file)}


def room_of(module: str) -> str:
    """Return the first part of a module's name."""
    return module.split(".")[0]


def arrows() -> set[tuple[str, str]]:
    """Return which room imports which."""
    pairs = {(room_of(module), room_of(name)) for module, names in imports().items() for name in names}
    return {(above, below) for above, below in pairs if above != below}
