"""What does forgetting a person in another language do to that language? Rows in tests/fixtures/languages.

    python benchmarks/languages.py [LANGUAGE ...] [--base GGUF] [--set FIELD=VALUE ...] [--dtype D]

A line a language, trained with the package's defaults (retain: auto): fact tokens marked of the forget rows' target
tokens; KL to the base on neutral text that names no person (nats/token, bare text); probes whose greedy answer leaks
before and with, and of those that leaked before, the ones that still do; training seconds. de_private is a person whom
no base knows. Each is appended to out/languages.jsonl at once: numbers and settings only.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from unlearn_peft import load_base, load_recipe, unlearn
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.training.examples.build import build_examples, make_retain, read_sets

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "fixtures" / "languages"


def main():
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--base", default="demo", help="as load_base takes it; demo by default")
    parser.add_argument("--set", action="append", default=[], help="override a field of the recipe; repeatable")
    parser.add_argument("--dtype", default="auto", help="of the base; bfloat16 is faster where the CPU has it")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "languages.jsonl")
    args = parser.parse_args()
    if unknown := set(args.languages) - set(names):
        parser.error(f"unknown language {', '.join(sorted(unknown))}: known are {', '.join(names)}")
    base = load_base(args.base, args.dtype)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print("| language | fact tokens | KL on neutral text | probes that leak: before / with (still) | training |")
    print("|---|---|---|---|---|")
    for name in args.languages or names:
        one = measure(base, json.loads((FOLDER / f"{name}.json").read_text()), args.set)
        with args.output.open("a") as file:
            settings = {"base": args.base, "set": args.set, "dtype": args.dtype, "finished": time.time()}
            file.write(json.dumps({"language": name, **one, **settings}) + "\n")
        print(
            f"| {name} | {one['fact_tokens']} of {one['target_tokens']} | {one['neutral_kl']:.4f} nats/token | "
            f"{one['leak_before']} / {one['leak_with']} ({one['still']}) of {one['n_probes']} | "
            f"{one['seconds']:.0f} s |",
            flush=True,
        )


def measure(base, language, overrides):
    """Train once on a person's rows, and count."""
    with tempfile.TemporaryDirectory() as folder:
        forget, start = Path(folder) / "forget.jsonl", Path(folder) / "recipe.yaml"
        forget.write_text("".join(json.dumps(row) + "\n" for row in language["forget"]))
        start.write_text(f"forget: {forget}\n")
        recipe = load_recipe(start, overrides, output=f"{folder}/adapter")
        marked, targets = fact_tokens(base, recipe)
        adapter = unlearn(base, recipe=recipe, quiet=True)
        neutral = [{"text": text} for text in language["neutral"]]
        result = compare(base, [adapter.path], language["probes"], neutral)
    before, kept = ([bool(probe[state]["leaked"]) for probe in result["probes"]] for state in ("before", "with"))
    return {
        "fact_tokens": marked, "target_tokens": targets, "neutral_kl": result["neighbour_kl"]["with"],
        "leak_before": sum(before), "leak_with": sum(kept), "still": sum(map(min, before, kept)),
        "n_probes": len(before), "seconds": adapter.metrics["training_seconds"],
    }  # fmt: skip


def fact_tokens(base, recipe):
    """Return how many of the forget rows' target tokens are marked as the fact, and how many there are."""
    rows = read_sets(recipe)
    if recipe.makes_retain:
        rows["retain"] = make_retain(rows, base, recipe).rows
    forget = build_examples(rows, base, recipe.model_copy(update={"own_answers": 0})).forget
    targets = [(n, t) for n, example in enumerate(forget) for t, is_target in enumerate(example.is_target) if is_target]
    return sum(forget[n].specific is None or forget[n].specific[t] for n, t in targets), len(targets)


if __name__ == "__main__":
    main()
