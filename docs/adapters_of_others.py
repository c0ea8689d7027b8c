"""Write adapters_of_others.md: what loads of what PEFT's versions and other trainers write.

    python docs/adapters_of_others.py

tests/adapters/test_others.py makes the same adapters, and fails where the page is not what it finds.
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("UNLEARN_PEFT_DIGEST_KEY", "others")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "adapters")]

import conftest  # noqa: E402
import others  # noqa: E402

PAGE = ROOT / "docs" / "adapters_of_others.md"
HEAD = """<!-- written by docs/adapters_of_others.py: run it, do not change this page -->
# Adapters that others wrote

One LoRA, written tiny as PEFT's versions and other trainers write theirs, is attached to a base: it does what it was
trained for, and detaches bit-equal (`ok`), or it is refused in one sentence (`refused`). {ok} of {count} are `ok`.

Which modules are adapted, the tensors' names decide. `target_modules` and its like may be any pattern: none is run.
Base weights that lie beside a LoRA, as PEFT saves them with one on `lm_head`, are compared with the base when it is
attached, bit for bit in the narrower of the two dtypes, and left out; one that differs is refused. Until then `inspect`
and `verify` name them. `stack`, `shrink` and `export`, which see no base's weights, refuse them.

| adapter | | note |
|---|---|---|
"""


def page(base, folder):
    """Return the page's text."""
    rows = {name: others.row_of(name, base, folder) for name in others.ALL}
    lines = [f"| {name} | {cell} | {note} |\n".replace("_", "\\_") for name, (cell, note) in rows.items()]
    return HEAD.format(ok=sum(cell == "ok" for cell, _ in rows.values()), count=len(rows)) + "".join(lines)


def main():
    """Make all, and write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from unlearn_peft import load_base

    with tempfile.TemporaryDirectory() as folder:
        base = load_base(str(conftest.make_tiny(Path(folder) / "tiny")))
        PAGE.write_text(page(base, Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
