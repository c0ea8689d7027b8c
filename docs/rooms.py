"""The rooms of `unlearn_peft/` and the arrows between them, read from the imports of every file.

    python docs/rooms.py     draws docs/rooms.svg and writes the table into docs/architecture.md

tests/test_layout.py checks both, and keeps the rules: imports go to lower floors only, and in no circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unlearn_peft"
PICTURE, PAGE = ROOT / "docs" / "rooms.svg", ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: written by docs/rooms.py -->", "<!-- /rooms -->"
FLOORS = [
    ["errors"], ["files"], ["data"], ["recipe", "models"], ["adapters"], ["inference"],
    ["training", "evaluate", "serve"], ["subjects"], ["cli"],
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
_COLUMN = {"recipe": 0, "training": 0, "evaluate": 1, "serve": 2, "adapters": 1.5, "inference": 1.5, "models": 1.5}
_WIDTH, _HEIGHT, _STEP_X, _STEP_Y, _MARGIN = 120, 34, 170, 72, 20  # pixels


def module_of(file: Path) -> str:
    """Return a file's module name below the package, e.g. `training.step.runner`; of an `__init__.py` its package's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, *, for_types: bool = True) -> Iterator[str]:
    """Yield the modules of the package that a file imports, wherever in it: at its top, in functions, for types."""
    package = file.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and (for_types or id(node) not in only_types):
            yield from _modules(node, package)


def _modules(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("unlearn_peft."))
        return
    if node.level:
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    elif node.module and node.module.split(".")[0] == "unlearn_peft":
        base = node.module.partition(".")[2]
    else:
        return
    for alias in node.names:
        inner = PACKAGE.joinpath(*filter(None, base.split(".")), alias.name)
        is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
        yield f"{base}.{alias.name}".strip(".") if is_module else base


def imports(*, for_types: bool = True) -> dict[str, set[str]]:
    """Return each module's imports within the package; the top `__init__.py`, which hands on names, is left out."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if module_of(file)]
    return {module_of(file): {name for name in imports_of(file, for_types=for_types) if name} for file in files}


def room_of(module: str) -> str:
    """Return the first part of a module's name."""
    return module.split(".")[0]


def arrows() -> set[tuple[str, str]]:
    """Return which room imports which; `errors`, which all import, is no room."""
    pairs = {(room_of(module), room_of(name)) for module, names in imports().items() for name in names}
    return {(above, below) for above, below in pairs if above != below and below != "errors"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return a circle of imports for each module that is on one: the path from the module back to itself."""
    found = []
    for start in graph:
        stack, seen = [[start]], set[str]()
        while stack:
            path = stack.pop()
            for name in graph.get(path[-1], ()):
                if name == start and len(path) > 1:
                    found.append([*path, start])
                    stack = []
                    break
                if name not in seen and name in graph:
                    seen.add(name)
                    stack.append([*path, name])
    return found


def direct(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows that no way over other rooms replaces: those that the picture shows."""
    pairs = set(pairs)
    below: dict[str, set[str]] = {}
    for room in sorted(FLOOR, key=FLOOR.__getitem__):
        near = {b for a, b in pairs if a == room}
        below[room] = near.union(*(below[b] for b in near)) if near else set()
    return {(a, b) for a, b in pairs if not any(b in below[other] for x, other in pairs if x == a and other != b)}


def picture(pairs: set[tuple[str, str]]) -> str:
    """Return an SVG: a box for each room, a line for each direct arrow."""
    rooms = [room for room in FLOOR if room != "errors"]
    height = 2 * _MARGIN + (len(FLOORS) - 2) * _STEP_Y + _HEIGHT

    def corner(room: str) -> tuple[float, float]:
        return _MARGIN + _COLUMN.get(room, 1) * _STEP_X, height - _MARGIN - _HEIGHT - (FLOOR[room] - 1) * _STEP_Y

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _MARGIN + 2 * _STEP_X + _WIDTH} {height}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">',
        '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#6b7280"/></marker>',
    ]
    for above, below in sorted(direct(pairs)):
        (x1, y1), (x2, y2) = corner(above), corner(below)
        lines.append(
            f'<line x1="{x1 + _WIDTH / 2:g}" y1="{y1 + _HEIGHT:g}" x2="{x2 + _WIDTH / 2:g}" y2="{y2:g}" '
            'stroke="#6b7280" stroke-width="1.5" marker-end="url(#head)"/>'
        )
    for room in rooms:
        x, y = corner(room)
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#eef2ff" stroke="#4f46e5"/>'
            f'<text x="{x + _WIDTH / 2:g}" y="{y + 22:g}" fill="#111827">{room}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def table(pairs: set[tuple[str, str]]) -> str:
    """Return each room with the rooms that it imports, as a Markdown table, and how many arrows that makes."""
    rooms = sorted((room for room in FLOOR if room != "errors"), key=FLOOR.__getitem__, reverse=True)
    lines = [
        f"{len(pairs)} arrows, none upwards (all rooms may import `errors.py`).",
        "",
        "| room | imports |",
        "|---|---|",
    ]
    for room in rooms:
        names = sorted((b for a, b in pairs if a == room), key=lambda name: (-FLOOR[name], name))
        lines.append(f"| `{room}` | {', '.join(names) or 'no other room'} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with its table made anew."""
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{table(arrows())}\n{text[text.index(END) :]}"


if __name__ == "__main__":
    PICTURE.write_text(picture(arrows()), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
