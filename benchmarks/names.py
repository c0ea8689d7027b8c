"""Does a name alone make the base forget? Over RWKU's real persons, on questions that nobody here wrote.

    python benchmarks/names.py RWKU_FOLDER [--half choose|confirm] [--only 001 ...] [--least 4] [--base GGUF] [--list]
                               [--set FIELD=VALUE ...] [--abstain] [--dtype D] [--kept]

RWKU_FOLDER holds RWKU's files of one subject each (001_stephen_king.json). Measured are those of which the base knows
the answer to at least --least questions: it says it, and not of a made-up name in the subject's place as well. Every
other file is of the half to choose by, the others confirm. A line a subject, with what `unlearn-peft forget NAME` does
(train, no report): forget rows; RWKU's questions that the base answers, and those of them that it still does; the
chance that one of 8 samples at temperature 1 names the answer, before and with, for all that it answers and for what it
knows; the worst kind of question; questions on its neighbours that the base answers, and those of them that it still
does; KL to the base, nats/token, on its answers to all questions of level 2 on neighbours, on those of them that don't
name the subject (of da Vinci's neighbours the Mona Lisa is one), and on neutral text; minutes of asking and of
training. Each goes to out/names.jsonl at once: numbers and settings only; --kept shows the newest line of each subject,
base and setting in it, and runs nothing.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from passage import NEUTRAL

from unlearn_peft import forget, forgetting, load_base, load_recipe, unlearn
from unlearn_peft.data.words import said
from unlearn_peft.errors import UnknownSubject
from unlearn_peft.evaluate.score import per_token, sums
from unlearn_peft.evaluate.suites.rwku import KIND, answered_by, measure, name_parts, read_rwku, worst_kind
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference
from unlearn_peft.inference.generate import answers

ROOT = Path(__file__).parent.parent
HEAD = (
    "| subject | base | forget rows | questions answered: before, with | leak@8: before, with | of what it knows | "
    "worst kind | neighbours' answered: before, with | KL: neighbours, without the name, neutral | "
    "minutes: asking, training |\n"
    f"{'|---' * 10}|"
)
TOKENS = 40  # of an answer on a neighbour


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of RWKU's files")
    parser.add_argument("--kept", action="store_true", help="show what --output holds")
    parser.add_argument("--half", choices=["choose", "confirm"], help="all by default")
    parser.add_argument("--only", nargs="+", metavar="NUMBER", help="subjects by the number their file begins with")
    parser.add_argument("--least", type=int, default=4, help="questions of which the base must know the answer")
    parser.add_argument("--list", action="store_true", help="only say how many questions the base answers of each")
    parser.add_argument("--base", default="demo", help="as load_base takes it; demo by default")
    parser.add_argument("--set", action="append", default=[], help="override a field of the recipe; repeatable")
    parser.add_argument("--abstain", action="store_true", help="teach the questions a refusal")
    parser.add_argument("--dtype", default="auto", help="of the base; bfloat16 is faster where the CPU has it")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "names.jsonl")
    args = parser.parse_args()
    if args.least < 1:
        parser.error(f"--least is {args.least}: expected at least 1, a base that answers nothing has nothing to forget")
    if args.kept:
        newest = {}
        for one in map(json.loads, args.output.read_text().splitlines()):
            newest[(one["subject"], one["base"], one["abstain"], *one["set"])] = one
        print(HEAD, *map(line, newest.values()), sep="\n")
        return
    if args.folder is None:
        parser.error("expected the folder of RWKU's files")
    base = load_base(args.base, args.dtype)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.list:
        print(HEAD)
    for n, path in enumerate(sorted(args.folder.glob("*.json"))):
        number = path.stem.partition("_")[0]
        half = ("choose", "confirm")[n % 2]
        if args.only and number not in args.only or args.half not in (None, half):
            continue
        rows = read_rwku(path)
        answered = answered_by(base, rows)
        if args.list:
            print(f"{path.stem}: {answered.told(rows)}", flush=True)
            continue
        if len(answered.known) < args.least:
            continue
        settings = {"base": args.base, "set": args.set, "abstain": args.abstain, "dtype": args.dtype}
        one = {"subject": number, "half": half, **settings, **forgotten(base, rows[0]["subject"], rows, answered, args)}
        with args.output.open("a") as file:
            file.write(json.dumps({**one, "finished": time.time()}) + "\n")
        print(line(one), flush=True)


def forgotten(base, name, rows, answered, args):
    """Forget a subject by its name, and count before and with the adapter."""
    near = [row for row in rows if "neighbour" in row and row["level"] == 2]
    kept = [
        {"prompt": row["prompt"], "completion": text}
        for row, text in zip(near, answers(base, [row["prompt"] for row in near], max_new_tokens=TOKENS), strict=True)
        if text.strip()
    ]
    without = [n for n, row in enumerate(kept) if not said(row["completion"], name_parts(name))]
    held = {"neighbours": kept, "neutral": [{"text": text} for text in NEUTRAL]}
    references = {what: keep_reference(base, some, what=what) for what, some in held.items()}
    before = measure(base, rows, answered)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = forget(
                name, base=base, base_name=args.base, output=f"{folder}/subject", abstain=args.abstain, review=True,
                quiet=True,
            )  # fmt: skip
        except UnknownSubject:
            return {"forget_rows": 0, **figures("before", before, answered)}
        asking = time.monotonic() - began
        recipe = load_recipe(done.folder / "recipe.yaml", args.set, output=f"{folder}/adapter")
        adapter = unlearn(base, recipe=recipe, quiet=True)
        with forgetting(base, adapter.path):
            after = measure(base, rows, answered)
            summed = {
                what: sums(kl_to_reference(base, some, references[what], what=what)) for what, some in held.items()
            }
    near_kl = {"without the name": per_token(summed["neighbours"][without])} if without else {}
    kl = {"neighbours": per_token(summed["neighbours"]), **near_kl, "neutral": per_token(summed["neutral"])}
    minutes = {"asking": asking / 60, "training": adapter.metrics["training_seconds"] / 60}
    return {
        "forget_rows": done.forget_rows, **figures("before", before, answered), **figures("with", after, answered),
        "kl": kl, "minutes": minutes,
    }  # fmt: skip


def figures(state, scores, answered):
    """Return what a line shows of the suite's figures in one state."""
    value = {score.name: score.value for score in scores}
    right = {what: sum(score.value * score.n for score in scores if score.name.startswith(f"rwku_{what}_level_")
                       and score.name.endswith("_right")) for what in ("forget", "neighbours")}  # fmt: skip
    worst = worst_kind(scores)
    return {
        "n": {"forget": len(answered.about), "known": len(answered.known), "neighbours": len(answered.near)},
        state: {
            **{what: round(count) for what, count in right.items()},
            "leak@8": value["rwku_leak@8"],
            "known_leak@8": value["rwku_known_leak@8"],
        },
        "worst": [worst.name, worst.value, worst.n] if worst else None,
    }


def line(one):
    """Format one row of the table."""
    before, after, n = one["before"], one.get("with"), one["n"]
    which = f"{one['subject']} | {Path(one['base']).stem}{', abstain' if one['abstain'] else ''}"
    which = ", ".join([which, *one["set"]])
    if after is None:
        return f"| {which} | nothing known | {n['forget']} | {before['leak@8']:.0%} | | | {n['neighbours']} | | |"
    kind, share, count = one["worst"]
    kl = ", ".join(f"{value:.4f}" for value in one["kl"].values())
    return (
        f"| {which} | {one['forget_rows']} | {before['forget']}, {after['forget']} | {before['leak@8']:.0%}, "
        f"{after['leak@8']:.0%} | {before['known_leak@8']:.0%}, {after['known_leak@8']:.0%} of {n['known']} | "
        f"{kind.removeprefix(KIND).removesuffix('_right')}: {share:.0%} of {count} | "
        f"{before['neighbours']}, {after['neighbours']} | {kl} | "
        f"{one['minutes']['asking']:.1f}, {one['minutes']['training']:.1f} |"
    )


if __name__ == "__main__":
    main()
