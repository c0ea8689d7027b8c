"""Write the figures of docs/comparison.md from what other benchmarks have kept; it measures nothing itself.

    python benchmarks/performance.py rates chat text          # writes out/performance/*.json
    python benchmarks/serve.py --json | tail -n 1 > out/serve.json
    python benchmarks/comparison.py [--adapter out/harry_potter]

What is missing is shown as not measured. On a quiet machine; see docs/performance.md for what is compared.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from floor import Shape
from performance import MISSING, ROOT, write

from unlearn_peft.files.atomic import folder_bytes

WAYS = {  # sides of train.py, see train_sides.py
    "original": "the original experiment: dense `lm_head`, a second model as the reference, SGD",
    "full": "full fine-tuning, a second model as the reference, AdamW",
    "peft_head": "PEFT alone, LoRA on `lm_head`",
    "peft_lora": "PEFT alone, LoRA on q and v of all layers",
    "head": "unlearn_peft, LoRA on `lm_head`",
    "lora": "unlearn_peft, LoRA on q and v of all layers",
    "top8": "unlearn_peft, LoRA on q and v of the upper 8 layers",
}
SERVED = {  # sides of serve.py
    "base": "the base alone, nothing forgotten",
    "singles": "unlearn_peft, an adapter a row",
    "peft": "PEFT alone, an adapter a row (`adapter_names`)",
    "sets": "unlearn_peft, a set of three a row",
    "one_by_one": "a set of three a row, one row after the other: what is left where a batch has one set",
    "crowd": "unlearn_peft, an adapter a row, of 1,000 known and 64 in memory",
}
CHANGES = {  # figures of serve.py
    "attach_ms": "attach from disk, verified",
    "swap_from_disk_ms": "swap for one from disk, verified",
    "swap_ms": "swap for one that was read before",
    "remove_ms": "remove",
    "switch_ms": "ask for another set of those in memory",
}
REQUESTS = 100  # sets that differ, to be kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=ROOT / "out", help="where performance/ and serve.json are")
    parser.add_argument("--adapter", type=Path, default=ROOT / "out" / "harry_potter", help="whose size is shown")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "comparison.md")
    args = parser.parse_args()
    parts = {name: read(args.kept / "performance" / f"{name}.json") for name in ("rates", "chat", "text")}
    size = folder_bytes(args.adapter) if (args.adapter / "adapter_config.json").is_file() else None
    write(args.doc, section(parts, read(args.kept / "serve.json"), size))


def read(path):
    """Return what a benchmark kept, or None."""
    return json.loads(path.read_text()) if path.is_file() else None


def section(parts, served, adapter_bytes):
    """Return the generated section, Markdown."""
    lines = []
    for part, title in (("chat", "A step of training, chat rows"), ("text", "The same, running text")):
        lines += [f"### {title}", "", *(training(parts[part]) if parts[part] else [MISSING]), ""]
    size = sizes(Shape(**parts["rates"]["found"]["shape"]), adapter_bytes) if parts["rates"] and adapter_bytes else None
    lines += ["### What is kept for each thing forgotten", "", *(size or [MISSING]), ""]
    return "\n".join([*lines, "### Serving", "", *(serving(served) if served else [MISSING])])


def training(kept):
    found = {way: side for way, side in kept["found"].items() if way in WAYS}
    full = found.get("full")
    lines = [f"{kept['machine']}.", "", "| way | s a step, median | beside full | peak memory, MB | beside full |"]
    lines.append("|---|---|---|---|---|")
    for way, what in WAYS.items():
        if one := found.get(way):
            took, memory = median(one["seconds"]), one["peak_bytes"]
            faster = f"{median(full['seconds']) / took:.3g} times as fast" if full else ""
            share = f"{100 * memory / full['peak_bytes']:.0f} %" if full else ""
            lines.append(f"| {what} | {took:.3g} | {faster} | {memory / 1e6:.0f} | {share} |")
    return lines


def sizes(shape, adapter_bytes):
    model = 2 * shape.parameters
    return [
        "The demo's adapter (rank 8 on all linear layers of the upper half), with manifest, card and curves, beside "
        f"the model's {shape.parameters / 1e6:.0f} million parameters in bfloat16.",
        "",
        f"| way | one | {REQUESTS} that differ |",
        "|---|---|---|",
        f"| full fine-tuning: a model each | {model / 1e6:.0f} MB | {REQUESTS * model / 1e9:.1f} GB |",
        f"| an adapter each, and one base | {adapter_bytes / 1e6:.2f} MB + {model / 1e6:.0f} MB | "
        f"{(REQUESTS * adapter_bytes + model) / 1e9:.2f} GB |",
    ]


def serving(found):
    rates = found["tokens_per_second"]
    lines = [f"8 rows in a batch, rank {found['rank']}, {found['threads']} threads, {found['turns']} turns.", ""]
    lines += ["| way | tokens/s | of the base alone |", "|---|---|---|"]
    lines += [
        f"| {what} | {rates[side]:.1f} | {100 * rates[side] / rates['base']:.0f} % |"
        for side, what in SERVED.items()
        if side in rates
    ]
    lines += ["", f"| change of what is forgotten, adapter: {found['adapter']} | ms, median of 21 |", "|---|---|"]
    return lines + [f"| {what} | {found[name]:.3g} |" for name, what in CHANGES.items() if name in found]


if __name__ == "__main__":
    main()
