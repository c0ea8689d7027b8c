"""Does the recipe forget subjects that nothing was tuned on? Sixteen of them, in tests/fixtures/subjects.

    python benchmarks/subjects.py [--half choose|confirm] [--only NAME ...] [--base GGUF] [--set FIELD=VALUE ...]
                                  [--dtype D]

Settings are chosen by the twelve of `choose` alone; the four of `confirm` are looked at once, at the end. The recipe is
the demo's with the rows replaced and `retain: auto`, or with --defaults the package's own. A line a subject: probes
that the base answers of all; of those, the ones that still leak with the adapter, in all and by kind of probe; answers
sampled at temperature 1 that leak before and with, over all probes; of all greedy and of all sampled answers those that
abstain, of the sampled ones that say something else or are word salad (`evaluate/metrics/answer_kinds.py`); neighbours
whose greedy answer (40 tokens) is unchanged, and that abstain; their mean KL to the base (nats/token); training
seconds. Each goes to out/subjects.jsonl at once: numbers and settings only.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

from unlearn_peft import forgetting, load_base, load_recipe, unlearn
from unlearn_peft.data.refusals import REFUSALS
from unlearn_peft.data.rows import read_rows
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.evaluate.metrics.answer_kinds import KINDS, abstains, kinds_of_answers
from unlearn_peft.inference.generate import answers, leaked, sampled

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "fixtures" / "subjects"
TOKENS = 40  # of an answer
SHOWN = ("abstains", "says_else", "word_salad")  # kinds of answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=["choose", "confirm"], help="all subjects by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="subjects by name")
    parser.add_argument("--base", default="demo", help="as load_base takes it; demo by default")
    parser.add_argument("--defaults", action="store_true", help="the package's defaults, not the demo's recipe")
    parser.add_argument("--set", action="append", default=[], help="override a field of the recipe; repeatable")
    parser.add_argument("--samples", type=int, default=8, help="answers sampled for each probe")
    parser.add_argument("--dtype", default="auto", help="of the base; bfloat16 is faster where the CPU has it")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "subjects.jsonl")
    args = parser.parse_args()
    chosen = subjects(args.half, args.only)
    base, found = load_base(args.base, args.dtype), []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(
        "| subject | base answers | of those leak | by kind | sampled leaks before / with | abstain | "
        "sampled: abstain / else / salad | neighbours unchanged | abstain | KL | training |"
    )
    print("|---" * 11 + "|")
    for name, subject in chosen.items():
        one = {"subject": name, **measure(base, subject, args.samples, args.set, args.defaults)}
        settings = {"base": args.base, "defaults": args.defaults, "set": args.set, "dtype": args.dtype}
        with args.output.open("a") as file:
            file.write(json.dumps({**one, "half": subject["half"], **settings, "finished": time.time()}) + "\n")
        found.append(one)
        print(line(one), flush=True)
    if len(found) > 1:
        print(line(total(found)))


def subjects(half=None, only=None):
    """Read the subjects, of one half or of some names."""
    every = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    if unknown := set(only or ()) - set(every):
        raise SystemExit(f"unknown subject {', '.join(sorted(unknown))}: known are {', '.join(every)}")
    return {n: s for n, s in every.items() if half in (None, s["half"]) and (not only or n in only)}


def measure(base, subject, samples, overrides, defaults):
    """Train once, and count before and with the adapter."""
    probes, neighbours = subject["probes"], subject["neighbours"]
    prompts, beside = [row["prompt"] for row in probes], [row["prompt"] for row in neighbours]
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(folder, subject, overrides, defaults)
        kept = answers(base, beside, max_new_tokens=TOKENS)
        drawn_before = sampled(base, prompts, count=samples, max_new_tokens=TOKENS)
        adapter = unlearn(base, recipe=recipe, quiet=True)
        result = compare(
            base, [adapter.path], probes, read_rows(recipe.neighbours, "neighbours"), max_new_tokens=TOKENS
        )
        with forgetting(base, adapter.path):
            drawn = sampled(base, prompts, count=samples, max_new_tokens=TOKENS)
            near = answers(base, beside, max_new_tokens=TOKENS)
    kinds = kinds_of_answers(base, prompts, drawn, [row["leak"] for row in probes], REFUSALS)
    answered = [n for n, probe in enumerate(result["probes"]) if probe["before"]["leaked"]]
    still = [n for n in answered if result["probes"][n]["with"]["leaked"]]
    return {
        "n_probes": len(probes), "answered": len(answered), "leaking": len(still),
        "newly_leaking": result["leaks"]["with"] - len(still),  # the base itself did not answer these
        "kinds_answered": Counter(probes[n]["kind"] for n in answered),
        "kinds_leaking": Counter(probes[n]["kind"] for n in still), "probes_leaking": still,
        "sampled_before": leaks(drawn_before, probes), "sampled_with": leaks(drawn, probes),
        "n_sampled": len(probes) * samples,
        "kinds": {kind: float(shares.sum()) * samples for kind, shares in kinds.items()},
        "abstaining": int(abstains([probe["with"]["text"] for probe in result["probes"]], REFUSALS).sum()),
        "unchanged": sum(a == b for a, b in zip(kept, near, strict=True)),
        "neighbours_abstaining": int(abstains(near, REFUSALS).sum()), "n_neighbours": len(neighbours),
        "neighbour_kl": result["neighbour_kl"]["with"], "seconds": adapter.metrics["training_seconds"],
    }  # fmt: skip


def recipe_for(folder, subject, overrides, defaults):
    """Return the recipe of a subject, its rows written into `folder`."""
    files = []
    for name in ("forget", "probes", "neighbours"):
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in subject[name]))
        files.append(f"{name}={path}")
    start = ROOT / "recipes" / "harry_potter.yaml"
    if defaults:
        start = Path(folder) / "recipe.yaml"
        start.write_text(f"forget: {Path(folder) / 'forget.jsonl'}\n")
    return load_recipe(start, [*files, "retain=auto", *overrides], output=f"{folder}/adapter")


def leaks(drawn, probes):
    """Count the sampled answers that leak."""
    return sum(bool(leaked(text, row["leak"])) for row, texts in zip(probes, drawn, strict=True) for text in texts)


def total(found):
    """Sum up subjects; KL is the mean of theirs."""
    summed = {key: sum(one[key] for one in found) for key, value in found[0].items() if isinstance(value, int | float)}
    kinds = {key: sum((one[key] for one in found), Counter()) for key in ("kinds_answered", "kinds_leaking")}
    kinds["kinds"] = {kind: sum(one["kinds"][kind] for one in found) for kind in KINDS}
    return {**summed, **kinds, "subject": "all", "neighbour_kl": summed["neighbour_kl"] / len(found)}


def line(one):
    """Format one row of the table."""
    kinds = ", ".join(f"{kind} {one['kinds_leaking'][kind]}/{n}" for kind, n in sorted(one["kinds_answered"].items()))
    share = [f"{100 * one[f'sampled_{state}'] / max(1, one['n_sampled']):.0f} %" for state in ("before", "with")]
    shares = " / ".join(f"{100 * one['kinds'][kind] / max(1, one['n_sampled']):.0f} %" for kind in SHOWN)
    return (
        f"| {one['subject']} | {one['answered']} of {one['n_probes']} | {one['leaking']} (and {one['newly_leaking']} "
        f"others) | {kinds} | {' / '.join(share)} | {one['abstaining']} of {one['n_probes']} | {shares} | "
        f"{one['unchanged']} of {one['n_neighbours']} | "
        f"{one['neighbours_abstaining']} | {one['neighbour_kl']:.4f} | {one['seconds']:.0f} s |"
    )


if __name__ == "__main__":
    main()
