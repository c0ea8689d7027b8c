"""Run what README.md shows and write what it prints into it: no figure is typed by hand.

python benchmarks/readme.py [demo] [seed]      # both by default; about 5 minutes on 2 cores
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLI = ["-m", "unlearn_peft.cli"]
DATA = "recipes/data/harry_potter_"
BLOCKS = {
    "demo": [
        [*CLI, "train", "recipes/harry_potter.yaml", "--output", "out/readme"],
        [*CLI, "compare", "out/readme", "--probes", DATA + "probes.jsonl", "--neighbours", DATA + "neighbours.jsonl"],
    ],
    "seed": [[*CLI, "train", "recipes/seed_lm_head.yaml", "--output", "out/readme_seed"]],
}


def main():
    """Run the blocks named on the command line, rewrite them, copy the curves."""
    for name in sys.argv[1:] or BLOCKS:
        shown = []
        for command in BLOCKS[name]:
            called = " ".join(command).replace(" ".join(CLI), "unlearn-peft")
            shown.append(f"$ {called}\n{run(command)}")
        block = f"<!-- {name} -->\n```\n" + "\n".join(shown) + f"\n```\n<!-- /{name} -->"
        readme = (ROOT / "README.md").read_text()
        readme = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, block=block: block, readme, flags=re.DOTALL)
        (ROOT / "README.md").write_text(readme)
        if name == "demo":
            shutil.copy(ROOT / "out" / "readme" / "curves.png", ROOT / "docs" / "curves.png")


def run(command):
    """Run Python with these arguments, showing what it prints; returns it."""
    lines = []
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: README.md is as it was")
    return "".join(lines).rstrip()


if __name__ == "__main__":
    main()
