"""Measure what training costs and what it could cost at the least, and write docs/performance.md's figures.

    python benchmarks/performance.py [PART ...] [--steps 7]

The parts are `rates` (rates.py), `chat` and `text` (train.py), `sweep` (sweep.py); all by default; and `large`
(large.py), by name only: it needs a GPU, and its file can be carried from there to another machine's --output. Each is
measured and kept in --output; then the section between the markers is written from what is kept, and the picture
drawn. With the part `none` nothing is measured. On a quiet machine only: 2 cores take about half an hour.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from floor import Shape, Step, parts, seconds
from projection import BANDWIDTH, CHUNK, OPERATIONS, ROWS, STEP, STREAMED, THIN, USED, WAYS, projections
from train import GROUPS, measure, table

ROOT = Path(__file__).parent.parent
PARTS, ON_GPU = ("rates", "chat", "text", "sweep"), "large"
AXES = {"tokens": "tokens a step", "vocabulary": "vocabulary", "rank": "rank", "adapters": "adapters in one run"}
EIGHT = {"eight_head": "head", "eight_top8": "top8"}  # eight adapters in one run
MISSING = "Not measured yet."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, {ON_GPU}, none")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--small", action="store_true", help="sweep few values, to see that all runs")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "performance", help="what is measured")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, ON_GPU, "none"}:
        parser.error(f"unknown: {', '.join(unknown)}. The parts are {', '.join(PARTS)}, {ON_GPU}, none")
    args.output.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        if part != "none":
            found = {"machine": machine(), "found": measured(part, args)}
            (args.output / f"{part}.json").write_text(json.dumps(found))
    places = {part: args.output / f"{part}.json" for part in (*PARTS, ON_GPU)}
    kept = {part: json.loads(path.read_text()) for part, path in places.items() if path.is_file()}
    picture = args.doc.with_suffix(".png")
    if "sweep" in kept:
        draw(picture, kept["sweep"]["found"])
    write(args.doc, section(kept, picture.name))


def measured(part, args):
    if part in ("chat", "text"):
        return measure([side for group in GROUPS for side in group], part, args.base, args.steps)
    command = [sys.executable, Path(__file__).with_name(f"{part}.py")]
    command += [] if part == ON_GPU else ["--base", args.base]
    command += ["--small"] if part in ("sweep", ON_GPU) and args.small else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    """Return one line on where and when."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    date, load = time.strftime("%Y-%m-%d", time.gmtime()), os.getloadavg()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    cpu_name = names[0] if names else platform.machine()
    return f"{date}, {cpu_name}, {cores} cores, load {load:.1f} before the measurement, {versions}"


def section(kept, picture):
    """Return the generated section, Markdown."""
    lines = []
    for part, title in (("chat", "Chat rows, as the product sees them"), ("text", "Running text, nothing shared")):
        lines += [f"### {title}", ""]
        lines += [kept[part]["machine"] + ".", "", *table(kept[part]["found"])] if part in kept else [MISSING]
        lines.append("")
    lines += ["### Beside the floor", ""]
    lines += floors(kept) if "rates" in kept and ("chat" in kept or "text" in kept) else [MISSING]
    lines += ["", "### How it grows", ""]
    lines += [f"![s a step]({picture})", "", kept["sweep"]["machine"] + "."] if "sweep" in kept else [MISSING]
    return "\n".join([*lines, "", "### Larger models, one H100", "", *projected(kept.get(ON_GPU))])


