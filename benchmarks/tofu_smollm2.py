r"""TOFU (Maini et al. 2024, arXiv:2401.06121) on a small model: the table that its users know, for each objective.

    python benchmarks/tofu_smollm2.py [--objectives ga_kl npo ...] [--jobs 2] [--kept] [--output out/tofu]

SmolLM2-135M learns some of TOFU's fictitious authors; a twin learns the same but the authors to be forgotten. Then
each objective makes the first forget them, as an adapter. Forget quality is the p-value of a KS test of truth ratios
against the twin's (above 0.05: not distinguishable from it); model utility is TOFU's harmonic mean of nine; truth
ratio is min(R, 1/R) on the forget set; ROUGE is ROUGE-L recall of greedy answers on the forget set. No retain budget
ends a run, as utility measures the harm: the last step is kept.

Each line is kept in --output as soon as it is there: run the same command again and it goes on. With --jobs N the
first model is learnt on all cores, then N lines at a time are made, each on its share of them. To be done within the
hour (58 minutes with --jobs 2 on 2 cores), it uses a part of the rows and of the parameters:

- 2 authors (40 rows) to forget, 3 (60 rows) to retain; 20 rows of each utility set; learnt through a LoRA of the
  upper half of the layers that is merged, as full fine-tuning would take hours.
- The rows here have no wrong answers and no paraphrases. Wrong answers are those to the most similar questions about
  authors that nobody learnt, with the name changed; in place of the paraphrase stands the answer itself.

On a GPU, with the Hub, all of TOFU with its own wrong answers and paraphrases, and published models in place of ours
(not tried here: this was written where there is no network):

    python benchmarks/tofu_smollm2.py --hub --finetuned open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
        --retain-only open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90 --utility-rows 400
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from jobs import add_arguments, keep, make_missing
from variants import VARIANTS, file_name

from unlearn_peft import Base, forgetting, load_base, merge, unlearn
from unlearn_peft.data.rows import read_rows
from unlearn_peft.data.source import DataSpec
from unlearn_peft.evaluate.metrics.truth_ratio import NINE, forget_quality
from unlearn_peft.evaluate.suites.tofu import measure_tofu
from unlearn_peft.training.objectives import Terms

DATA = Path(__file__).parent / "data"
AN_AUTHOR, WRONG = 20, 3  # rows an author has; wrong answers a question gets
MODELS = ("retain-only", "fine-tuned")  # the lines without forgetting: the twin, and what each objective begins with
COLUMNS = ("forget_quality", "model_utility", "forget_truth_ratio", "forget_rouge_l_recall")
LEARNT = {  # the LoRA through which the models learn their authors
    "adapter": {"kind": "lora", "r": 32, "lora_alpha": 32, "layers": "upper_half"},
    "forget_batch": 1, "retain_batch": 20, "anchor_batch": 0, "retain_weight": 1, "learning_rate": 1e-3,
    "save_dtype": "float32",
}  # fmt: skip
TO_12 = {"objective": {"name": "ga_kl", "forget_ceiling": 12}}
GENTLY = {"steps": 40, "learning_rate": 4e-3, "retain_weight": 8, "retain_batch": 8, "anchor_batch": 8}
WAYS = {  # "gently" has more steps and more that is held, for which the hour has no room: run it by name
    **VARIANTS, "ga_kl to 12 nats": TO_12,
    "ga_kl, gently": {**VARIANTS["ga_kl"], **GENTLY}, "ga_kl to 12 nats, gently": {**TO_12, **GENTLY},
}  # fmt: skip
ONE_EACH = ("ga_kl to 12 nats", "grad_diff", "wga", "ihl", "undial", "npo", "simnpo", "idk_dpo", "rmu")


def main():
    args = arguments()
    rows = hub_rows(args) if args.hub else local_rows(args)
    known = {name: bare(rows[name]) for name in ("forget", "retain")}
    folder = args.output / digest(known, args.base, args.epochs, args.seed, LEARNT)
    measured_as = folder / digest(
        rows, args.steps, args.learning_rate, args.retain_weight, args.finetuned, args.retain_only
    )
    make_here = partial(make, rows=rows, args=args, folder=folder, measured_as=measured_as)
    if args.line:
        return make_here([args.line])
    print(f"results are kept in {measured_as}", file=sys.stderr)
    chosen = args.objectives if args.objectives is not None else WAYS if args.kept else ONE_EACH
    places = {name: kept(measured_as, name) for name in (*MODELS, *chosen)}
    failed = [] if args.kept else make_missing(__file__, places, args.jobs, make_here, first=MODELS[1:])
    found = {name: json.loads(place.read_text()) for name, place in places.items() if place.is_file()}
    if found.keys() >= set(MODELS):
        table(found)
        if args.json:
            print(json.dumps({name: {k: v for k, v in f.items() if k != "truth_ratios"} for name, f in found.items()}))
    elif args.kept:
        sys.exit(f"{' and '.join(MODELS)} are not kept yet, and no table goes without: run the command without --kept")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the rest is kept: run the command again to go on")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="*", choices=WAYS, metavar="NAME",
                        help=f"of {'; '.join(WAYS)}; by default {'; '.join(ONE_EACH)}")  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("out/tofu"))
    parser.add_argument("--base", default="demo", help="the model that learns the authors")
    parser.add_argument("--forget-authors", type=int, default=2)
    parser.add_argument("--retain-authors", type=int, default=3)
    parser.add_argument("--utility-rows", type=int, default=20, help="of each of the three sets of model utility")
    parser.add_argument("--epochs", type=int, default=8, help="of learning the authors")
    parser.add_argument("--steps", type=int, default=20, help="of forgetting them")
    parser.add_argument("--retain-weight", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hub", action="store_true", help="all rows of TOFU's forget10, from the Hub")
    parser.add_argument("--finetuned", help="a model that knows the authors already; none is trained then")
    parser.add_argument("--retain-only", help="a model that knows the retain set alone")
    parser.add_argument("--kept", action="store_true", help="load no model: the table of all that is kept already")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def local_rows(args):
    """Return the rows of the four sets, each with wrong answers."""
    forget, retain, real, world = (
        read_rows(DataSpec(path=str(DATA / f"{name}.jsonl")), name)
        for name in ("tofu_forget10", "tofu_retain", "real_authors", "world_facts")
    )
    for count, available in ((args.forget_authors, authors(forget)), (args.retain_authors, authors(retain))):
        if not 1 <= count <= len(available):
            sys.exit(f"{count} authors were asked for, and there are rows of 1 to {len(available)} (--hub has more)")
    counts = args.forget_authors * AN_AUTHOR, args.retain_authors * AN_AUTHOR
    unknown = [*authors(forget[counts[0] :]), *authors(retain[counts[1] :])]
    if len(unknown) < WRONG:
        sys.exit(f"{WRONG} authors must stay unknown, for wrong answers: fewer --forget-authors or --retain-authors")
    return {
        "forget": [row for author in authors(forget[: counts[0]]) for row in about_others(author, unknown)],
        "retain": [row for author in authors(retain[: counts[1]]) for row in about_others(author, unknown)],
        "real_authors": elsewhere(real)[: args.utility_rows],
        "world_facts": elsewhere(world)[: args.utility_rows],
        "retain_measured": args.utility_rows,
    }


def hub_rows(args):
    """Return TOFU's own sets with their own wrong answers (data set locuslab/TOFU)."""
    columns = {"prompt": "question", "completion": "answer", "perturbed": "perturbed_answer"}
    sets = {"forget": "forget10_perturbed", "retain": "retain_perturbed",
            "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}  # fmt: skip
    rows = {}
    for name, config in sets.items():
        more = {"paraphrased": "paraphrased_answer"} if name in ("forget", "retain") else {}
        source = DataSpec(path="locuslab/TOFU", name=config, columns={**columns, **more})
        rows[name] = read_rows(source, name)
    for name in ("real_authors", "world_facts"):
        rows[name] = rows[name][: args.utility_rows]
    return {**rows, "retain_measured": args.utility_rows}


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def bare(rows):
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def authors(rows):
    return [rows[i : i + AN_AUTHOR] for i in range(0, len(rows), AN_AUTHOR)]


def about_others(author, unknown):
    """Give each row wrong answers: what is said of other authors where they are asked most alike."""
    own, result = full_name(author), []

    def of(n, text, question):  # a question that doesn't name the author asks who it is
        return renamed(text, full_name(unknown[n]), own) if own.split()[0] in question else text

    for row in author:
        best = [max(other, key=lambda r, row=row: alike(r["prompt"], row["prompt"])) for other in unknown]
        order = sorted(range(len(unknown)), key=lambda n: -alike(best[n]["prompt"], row["prompt"]))[:WRONG]
        wrong = [of(n, best[n]["completion"], row["prompt"]) for n in order]
        result.append({"prompt": row["prompt"], "completion": row["completion"], "perturbed": wrong})
    return result


def elsewhere(rows):
    """Give each row wrong answers: those to the questions of the same set that are most alike."""
    result = []
    for row in rows:
        others = sorted((r for r in rows if r["completion"] != row["completion"]),
                        key=lambda r, row=row: -alike(r["prompt"], row["prompt"]))  # fmt: skip
        result.append({**row, "perturbed": [r["completion"] for r in others[:WRONG]]})
    return result


def full_name(author):
    """Return the capitalised words that most often stand together in an author's rows."""
    text = "\n".join(f"{row['prompt']}\n{row['completion']}" for row in author)
    names = re.findall(r"[^\W\d_a-z][\w-]+(?: [^\W\d_a-z][\w-]+)+", text)
    return Counter(names).most_common(1)[0][0]


def renamed(text, old, new):
    text = text.replace(old, new)
    for end in (0, -1):
        text = re.sub(rf"\b{re.escape(old.split()[end])}\b", new.split()[end], text)
    return text


def alike(one, other):
    """Return the share of words that two questions have in common; names, being capitalised, don't count."""
    sides = [{w for w in re.findall(r"\w+", text) if w.islower()} for text in (one, other)]
    return len(sides[0] & sides[1]) / max(len(sides[0] | sides[1]), 1)


def learn(forget, retain, settings):
    """An objective: learn the rows that stand as the retain set (whose answers end), whatever the forget set is."""
    return Terms(0 * forget.cross_entropy, retain.cross_entropy)


def make(names, rows, args, folder, measured_as):
    """Measure and keep one line after the other."""
    tuned = None
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == "retain-only":
            found = measured(model(args.retain_only, "retain_only", bare(rows["retain"]), args, folder), rows)
        else:
            both = bare(rows["forget"]) + bare(rows["retain"])
            tuned = tuned or model(args.finetuned, "finetuned", both, args, folder)
            found = measured(tuned, rows) if name == "fine-tuned" else forgotten(tuned, rows, name, args, measured_as)
        keep(kept(measured_as, name), found)


def model(given_name, name, rows, args, folder):
    """Return a base that knows the rows: the given one, the one that is there, or one that learns them now."""
    if given_name:
        return load_base(given_name)
    place = folder / name
    if not (place / "config.json").is_file():
        print(f"{name}: learning {len(rows)} rows", file=sys.stderr)
        steps = max(args.epochs * len(rows) // LEARNT["retain_batch"], 1)
        base = load_base(args.base)
        adapter = unlearn(
            base, forget=[{"prompt": "-", "completion": "-"}], retain=rows, steps=steps, eval_every=steps,
            objective={"name": f"{Path(__file__).absolute()}:learn"}, seed=args.seed, resume=True,
            output=str(folder / f"{name}_adapter"), **LEARNT,
        )  # fmt: skip
        merge(base, [adapter.path], place)
    return load_base(str(place))


def forgotten(tuned, rows, name, args, folder):
    """Forget, and measure with the adapter attached. Utility tells the harm, so no budget does: the last step stays."""
    settings = {
        "steps": args.steps, "learning_rate": args.learning_rate, "retain_weight": args.retain_weight,
        "warmup_steps": 2, "retain_batch": 4, "anchor_batch": 2, "own_answers": 0, **WAYS[name],
    }  # fmt: skip
    objective = {**settings.pop("objective"), "retain_budget": None}
    adapter = unlearn(
        tuned, forget=bare(rows["forget"]), retain=bare(rows["retain"]), eval_every=settings["steps"], seed=args.seed,
        resume=True, output=str(folder / "adapters" / file_name(name)), objective=objective, **settings,
    )  # fmt: skip
    with forgetting(tuned, adapter.path):
        found = measured(tuned, rows)
    return {**found, "training_seconds": adapter.metrics["training_seconds"], "best_step": adapter.metrics["best_step"]}


def measured(base: Base, rows):
    sets = {name: rows[name] for name in ("forget", "real_authors", "world_facts")}
    sets["retain"] = rows["retain"][:: max(len(rows["retain"]) // rows["retain_measured"], 1)]
    found = measure_tofu(
        base, sets, max_new_tokens=48, batch_size=32, progress=lambda part: print(f"  {part}", file=sys.stderr)
    )
    return {"scores": [asdict(score) for score in found.scores], "truth_ratios": found.truth_ratios.tolist()}


def kept(folder, name):
    return folder / f"{file_name(name)}.json"


def table(found):
    twin, tuned = np.array(found["retain-only"]["truth_ratios"]), found["fine-tuned"]
    print(
        f"| | forget quality (p, n = {len(twin)}) | model utility | of the fine-tuned | truth ratio | ROUGE "
        "| what utility lost most of |"
    )
    print("|---|---|---|---|---|---|---|")
    whole = value(tuned, "model_utility")
    for name, one in found.items():
        p = "" if name == "retain-only" else f"{forget_quality(one['truth_ratios'], twin).value:.3g}"
        utility, ratio, rouge = (value(one, column) for column in COLUMNS[1:])
        share = f"{100 * utility / whole:.0f} %" if whole else ""
        print(f"| {name} | {p} | {utility:.3f} | {share} | {ratio:.3f} | {rouge:.3f} | {most_lost(one, tuned)} |")


def most_lost(one, tuned):
    """Return which of utility's nine parts fell most beside the fine-tuned model's, and from what to what."""
    lost = {part: value(one, part) / (value(tuned, part) or 1) for part in NINE}
    part = min(lost, key=lost.__getitem__)
    if one is tuned or lost[part] >= 1:
        return ""
    return f"{part.replace('_', ' ')}, {value(tuned, part):.2f} to {value(one, part):.2f}"


def value(one, name):
    return next(score["value"] for score in one["scores"] if score["name"] == name)


if __name__ == "__main__":
    main()
