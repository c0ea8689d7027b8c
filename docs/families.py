"""Write families.md: what each family of transformers' causal language models does here, tiny and random.

    python docs/families.py [FAMILY ...]

Without names all are run, in minutes; a row is written as soon as it is known. tests/models/test_families.py runs them
again and fails where a row is not what it finds.
"""

import logging
import os
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("UNLEARN_PEFT_DIGEST_KEY", "families")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]

import conftest  # noqa: E402
import families  # noqa: E402
from filelock import FileLock  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
HEAD = """<!-- written by docs/families.py: run it, do not change this page -->
# Model families

Families of causal language models in transformers {transformers} (PEFT {peft}), built tiny with random weights: it
trains, attaches, generates, is evaluated and detaches, bit-equal, with an adapter of each kind (`ok`), or is refused in
one sentence before any work (`refused`). `python docs/families.py` writes this page, `python docs/families.py NAME ...`
some of its rows. Both kinds are `ok` in {both} of {count} families.{missing}

| family | lora | head | note |
|---|---|---|---|
"""


def main():
    """Run the families that are named, or all, and write their rows."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        conftest.make_tiny(Path(folder) / "tiny")
        tokenizer = families.tokenizer_of(Path(folder) / "tiny")
        for name in sys.argv[1:] or families.names():
            cells = families.row_of(name, tokenizer, Path(folder))
            print(" | ".join((name, *cells)), flush=True)
            with FileLock(PAGE.with_suffix(".lock")):
                write({**rows(), name: cells})
    PAGE.with_suffix(".lock").unlink(missing_ok=True)


def rows():
    """Return the page's rows: (lora, head, note) by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    cells = [line.strip("|").split("|") for line in lines if re.match(r"\| `", line)]
    return {first.strip().strip("`"): tuple(cell.strip() for cell in rest) for first, *rest in cells}


def write(table):
    """Write the page."""
    both = sum(cells[:2] == ("ok", "ok") for cells in table.values())
    missing = [name for name in families.names() if name not in table]
    text = HEAD.format(
        transformers=version("transformers"), peft=version("peft"), both=both, count=len(table),
        missing=f"\nNot run yet, {len(missing)}: {', '.join(missing)}." if missing else "",
    )  # fmt: skip
    lines = [f"| `{name}` | {' | '.join(table[name])} |\n" for name in sorted(table)]
    PAGE.write_text(text + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
