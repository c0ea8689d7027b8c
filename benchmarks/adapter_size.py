"""How small can a forget adapter get? Size against what is forgotten and what that costs.

    python benchmarks/adapter_size.py [ADAPTER] [--samples 4]

Shrinks the demo's adapter (out/harry_potter, `make demo`) in every way that `unlearn-peft shrink` knows, measures each
on the demo's rows, prints a table, and writes it into docs/adapter_size.md and docs/adapter_size.png. It takes minutes.
"""

import argparse
import re
import tempfile
from pathlib import Path

import torch

from unlearn_peft import forgetting, load_base, read_bundle
from unlearn_peft.adapters.transform.shrink import shrink
from unlearn_peft.data.rows import read_rows
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference, row_tokens
from unlearn_peft.inference.generate import answers, leaked, sampled
from unlearn_peft.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "adapter_size.md", ROOT / "docs" / "adapter_size.png"
RANKS = (16, 8, 4, 2, 1)
WAYS = ((None, RANKS), (8, RANKS[:2]), (4, RANKS))  # bits, ranks
TITLES = (
    "rank", "bits", "weights, kB", "forget loss, nats/token", "greedy leaks", "sampled leaks",
    "neighbour KL, nats/token", "error, mean", "error, worst",
)  # fmt: skip


def measure(base, rows, reference, samples):
    """Return what the model does now: forget loss, leaking answers, KL to the base on the neighbours."""
    losses = [-row.answer(row.log_p) for row in row_tokens(base, rows["forget"], what="forget")]  # as `eval` has it
    prompts, words = [row["prompt"] for row in rows["probes"]], [row["leak"] for row in rows["probes"]]
    greedy = answers(base, prompts, max_new_tokens=40)
    several = sampled(base, prompts, count=samples, max_new_tokens=40)
    return {
        "loss": float(torch.cat(losses).mean()),
        "greedy": sum(bool(leaked(text, some)) for text, some in zip(greedy, words, strict=True)),
        "sampled": sum(
            bool(leaked(text, some)) for texts, some in zip(several, words, strict=True) for text in texts
        ),
        "kl": float(torch.cat(kl_to_reference(base, rows["neighbours"], reference)).mean()),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", nargs="?", default=ROOT / "out" / "harry_potter", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="answers sampled for each probe")
    args = parser.parse_args()
    recipe = load_recipe(ROOT / "recipes" / "harry_potter.yaml")
    rows = {name: read_rows(getattr(recipe, name), name) for name in ("forget", "probes", "neighbours")}
    base = load_base("demo")
    reference = keep_reference(base, rows["neighbours"])
    bundle = read_bundle(args.adapter)
    full = max(delta.rank for delta in bundle.deltas.values())
    found = [{"rank": "-", "bits": "-", "bytes": 0, "errors": (0, 0), **measure(base, rows, reference, args.samples)}]
    print("base", found[0], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for bits, ranks in WAYS:
            for rank in (rank for rank in ranks if rank <= full):
                place, errors = Path(folder) / f"{rank}-{bits}", (0.0, 0.0)
                if bits is None and rank == full:
                    place = args.adapter
                else:
                    made = shrink(args.adapter, place, rank=rank, bits=bits)
                    errors = made.mean, made.worst[1]
                with forgetting(base, place):
                    now = measure(base, rows, reference, args.samples)
                size = (place / "adapter_model.safetensors").stat().st_size
                found.append({"rank": rank, "bits": bits or 16, "bytes": size, "errors": errors, **now})
                print(found[-1], flush=True)
    write(found, len(rows["probes"]), args.samples, full)


def write(found, probes, samples, full):
    """Write the table into the page, and draw it."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for row in found:
        base = row["rank"] == "-"
        cells = (
            "base alone" if base else row["rank"], row["bits"], f"{row['bytes'] / 1e3:,.0f}", f"{row['loss']:.3f}",
            f"{row['greedy']}/{probes}", f"{row['sampled']}/{probes * samples}", f"{row['kl']:.4f}",
            *(("-", "-") if base else (f"{100 * error:.2g} %" for error in row["errors"])),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if skipped := [rank for rank in RANKS if rank > full]:
        lines += ["", f"The adapter has rank {full}, so that rank {', '.join(map(str, skipped))} would be the same."]
    table = "\n".join(lines)
    print(table)
    between = re.compile("(<!-- table -->).*(<!-- /table -->)", re.DOTALL)
    text = between.sub(lambda found: f"{found[1]}\n{table}\n{found[2]}", PAGE.read_text())
    PAGE.write_text(text)
    draw([row for row in found if row["rank"] != "-"], found[0], probes * samples)


def draw(found, base, count):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    parts = (
        ("loss", "forget loss, nats/token: up is forgotten", 1),
        ("sampled", "sampled answers that leak, %", 100 / count),
        ("kl", "neighbour KL, nats/token: low is unharmed", 1),
    )  # fmt: skip
    for axes, (key, title, factor) in zip(panels, parts, strict=True):
        for bits, color in ((16, "#34495e"), (8, "#2471a3"), (4, "#c0392b")):
            some = [row for row in found if row["bits"] == bits]
            sizes = [row["bytes"] / 1e3 for row in some]
            axes.plot(sizes, [factor * row[key] for row in some], "o-", color=color, label=f"{bits} bits")
            for row in some:
                spot = (row["bytes"] / 1e3, factor * row[key])
                axes.annotate(f"r{row['rank']}", spot, xytext=(3, 4), textcoords="offset points", fontsize=7)
        axes.axhline(factor * base[key], color="grey", ls=":", label="base alone")
        axes.set(xscale="log", xlabel="weights file, kB", title=title)
        axes.set_xticks(ticks := (125, 250, 500, 1000, 2000), labels=[str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
