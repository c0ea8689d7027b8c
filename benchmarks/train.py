"""What does a step of training cost, beside other ways of doing the same? On SmolLM2-135M, CPU, float32.

    python benchmarks/train.py [SIDE ...] [--rows text] [--steps 7] [--json]

A step: gradient ascent on 4 forget rows, KL to the base on 4 retain rows, 64 tokens each (train_rows.py). The sides
are in train_sides.py: `original`, `full`, `peft_head`, `peft_lora` are others' ways; `head`, `top8` (layers), `lora`
(all layers) are ours, `eight_head` and `eight_top8` ours with eight adapters in one run.

Each side is a process of its own. The processes of a group take turns, a step each, so that only one computes at a
time and whatever slows the machine slows all: a ratio is the median over the turns. Not counted are the first two
steps, in which each row is seen for the first time and ours fills its caches: they have a column of their own.

Peak memory is the process's peak resident set: Python and its libraries (a column of its own), loading the base from
its file (whose mapped pages count while they are read), the model or models, caches, and all steps.
"""

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from statistics import median

GROUPS = (("original", "peft_head", "head", "eight_head"), ("full", "peft_lora", "lora", "top8", "eight_top8"))
WARM_UP = 2  # steps: one epoch
FIGURES = {  # name -> (quantity, over, under)
    "head_speedup_vs_original": ("seconds", "original", "head"),
    "head_memory_vs_original": ("peak_bytes", "head", "original"),
    "top8_speedup_vs_full": ("seconds", "full", "top8"),
    "lora_speedup_vs_full": ("seconds", "full", "lora"),
    "lora_memory_vs_full": ("peak_bytes", "lora", "full"),
    "top8_memory_vs_full": ("peak_bytes", "top8", "full"),
    "eight_head_cost": ("seconds", "eight_head", "head"),
    "eight_top8_cost": ("seconds", "eight_top8", "top8"),
}
BESIDE_PEFT = {
    "head_speedup_vs_peft_head": ("seconds", "peft_head", "head"),
    "lora_speedup_vs_peft_lora": ("seconds", "peft_lora", "lora"),
    "head_memory_vs_peft_head": ("peak_bytes", "head", "peft_head"),
    "lora_memory_vs_peft_lora": ("peak_bytes", "lora", "peft_lora"),
}
# Imports torch only in the processes of the sides: a process begins with its parent's peak memory.


def main():
    names = [side for group in GROUPS for side in group]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", metavar="SIDE", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--rows", choices=("chat", "text"), default="chat", help="what the rows are (train_rows.py)")
    parser.add_argument("--steps", type=int, default=7, help="turns that are counted")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--side", choices=names, help=argparse.SUPPRESS)  # be the process of one side
    args = parser.parse_args()
    if args.side:
        from train_sides import serve

        return serve(args.side, args.rows, args.base)
    if unknown := set(args.sides) - set(names):
        parser.error(f"unknown: {', '.join(unknown)}. The sides are {', '.join(names)}")
    found = measure(args.sides or names, args.rows, args.base, args.steps)
    print("\n".join(table(found)))
    if args.json:
        print(json.dumps({name: figure(found, name) for name in FIGURES}))


def measure(sides, rows, base, steps):
    """Return what each side took: side -> its first line, `seconds` of each step, `warm_up` and the memory, bytes."""
    found = {}
    for group in GROUPS:
        with ExitStack() as stack:
            present = [stack.enter_context(Side(side, rows, base)) for side in group if side in sides]
            turns = [[side.step() for side in present] for _ in range(WARM_UP + steps)]
            losses = [turn["forget_loss"] for turn in turns[0] if turn["forget_loss"] is not None]
            if losses and max(losses) - min(losses) > 1e-3 * max(losses):
                sys.exit(f"the sides do not begin alike: forget losses {losses} nats/token")
            for n, side in enumerate(present):
                seconds = [turn[n]["seconds"] for turn in turns]
                side.figures |= {"warm_up": sum(seconds[:WARM_UP]), "seconds": seconds[WARM_UP:], **side.end()}
            found |= {side.name: side.figures for side in present}
    return found


class Side:
    """The process of one side, which takes a step only when asked for one."""

    def __init__(self, name, rows, base):
        self.name, self.figures = name, {}
        self.command = [sys.executable, __file__, "--side", name, "--rows", rows, "--base", base]

    def __enter__(self):
        print(f"{self.name} ...", file=sys.stderr, flush=True)
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.figures = self.heard()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def step(self):
        """Have it do one step; returns what that took and found."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.heard()

    def end(self):
        """Have it end; returns its memory."""
        self.process.stdin.close()
        return self.heard()

    def heard(self):
        """Return its next line."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the side '{self.name}' ended with {self.process.wait()}: see above")
        return json.loads(line)


def figure(found, name):
    """Return one ratio, or None where one of its sides was not measured."""
    every = ratios(found, *{**FIGURES, **BESIDE_PEFT}[name])
    return median(every) if every else None


def ratios(found, quantity, over, under):
    """Return the ratio of each turn (of memory: the one there is)."""
    if not all(quantity in found.get(side, {}) for side in (over, under)):
        return []
    a, b = found[over][quantity], found[under][quantity]
    return [x / y for x, y in zip(a, b, strict=True)] if quantity == "seconds" else [a / b]


def table(found):
    """Return the lines of two tables: each side, then the ratios."""
    one = next(iter(found.values()))
    lines = [
        f"A step: {one['tokens']} tokens, of them targets {one['forget_targets']:.0f} (forget) and "
        f"{one['retain_targets']:.0f} (retain); all rows begin with the same {one['shared']} tokens. "
        f"{len(one['seconds'])} steps each, {one['threads']} threads.",
        "",
        "| side | s a step: median (least to most) | first two steps, s | peak memory, MB | when loaded | libraries |",
        "|---|---|---|---|---|---|",
    ]
    for side, f in found.items():
        s = f["seconds"]
        memory = " | ".join(f"{f[key] / 1e6:.0f}" for key in ("peak_bytes", "loaded_bytes", "libraries_bytes"))
        lines.append(f"| {side} | {median(s):.3g} ({min(s):.3g} to {max(s):.3g}) | {f['warm_up']:.3g} | {memory} |")
    lines += ["", "| ratio | median | least to most of a turn |", "|---|---|---|"]
    for name, what in {**FIGURES, **BESIDE_PEFT}.items():
        if every := ratios(found, *what):
            spread = f"{min(every):.3g} to {max(every):.3g}" if len(every) > 1 else ""
            lines.append(f"| {name} | {median(every):.3g} | {spread} |")
    return lines


if __name__ == "__main__":
    main()
