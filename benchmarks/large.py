r"""What does a step cost on a GPU, on models larger than the demo's? Measured beside projection.py's arithmetic.

    python benchmarks/large.py [--models TinyLlama-1.1B Llama-3.1-8B] [--ways head top8 lora original full] [--small]

Random weights in the models' shapes, bfloat16; random rows, nothing shared: 16 rows of 256 tokens a step, of each row
the last 128 are targets. What is computed does not depend on the weights' values. A way that projection.py says does
not fit the GPU's memory is left out. Each way is a process of its own. Peak memory is what PyTorch's allocator held at
the most, after the weights were made. Prints one JSON object: model -> way -> figures.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

from floor import Shape
from projection import MODELS, ROWS, STEP, WAYS, memory

DEVICE, CACHE_GB = "cuda", 30  # what is kept of the frozen base stays on the GPU up to this
SMALL = Shape(64, 4, 4, 2, 16, 128, 1000, tied=False)  # to see that all runs, on a CPU too; in float32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the data set, forget and retain together")
    parser.add_argument("--steps", type=int, default=10, help="that are counted, after three others")
    parser.add_argument("--small", action="store_true", help="one tiny model, on any machine, to see that all runs")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # be the process of one way
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measured(args.models[0], args.ways[0], args)))
    found = {}
    for name in args.models:
        for way in args.ways:
            command = [sys.executable, __file__, "--one", "--models", name, "--ways", way]
            command += ["--rows", str(args.rows), "--steps", str(args.steps), *(["--small"] if args.small else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            last = done.stdout.splitlines()[-1] if done.stdout.strip() else "{}"
            figures = json.loads(last) if done.returncode == 0 else {"failed": done.returncode}
            print(f"{name}, {way}: {figures}", file=sys.stderr, flush=True)
            found.setdefault(name, {})[way] = figures
    print(json.dumps(found))


def measured(name, way, args):
    """Return one way's figures: seconds of the counted steps, of keeping what is frozen, peak memory in bytes."""
    import torch

    shape, device = (SMALL, "cpu") if args.small else (MODELS[name], DEVICE)
    needed = sum(memory(way, shape).values())
    there = float("inf") if args.small else torch.cuda.get_device_properties(0).total_memory
    if needed > there:
        return {"left out": f"needs {needed / 1e9:.0f} GB, of {there / 1e9:.0f}"}
    from sweep import random_base, random_sets
    from train_sides import SIDES, recipe_of, run_steps

    base = random_base(config_of(shape), shape.vocabulary, device, torch.float32 if args.small else torch.bfloat16)
    rows = STEP.tokens // STEP.width  # of a step, half of them forget rows
    batch = rows // 2
    sets = random_sets(shape.vocabulary, args.rows // 2, STEP.width, int(STEP.targets / rows))
    wait = (lambda: None) if args.small else torch.cuda.synchronize
    began = time.perf_counter()
    if way in ("original", "full"):
        step = SIDES[way](base, sets, batch)
    else:
        recipe = recipe_of(way, base.model.config, batch=batch).model_copy(update={"cache_gb": CACHE_GB})
        step = run_steps(base, [(recipe, sets)])
    wait()
    kept, seconds = time.perf_counter() - began, []
    for _ in range(3 + args.steps):
        began = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - began)
    found = {"seconds": median(seconds[3:]), "before": kept + sum(seconds[:3]), "rows": args.rows}
    if args.small:
        return found
    return {**found, "peak_bytes": torch.cuda.max_memory_allocated(), "gpu": torch.cuda.get_device_name()}


def config_of(shape):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.inner,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip


if __name__ == "__main__":
    main()
