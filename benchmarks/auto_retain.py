"""Does a retain set that makes itself protect as well as a hand-made one? The demo's recipe with both.

    python benchmarks/auto_retain.py [TARGET ...] [--seeds 0 1] [--json]

For each target (harry_potter by default, and those in tests/fixtures) and each retain set: rows trained on, probes that
leak greedily of how many, mean KL to the base on the held-out neighbours file (nats/token), seconds in all; then the
ratio of the two KLs. Both never see probes and neighbours. About 15 minutes a target and seed on 2 cores.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from unlearn_peft import load_base, load_recipe, unlearn
from unlearn_peft.data.rows import read_rows
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.training.examples.build import make_retain, read_sets

ROOT = Path(__file__).parent.parent
TARGETS = ("harry_potter", "van_gogh", "shakespeare", "apple", "eiffel", "einstein")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", default=["harry_potter"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}: known are {', '.join(TARGETS)}")
    base, found = load_base("demo"), []
    print("| target | seed | retain | rows | probes that leak | neighbours' KL | best step | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for target in args.targets:
        for seed in args.seeds:
            both = [measure(base, target, kind, seed) for kind in ("hand", "auto")]
            found += both
            ratio = both[1]["neighbour_kl"] / max(both[0]["neighbour_kl"], 1e-9)
            print(f"{target}, seed {seed}: neighbours' KL, auto / hand-made = {ratio:.2f}", flush=True)
    if args.json:
        print(json.dumps(found))


def measure(base, target, kind, seed):
    """Train and compare once; prints its line."""
    folder = ROOT / ("recipes/data" if target == "harry_potter" else "tests/fixtures")
    sets = [f"{name}={folder / f'{target}_{name}.jsonl'}" for name in ("forget", "probes", "neighbours")]
    sets.append("retain=auto" if kind == "auto" else f"retain={folder / f'{target}_retain.jsonl'}")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        recipe = load_recipe(ROOT / "recipes" / "harry_potter.yaml", sets, output=f"{out}/adapter", seed=seed)
        rows = read_sets(recipe)
        retain = make_retain(rows, base, recipe).rows if kind == "auto" else rows["retain"]
        adapter = unlearn(base, recipe=recipe, quiet=True)  # makes the same rows again
        neighbours = read_rows(recipe.neighbours, "neighbours")
        result = compare(base, [adapter.path], read_rows(recipe.probes, "probes"), neighbours)
    line = {
        "target": target, "seed": seed, "retain": kind, "rows": len(retain), "leaks": result["leaks"],
        "n_probes": len(rows["probes"]), "neighbour_kl": result["neighbour_kl"]["with"],
        "best_step": adapter.metrics["best_step"], "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(
        f"| {target} | {seed} | {kind} | {len(retain)} | {result['leaks']['with']} of {len(rows['probes'])} | "
        f"{line['neighbour_kl']:.4f} nats/token | {line['best_step']} | {line['seconds']:.0f} |",
        flush=True,
    )
    return line


if __name__ == "__main__":
    main()
