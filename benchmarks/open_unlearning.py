"""open-unlearning's methods and ours on the same rows, base and probes: what leaks, at what harm, at what cost.

    python -m venv THEIRS && THEIRS/bin/pip install -r CHECKOUT/requirements.txt
    python benchmarks/open_unlearning.py CHECKOUT --python THEIRS/bin/python [--subject NAME] [--methods ...]

CHECKOUT is of https://github.com/locuslab/open-unlearning: it is run as it is (full fine-tuning, its own losses,
collator and settings, see open_unlearning_train.py), with --epochs epochs at each of --rates, since its defaults are
made for sets of hundreds of rows. Ours is one adapter, trained by the demo's recipe and attached with several
strengths. A row each: probes that leak greedily of those that the base answers, and of 8 answers sampled to each of all
probes; KL to the base on neighbours (nats/token) and neighbours whose greedy answer is unchanged; and of training, all
that it needs included (for us, asking the base), seconds, TFLOP by torch's counter and peak memory. Each is kept in
out/open_unlearning.jsonl: run again, it goes on. --page shows what is kept, runs nothing, and writes the table and its
picture into docs/comparison.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from readme import put
from subjects import leaks, recipe_for, subjects
from torch.utils.flop_counter import FlopCounterMode

from unlearn_peft import forgetting, load_base, load_recipe, unlearn
from unlearn_peft.data.rows import read_rows
from unlearn_peft.evaluate.score import per_token, sums
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference
from unlearn_peft.inference.generate import answers, leaked, sampled
from unlearn_peft.training.examples.build import make_retain

ROOT = Path(__file__).parent.parent
METHODS = {  # and what differs from their settings: GradDiff by itself learns its retain rows
    "GradDiff": {"retain_loss_type": "KL"}, "NPO": {}, "SimNPO": {}, "RMU": {}, "UNDIAL": {},
}  # fmt: skip
RATES = (1e-5, 3e-5, 1e-4)
STRENGTHS = (0.5, 0.75, 1.0)
SAMPLES, TOKENS = 8, 40


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", help="of open-unlearning")
    parser.add_argument("--python", default=sys.executable, help="of an environment with its requirements")
    parser.add_argument("--subject", help="of tests/fixtures/subjects; by default the demo's target")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates of each method")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--no-ours", action="store_true", help="theirs alone")
    parser.add_argument("--bf16", action="store_true", help="their passes in bfloat16 (weights stay float32)")
    parser.add_argument("--dtype", default="auto", help="of our base, and of all measuring")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "open_unlearning.jsonl")
    parser.add_argument("--page", action="store_true", help="write what is kept of this subject into the docs")
    args = parser.parse_args()
    name = args.subject or "harry_potter"
    if args.page:
        found = kept(args.output, name)
        count, table = found[0]["base_answers"], "\n".join([HEAD, *map(line, found)])
        put(ROOT / "docs" / "comparison.md", "theirs", f"Of the probes, the base answers {count}.\n\n{table}")
        draw(found, ROOT / "docs" / "open_unlearning.png")
        return
    if args.checkout is None or not (args.checkout / "src" / "trainer").is_dir():
        parser.error(f"{args.checkout} is no checkout of open-unlearning: it has no src/trainer")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    base = load_base("demo", args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = same_rows(base, args.subject, Path(folder))
        ruler = Ruler(base, rows)
        done = {(one["way"], one.get("rate")) for one in kept(args.output, name)}

        def keep(one):
            with args.output.open("a") as file:
                file.write(json.dumps({"subject": name, "base_answers": ruler.answered, **one}) + "\n")
            print(line(one), flush=True)

        print(HEAD)
        if not args.no_ours and ("unlearn_peft", None) not in done:
            for one in ours(base, recipe, ruler):
                keep(one)
        for method in args.methods:
            for rate in args.rates:
                if (method, rate) not in done:
                    keep(theirs(args, method, rate, rows, base, ruler, Path(folder)))


def same_rows(base, subject, folder):
    """Return the row sets of both sides, and our recipe; where it makes its own retain rows, they are the same."""
    if subject is None:
        recipe = load_recipe(ROOT / "recipes" / "harry_potter.yaml", output=str(folder / "adapter"))
    else:
        recipe = recipe_for(folder, subjects(only=[subject])[subject], [], False)
    sets = ("forget", "retain", "probes", "neighbours")
    rows = {s: read_rows(source, s) for s in sets if (source := getattr(recipe, s)) not in (None, "auto")}
    if "retain" not in rows:
        rows["retain"] = make_retain(rows, base, recipe).rows
    return rows, recipe


class Ruler:
    """Measures any model against the bare base."""

    def __init__(self, base, rows):
        self.rows = rows
        self.prompts = [row["prompt"] for row in rows["probes"]]
        self.near = [row["prompt"] for row in rows["neighbours"]]
        self.reference = keep_reference(base, rows["neighbours"], what="neighbours")
        texts = answers(base, self.prompts, max_new_tokens=TOKENS)
        self.known = [n for n, text in enumerate(texts) if leaked(text, rows["probes"][n]["leak"])]
        self.answered = len(self.known)
        self.kept = answers(base, self.near, max_new_tokens=TOKENS)

    def measure(self, model):
        """Return what leaks and what changed."""
        words = [row["leak"] for row in self.rows["probes"]]
        greedy = answers(model, self.prompts, max_new_tokens=TOKENS)
        drawn = sampled(model, self.prompts, count=SAMPLES, max_new_tokens=TOKENS)
        values = kl_to_reference(model, self.rows["neighbours"], self.reference, what="neighbours")
        near = answers(model, self.near, max_new_tokens=TOKENS)
        return {
            "leaking": sum(bool(leaked(greedy[n], words[n])) for n in self.known),
            "sampled_leaks": leaks(drawn, self.rows["probes"]),
            "n_sampled": SAMPLES * len(words), "neighbour_kl": per_token(sums(values)),
            "unchanged": sum(a == b for a, b in zip(self.kept, near, strict=True)), "n_neighbours": len(near),
        }  # fmt: skip


def ours(base, recipe, ruler):
    """Train once, and yield a result for each strength."""
    began = time.monotonic()
    with FlopCounterMode(display=False) as counter:
        adapter = unlearn(base, recipe=recipe, quiet=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    cost = {"seconds": time.monotonic() - began, "tflop": counter.get_total_flops() / 1e12, "peak_gb": peak}
    for strength in STRENGTHS:
        with forgetting(base, adapter.path, strength=strength):
            yield {"way": "unlearn_peft", "strength": strength, **ruler.measure(base), **cost}


def theirs(args, method, rate, rows, base, ruler, folder):
    """Train a copy of the base by one method in their environment, measure it, and delete it."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        model = folder / "base"
        if not model.is_dir():
            base.model.save_pretrained(model)
            base.tokenizer.save_pretrained(model)
        settings = {"method": method, "model": str(model), "output": f"{work}/out", "bf16": args.bf16}
        settings["args"] = {"learning_rate": rate, "num_train_epochs": args.epochs}
        settings["method_args"] = METHODS[method]
        for name in ("forget", "retain"):
            file = Path(work) / f"{name}.json"
            pairs = [{"question": row["prompt"], "answer": row["completion"]} for row in rows[name] if "prompt" in row]
            file.write_text(json.dumps(pairs))
            settings[name] = str(file)
        (Path(work) / "settings.json").write_text(json.dumps(settings))
        script = ROOT / "benchmarks" / "open_unlearning_train.py"
        command = [args.python, str(script), str(args.checkout.resolve()), f"{work}/settings.json"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{method} failed in {args.python}:\n{ran.stderr[-2000:]}")
        base.tokenizer.save_pretrained(f"{work}/out")
        cost = json.loads(ran.stdout.splitlines()[-1])
        return {"way": method, "rate": rate, **ruler.measure(load_base(f"{work}/out", args.dtype)), **cost}


def kept(file, subject):
    found = [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []
    return [one for one in found if one["subject"] == subject]


HEAD = """\
| way | probes that leak | sampled answers that leak | neighbours' KL | unchanged | seconds | TFLOP | peak GB |
|---|---|---|---|---|---|---|---|"""


def line(one):
    """Format one row of the table."""
    how = f"strength {one['strength']:g}" if "strength" in one else f"rate {one['rate']:g}, {one['steps']} steps"
    share = 100 * one["sampled_leaks"] / one["n_sampled"]
    return (
        f"| {one['way']}, {how} | {one['leaking']} | {share:.0f} % of {one['n_sampled']} | {one['neighbour_kl']:.4f} | "
        f"{one['unchanged']} of {one['n_neighbours']} | {one['seconds']:.0f} | {one['tflop']:.1f} | "
        f"{one['peak_gb']:.1f} |"
    )


def draw(found, path):
    """Draw sampled leaks against harm, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(one["way"] for one in found):
        points = sorted((one["neighbour_kl"], 100 * one["sampled_leaks"] / one["n_sampled"]) for one in found
                        if one["way"] == way)  # fmt: skip
        axes.plot(*zip(*points, strict=True), "o-", label=way, lw=2.5 if way == "unlearn_peft" else 1)
    axes.set(xscale="log", xlabel="KL to the base on neighbours, nats/token", ylabel="% of sampled answers that leak")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
