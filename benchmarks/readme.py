"""Run the demo and the original experiment, and write what they print into README.md: no figure is typed by hand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, "-m", "unlearn_peft.cli"]
DATA = "recipes/data/harry_potter_"
DEMO = [
    ["train", "recipes/harry_potter.yaml", "--output", "out/readme"],
    ["compare", "out/readme", "--probes", DATA + "probes.jsonl", "--neighbours", DATA + "neighbours.jsonl"],
]
SEED = [["train", "recipes/seed_lm_head.yaml", "--output", "out/readme_seed"]]


def main():
    """Run both, rewrite the blocks, copy the curves."""
    readme = (ROOT / "README.md").read_text()
    for name, commands in (("demo", DEMO), ("seed", SEED)):
        shown = []
        for command in commands:
            done = subprocess.run([*CLI, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            shown.append("$ unlearn-peft " + " ".join(command) + "\n" + done.stdout.rstrip())
        block = f"<!-- {name} -->\n```\n" + "\n".join(shown) + f"\n```\n<!-- /{name} -->"
        readme = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, block=block: block, readme, flags=re.DOTALL)
    (ROOT / "README.md").write_text(readme)
    shutil.copy(ROOT / "out" / "readme" / "curves.png", ROOT / "docs" / "curves.png")


if __name__ == "__main__":
    main()