def floors(kept):
    found = kept["rates"]["found"]
    shape = Shape(**found["shape"])
    rates = {name: found[name] * 1e9 for name in ("layer", "head", "thin", "copy")}
    shapes = {name: " x ".join(map(str, size)) for name, size in found["shapes"].items()}
    lines = [
        f"This machine ({kept['rates']['machine']}; {found['threads']} threads) multiplies "
        + ", ".join(f"{found[name]:.0f} GFLOP/s at {shapes[name]} ({name})" for name in shapes)
        + f", and copies {found['copy']:.1f} GB/s.",
        "",
        "| rows | way | GFLOP a step | GB moved | floor, s | measured, s | measured / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows in ("chat", "text"):
        for way in (*WAYS, *EIGHT):
            one = kept.get(rows, {}).get("found", {}).get(way, {})
            if "seconds" not in one:
                continue
            count = 8 if way in EIGHT else 1  # rows of its own for each adapter
            targets = (count * one[name] for name in ("forget_targets", "retain_targets"))
            step = Step(count * one["tokens"], one["width"], *targets, one["shared"])
            every = parts(EIGHT.get(way, way), shape, step)
            least, took = seconds(every, rates), median(one["seconds"])
            operations, moved = sum(part.operations for part in every), sum(part.bytes for part in every)
            lines.append(
                f"| {rows} | {way} | {operations / 1e9:.3g} | {moved / 1e9:.3g} | {least:.3g} | {took:.3g} | "
                f"{took / least:.2g} |"
            )
    return lines


def projected(kept):
    """Return the lines on larger models: arithmetic, and beside it what large.py found on a GPU, if it ran."""
    found = kept["found"] if kept else {}
    gpu = next((one["gpu"] for ways in found.values() for one in ways.values() if "gpu" in one), None)
    lines = [
        f"Computed is the arithmetic of `benchmarks/projection.py`. {STEP.tokens // STEP.width} rows of "
        f"{STEP.width} tokens a step, {STEP.targets:.0f} targets, a data set of {ROWS} rows, our logits {CHUNK} tokens "
        f"at once; bfloat16. Assumed: of {OPERATIONS / 1e12:.0f} TFLOP/s {100 * USED:.0f} % are used "
        f"({100 * THIN:.0f} % in thin products), of {BANDWIDTH / 1e12:.2f} TB/s {100 * STREAMED:.0f} %; launching "
        "kernels, which rules a step of a millisecond, is not counted.",
        "",
        f"Measured is `benchmarks/large.py` on one {gpu} ({kept['machine']}), random weights of these shapes, median "
        "of steps; its data set may be smaller, so its memory may be." if gpu else "None is measured yet.",
        "",
    ]  # fmt: skip
    every = projections()
    columns = list(every[0][3])
    lines.append(
        "| model | way | ms a step, measured | computed | memory, GB, measured | computed | "
        f"{' | '.join(f'of it {name}' for name in columns)} |"
    )
    lines.append("|---|---|---|---|---|---|" + "---|" * len(columns))
    for model, way, took, memory in every:
        one = found.get(model, {}).get(way, {})
        seen = [f"{1e3 * one['seconds']:.3g}", f"{one['peak_bytes'] / 1e9:.3g}"] if "seconds" in one else ["", ""]
        sizes = " | ".join(f"{memory[name] / 1e9:.2g}" for name in columns)
        computed = f"{1e3 * took:.3g}", f"{sum(memory.values()) / 1e9:.3g}"
        lines.append(f"| {model} | {way} | {seen[0]} | {computed[0]} | {seen[1]} | {computed[1]} | {sizes} |")
    return lines


def write(doc, section):
    """Put the section between the document's markers."""
    block = f"<!-- measured -->\n{section}\n<!-- /measured -->"
    text, count = re.subn("<!-- measured -->.*<!-- /measured -->", lambda _: block, doc.read_text(), flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{doc}: expected the markers <!-- measured --> and <!-- /measured --> once")
    doc.write_text(text)


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_found = [axis for axis in AXES if any(len(points) > 1 for points in found.get(axis, {}).values())]
    figure, axes = pyplot.subplots(
        1, len(axes_found), figsize=(3.6 * len(axes_found), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for ax, axis in zip(axes[0], axes_found, strict=True):
        for kind, points in found[axis].items():
            ax.plot(*zip(*points, strict=True), "o-", lw=1.4, ms=4, label=kind)
        ax.set(xscale="log", yscale="log", xlabel=AXES[axis])
        ticks = sorted({x for points in found[axis].values() for x, _ in points})
        ax.set_xticks(ticks, [str(x) for x in ticks], rotation=30)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("s a step")
    axes[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
