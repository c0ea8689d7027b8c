"""What forgets best at equal harm? Every objective on every kind of adapter, on the demo's target.

    python benchmarks/frontier.py [--variants ga_kl npo ...] [--adapters lora head] [--jobs 2] [--kept]

Each is trained once as the demo is (no budget: the last step is kept) and attached with several strengths. For each
strength: forgetting, the share of answers to the probes (paraphrases never trained on) that name what was to be
forgotten, 8 sampled at temperature 1 for each; harm, the mean KL to the base on the neighbours (never trained on),
nats/token; and the perplexity of the greedy answers under the base: more than twice the base's own is word salad, and
does not count as forgetting. Prints the best of each at some amounts of harm and draws --picture (extra report).

Learning rate, retain weight and steps are those found for ga_kl: the others might do better with their own. Each
line is kept in --output: run the same command again and it goes on. About 2 minutes a variant and adapter on 2 cores;
--jobs N runs N of them side by side, each on its share of the cores.
"""

import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jobs import add_arguments, keep, make_missing
from variants import VARIANTS, file_name

from unlearn_peft import forgetting, load_base, load_recipe, unlearn
from unlearn_peft.data.rows import read_rows
from unlearn_peft.errors import RecipeError
from unlearn_peft.evaluate.metrics.fluency import losses_under_base
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference
from unlearn_peft.files.atomic import atomic_file
from unlearn_peft.inference.generate import answers, leaked, sampled
from unlearn_peft.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
ADAPTERS = {"lora": {"kind": "lora"}, "head": {"kind": "head", "r": 8}}
STRENGTHS = (0.5, 0.75, 1.0)
SAMPLES, TOKENS = 8, 32
DEFAULTS = ("objective", "retain_weight", "retain_batch", "retain_answers")  # the package's own, not the recipe's
HARM = (0.003, 0.01, 0.02, 0.05)  # nats/token
SALAD = 2  # times the base's own perplexity


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", default=list(VARIANTS),
                        help=f"of {'; '.join(VARIANTS)}; all by default")  # fmt: skip
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "frontier")
    parser.add_argument("--kept", action="store_true", help="load no model: table and picture of what is kept already")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "frontier.png")
    args = parser.parse_args()
    defaults = {name: Recipe.model_fields[name].get_default(call_default_factory=True) for name in DEFAULTS}
    recipe = load_recipe(ROOT / "recipes" / "harry_potter.yaml", **defaults)
    rows = {name: read_rows(getattr(recipe, name), name) for name in ("forget", "retain", "probes", "neighbours")}
    settings = recipe.model_dump(mode="json", exclude={"output", "cache_gb", "compile", "quantize", *rows})
    key = json.dumps([rows, settings, STRENGTHS, SAMPLES, TOKENS])
    folder = args.output / hashlib.sha256(key.encode()).hexdigest()[:12]
    make_here = partial(make, rows=rows, folder=folder)
    if args.line:
        return make_here([args.line])
    pairs = {f"{variant} on {kind}": (variant, kind) for variant in args.variants for kind in args.adapters}
    places = {name: place_of(name, folder) for name in ("base", *pairs)}
    failed = [] if args.kept else make_missing(__file__, places, args.jobs, make_here)
    found = {name: json.loads(place.read_text()) for name, place in places.items() if place.is_file()}
    if "base" in found:
        show(found["base"], {pair: found.get(name, []) for name, pair in pairs.items()}, args.picture)
    elif args.kept:
        sys.exit(f"the base is not measured yet in {folder}: run the command without --kept")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the rest is kept: run the command again to go on")


def place_of(name, folder):
    """Return the file of the line `base`, or `VARIANT on KIND`."""
    variant, _, kind = name.rpartition(" on ")
    return folder / (f"{kind}_{file_name(variant)}.json" if variant else f"{name}.json")


def make(names, rows, folder):
    """Measure and keep one line after the other."""
    if not names:
        return
    base = load_base("demo")
    reference = keep_reference(base, rows["neighbours"])
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        variant, _, kind = name.rpartition(" on ")
        found = points(base, rows, reference, variant, kind, folder) if variant else look(base, rows, reference)
        keep(place_of(name, folder), found)


def show(bare, lines, picture):
    """Print the points, the table and draw the picture; `lines`: points, if there are any, by variant and kind."""
    print(f"base: {figures(bare)}")
    for (variant, kind), found in lines.items():
        for point in found:
            print(f"{variant} on {kind}, strength {point['strength']}: {figures(point)}")
    limit = SALAD * bare["perplexity"]
    table(lines, limit)
    draw(picture, lines, bare, limit)


