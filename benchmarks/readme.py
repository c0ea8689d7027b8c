"""Run what README.md and docs/results.md show, and write what it prints into them: no figure is typed by hand.

    python benchmarks/readme.py [BLOCK ...]

README.md has the demo, cut short, and its cost; docs/results.md has all blocks, whole. They are demo, cost, eval,
changed, unseen, tipped, seed, passage, auto_retain, tofu, frontier, names and ways.

By default demo, cost, changed, unseen, tipped, eval and seed: about an hour on 2 cores. (What is between `demo` and
`seed` measures the adapter that `demo` made.) passage takes half an hour, auto_retain an hour. tofu, frontier and names
show what benchmarks/tofu_smollm2.py, frontier.py and names.py have kept so far: run these before.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
CLI = ["-m", "unlearn_peft.cli"]
DATA = "recipes/data/harry_potter_"
NEAR = ["--output", "out/readme.near", "--neighbours"]
KEPT = ["benchmarks/ways.py", "--kept", "--dtype", "bfloat16", "--only"]
ONE_WAY = ["--ways", "ga_kl", "--picture", "out/ways.png"]
BLOCKS = {
    "demo": [
        [*CLI, "train", "recipes/harry_potter.yaml", "--output", "out/readme"],
        [*CLI, "compare", "out/readme", "--probes", DATA + "probes.jsonl", "--neighbours", DATA + "neighbours.jsonl"],
    ],
    "cost": [["benchmarks/cost.py"]],
    "eval": [
        [*CLI, "eval", "out/readme", "--recipe", "recipes/harry_potter.yaml", "--attacks", "all", "--card"],
    ],
    "changed": [[*CLI, "eval", "out/readme", *NEAR, DATA + "neighbours.jsonl"]],
    "unseen": [[*CLI, "eval", "out/readme", *NEAR, DATA + "neighbours_unseen.jsonl"]],
    "tipped": [["benchmarks/tipped.py"]],
    "seed": [[*CLI, "train", "recipes/seed_lm_head.yaml", "--output", "out/readme_seed"]],
    "passage": [["benchmarks/passage.py"]],
    "auto_retain": [["benchmarks/auto_retain.py", "harry_potter", "apple"]],
    "tofu": [["benchmarks/tofu_smollm2.py", "--kept"]],
    "frontier": [["benchmarks/frontier.py", "--kept"]],
    "names": [["benchmarks/names.py", "--kept"]],
    "ways": [
        [*KEPT, "star_wars", "gandhi"],
        [*KEPT, "star_wars", "gandhi", "titanic", "sherlock_holmes", *ONE_WAY],
        [*KEPT, "amazon_river", "berlin_wall", "mozart", "python_language", *ONE_WAY],
    ],
}


def main():
    """Run the blocks named on the command line, rewrite them, copy the curves."""
    if unknown := set(sys.argv[1:]) - set(BLOCKS):
        sys.exit(f"unknown block {', '.join(sorted(unknown))}: known are {', '.join(BLOCKS)}")
    for name in sys.argv[1:] or ("demo", "cost", "changed", "unseen", "tipped", "eval", "seed"):
        printed = []
        for command in BLOCKS[name]:
            line = " ".join(command).replace(" ".join(CLI), "unlearn-peft")
            printed.append((line, run(command)))
        block = markdown(name, printed)
        put(RESULTS, name, block)
        if name == "cost":
            put(README, name, block)
        if name == "demo":
            put(README, name, shortened(block))
            shutil.copy(ROOT / "out" / "readme" / "curves.png", ROOT / "docs" / "curves.png")


def put(page, name, block):
    """Write a block between its two markers, which the page must have once."""
    block = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
    text, count = re.subn(f"<!-- {name} -->.*<!-- /{name} -->", lambda _: block, page.read_text(), flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{page}: expected the markers <!-- {name} --> and <!-- /{name} --> once")
    page.write_text(text)


def shortened(block, rows=2):
    """Return the demo's block with the first rows of its table alone, and a line that says so."""
    line = re.compile(r"^├.*┤\n", re.MULTILINE)
    parts = line.split(block)
    table, bottom, after = re.split(r"^(└.*┘\n)", parts[-1], flags=re.MULTILINE)
    parts[-1] = table
    return line.search(block)[0].join(parts[:rows]) + f"{bottom}({rows} of {len(parts)} prompts shown)\n{after}"


def markdown(name, printed):
    """Return commands with what they print; of those that print Markdown, or write it into a card, the Markdown."""
    if name == "eval":
        card = (ROOT / "out" / "readme" / "README.md").read_text()
        section = re.search(r"<!-- evaluation[^\n]*\n(.*?)\n<!-- /evaluation", card, re.DOTALL)[1]
        section = re.sub(r"\n+!\[[^\n]*$", "", section).replace("## ", "### ")  # the picture lies beside the card alone
        return f"{section}\n\n{quoted('sampled answers with|what the attack', printed[0][1])}".rstrip()
    if name == "changed":
        return quoted("neighbours whose answer", printed[0][1])
    if name in ("cost", "tipped", "passage", "auto_retain", "tofu", "frontier", "names", "ways"):
        tables = ["\n".join(line for line in text.splitlines() if line.startswith("|")) for _, text in printed]
        if len(tables) == 1:
            return tables[0]
        return "\n\n".join(f"`python {line}`:\n\n{table}" for (line, _), table in zip(printed, tables, strict=True))
    return "```\n" + "\n".join(f"$ {line}\n{text}\n" for line, text in printed) + "```"


def quoted(begins, text):
    """Return the lines that begin so with the indented ones below them, as a block of their own; nothing if none do."""
    found = re.findall(rf"^(?:{begins}) .*\n(?:  .*\n)+", text, re.MULTILINE)
    return f"```\n{''.join(found)}```" if found else ""


def run(command):
    """Run Python with these arguments, showing what it prints; returns it."""
    lines, wide = [], {**os.environ, "COLUMNS": "110"}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=wide, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: its block is as it was")
    return "".join(lines).rstrip().replace(f"{ROOT}/", "")


if __name__ == "__main__":
    main()
