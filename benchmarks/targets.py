"""Do the defaults forget other things too? The demo's recipe on other targets, only the data changed.

The defaults were chosen while looking at these targets: they show breadth, they are no held-out test.

    python benchmarks/targets.py [TARGET ...] [--set objective=ga_kl --set retain_weight=15] [--json]

For each target in tests/fixtures and the demo's own: greedy answers to the probes that leak before / with / after, of
how many, samples at temperature 1 that leak, neighbours' mean KL to the base (nats/token), training seconds.
"""

import argparse
import json
import tempfile
from pathlib import Path

from unlearn_peft import forgetting, load_base, load_recipe, unlearn
from unlearn_peft.data.rows import read_rows
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.inference.generate import leaked, sampled

ROOT = Path(__file__).parent.parent
SETS = ("forget", "retain", "probes", "neighbours")
TARGETS = {
    "harry_potter": ROOT / "recipes" / "data",
    **{name: ROOT / "tests" / "fixtures" for name in ("van_gogh", "shakespeare", "apple", "eiffel", "einstein")},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--samples", type=int, default=32, help="answers sampled for each probe")
    parser.add_argument("--set", action="append", default=[], help="override a field of the recipe; repeatable")
    args = parser.parse_args()
    base, rows = load_base("demo"), {}
    print("| target | probes that leak: before / with / after | samples that leak | neighbours' KL | training |")
    print("|---|---|---|---|---|")
    for target in args.targets or TARGETS:
        rows[target] = measure(base, target, args.samples, args.set)
        r = rows[target]
        leaks = " / ".join(f"{r['leaks'][state]} of {r['n_probes']}" for state in ("before", "with", "after"))
        print(
            f"| {target} | {leaks} | {100 * r['sampled_leak_share']:.1f} % of {r['n_samples']} | "
            f"{r['neighbour_kl']:.4f} nats/token | {r['training_seconds']:.0f} s |",
            flush=True,
        )
    if args.json:
        print(json.dumps(rows))


def measure(base, target, samples, overrides):
    files = [f"{name}={TARGETS[target] / f'{target}_{name}.jsonl'}" for name in SETS] + overrides
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(ROOT / "recipes" / "harry_potter.yaml", files, output=f"{folder}/adapter")
        adapter = unlearn(base, recipe=recipe, quiet=True)
        probes = read_rows(recipe.probes, "probes")
        result = compare(base, [adapter.path], probes, read_rows(recipe.neighbours, "neighbours"))
        with forgetting(base, adapter.path):
            answers = sampled(base, [row["prompt"] for row in probes], count=samples, max_new_tokens=40)
        named = [bool(leaked(text, row["leak"])) for row, texts in zip(probes, answers, strict=True) for text in texts]
    return {
        "leaks": result["leaks"], "n_probes": len(probes), "sampled_leak_share": sum(named) / len(named),
        "n_samples": len(named), "neighbour_kl": result["neighbour_kl"]["with"],
        "training_seconds": adapter.metrics["training_seconds"],
        "answers": [{"prompt": p["prompt"], "with": p["with"]["text"]} for p in result["probes"]],
    }  # fmt: skip


if __name__ == "__main__":
    main()