def points(base, rows, reference, variant, kind, folder):
    """Train once, look at it with each strength; no points where the adapter is none for the objective."""
    fields = dict(VARIANTS[variant])
    fields["objective"] = {**fields["objective"], "retain_budget": None}
    where = folder / "adapters" / f"{kind}_{file_name(variant)}"
    try:
        adapter = unlearn(
            base, forget=rows["forget"], retain=rows["retain"], adapter=ADAPTERS[kind], eval_every=1000,
            quiet=True, resume=True, output=str(where), **fields,
        )  # fmt: skip
    except RecipeError as error:  # rmu cannot be had on a head; the message says why
        print(f"{variant} on {kind}: {error}", file=sys.stderr)
        return []
    found = []
    for strength in STRENGTHS:
        with forgetting(base, adapter.path, strength=strength):
            found.append({"strength": strength, **look(base, rows, reference)})
    return found


def look(base, rows, reference):
    prompts, words = ([row[key] for row in rows["probes"]] for key in ("prompt", "leak"))
    how = {"max_new_tokens": TOKENS}
    texts = sampled(base, prompts, count=SAMPLES, **how)
    greedy = answers(base, prompts, **how)
    losses = np.concatenate([loss.numpy() for loss in losses_under_base(base, prompts, greedy)] or [[0.0]])
    return {
        "leak_share": float(np.mean([bool(leaked(t, w)) for ts, w in zip(texts, words, strict=True) for t in ts])),
        "greedy_leaks": sum(bool(leaked(t, w)) for t, w in zip(greedy, words, strict=True)),
        "neighbour_kl": float(torch.cat(kl_to_reference(base, rows["neighbours"], reference)).mean()),
        "perplexity": float(np.exp(losses.mean())),
    }  # fmt: skip


def figures(point):
    return (
        f"{100 * point['leak_share']:.1f} % of samples leak, {point['greedy_leaks']} greedy answers, "
        f"neighbours' KL {point['neighbour_kl']:.4f} nats/token, perplexity under the base {point['perplexity']:.2f}"
    )


def table(lines, limit):
    """Print the least leak share of each within each amount of harm, the best line first."""
    print(f"\n| samples that leak, at a neighbours' KL of at most | {' | '.join(map(str, HARM))} |")
    print(f"|---|{'---|' * len(HARM)}")

    def least(points, harm):
        within = [p["leak_share"] for p in points if p["neighbour_kl"] <= harm and p["perplexity"] <= limit]
        return min(within, default=1.0)

    for (variant, kind), found in sorted(lines.items(), key=lambda item: [least(item[1], h) for h in HARM[::-1]]):
        cells = [f"{100 * least(found, h):.1f} %" if least(found, h) < 1 else "" for h in HARM]
        if any(cells):
            print(f"| {variant}, {kind} | {' | '.join(cells)} |")


def draw(path, lines, bare, limit):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(kind for _, kind in lines))
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(6.2 * len(kinds), 5.2), sharey=True, sharex=True, layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(variant for variant, _ in lines))
    colours = pyplot.get_cmap("tab20")
    for ax, kind in zip(axes[0], kinds, strict=True):
        for n, variant in enumerate(names):
            found = lines[variant, kind]
            if not found:
                continue
            x, y = ([max(p[key], floor) for p in found] for key, floor in (("neighbour_kl", 1e-4), ("leak_share", 0)))
            ax.plot(x, [100 * v for v in y], "-", color=colours(n % 20), lw=1.4, label=variant)
            for p, a, b in zip(found, x, y, strict=True):
                salad = p["perplexity"] > limit
                ax.plot(a, 100 * b, "o", color=colours(n % 20), mfc="none" if salad else colours(n % 20), ms=6)
        ax.axhline(100 * bare["leak_share"], color="grey", ls=":", lw=1)
        ax.set(xscale="log", title=f"{kind} adapter", xlabel="harm: neighbours' KL to the base, nats/token")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("sampled answers that leak, % (dotted: the base)")
    named = {line.get_label(): line for ax in axes[0] for line in ax.get_lines() if line.get_label() in names}
    axes[0][-1].legend(named.values(), named, frameon=False, fontsize=8, loc="upper right")
    figure.suptitle("Down and left is better. A line is one adapter at strengths 0.5 to 1; hollow: word salad")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    main()
