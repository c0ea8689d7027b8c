"""What other threads cost the one that runs the model, in one run: the demo's base, float32, a row at a time.

    python benchmarks/serve_threads.py [--steps 12] [--page]

Each line is a process of its own, with the median seconds of a step as times those of the first line's. Loaded is the
base in the main thread, which then keeps OpenMP's workers, or in one that ends (`serve/engine/threads.py`); another
thread sleeps meanwhile, or runs Python, with that interval of switching. `--page` writes the table into
docs/serving.md.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from threading import Event, Thread

from readme import put

LINES = [  # where the base is loaded, the switch interval, what another thread does
    ("ends", 5e-5, ""),
    ("main", 5e-3, ""),
    ("ends", 5e-5, "busy"),
    ("main", 5e-3, "busy"),
    ("ends", 5e-3, "busy"),
    ("main", 5e-5, "busy"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--page", action="store_true", help="write the table into docs/serving.md")
    parser.add_argument("--line", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line is not None:
        print(seconds(*LINES[args.line], args.steps))
        return
    took = []
    for line in range(len(LINES)):
        command = [sys.executable, __file__, "--line", str(line), "--steps", str(args.steps)]
        took.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    head = "| the base was loaded in | another thread | switch interval, ms | a step takes |\n|---|---|---|---|"
    where, what = {"ends": "a thread that ends", "main": "the main thread"}, {"": "sleeps", "busy": "runs Python"}
    rows = [
        f"| {where[loaded]} | {what[busy]} | {interval * 1e3:g} | {one / took[0]:.1f} |"
        for (loaded, interval, busy), one in zip(LINES, took, strict=True)
    ]
    table = "\n".join([head, *rows])
    print(table)
    if args.page:
        put(Path(__file__).parent.parent / "docs" / "serving.md", "threads", table)


def seconds(loaded, interval, busy, steps):
    from unlearn_peft import load_base
    from unlearn_peft.inference.model_runner import ModelRunner
    from unlearn_peft.serve.engine.threads import in_own_thread

    def load():
        return ModelRunner(load_base("demo", "float32", "cpu").model)

    def run():
        batch, logits = runner.prefill([list(range(5, 60))])
        took = []
        for _ in range(steps):
            batch.newest = logits.argmax(-1)[:, None]
            began = time.perf_counter()
            logits = runner.step(batch)
            took.append(time.perf_counter() - began)
        return median(took)

    def other():
        while not over.is_set():
            sum(n * n for n in range(1000)) if busy else over.wait(0.1)

    runner, over = in_own_thread(load) if loaded == "ends" else load(), Event()
    sys.setswitchinterval(interval)
    Thread(target=other).start()
    try:
        return in_own_thread(run)
    finally:
        over.set()


if __name__ == "__main__":
    main()
