"""How does the time of a step grow with tokens, vocabulary, rank and the number of adapters?

    python benchmarks/sweep.py [--base demo] [--steps 3] [--small]

Random weights in the base's shape, rows of 64 random tokens, all targets, nothing shared. One quantity varies, the
others stay: 512 tokens a step, the base's vocabulary, rank 8, one adapter. Median of --steps steps after an epoch.
Prints one JSON object: quantity -> kind of adapter -> [[its value, s a step], ...].
"""

import argparse
import copy
import gc
import json
import sys
import time
from statistics import median
from types import SimpleNamespace

import torch
from train_rows import TOKENS
from train_sides import recipe_of, run_steps

from unlearn_peft import load_base
from unlearn_peft.data.tokenize import Example
from unlearn_peft.models.base import Base, freeze
from unlearn_peft.training.examples.build import Sets

KINDS = ("head", "top8", "lora")
AXES = {
    "tokens": (128, 256, 512, 1024, 2048),
    "vocabulary": (8192, 16384, 32768, 65536, 131072),
    "rank": (1, 4, 16, 64),
    "adapters": (1, 2, 4, 8),
}
SMALL = {"tokens": (128, 256), "vocabulary": (500,), "rank": (2,), "adapters": (1, 2)}  # for a test


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo", help="whose shape to take")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few values, to see that all runs")
    args = parser.parse_args()
    config = load_base(args.base, device="cpu").model.config
    found = {}
    for axis, values in (SMALL if args.small else AXES).items():
        for kind in KINDS:
            for value in values:
                seconds = point(config, kind, args.steps, **{axis: value})
                print(f"{kind}, {axis} {value}: {seconds:.3g} s", file=sys.stderr, flush=True)
                found.setdefault(axis, {}).setdefault(kind, []).append([value, seconds])
    print(json.dumps(found))


def point(config, kind, steps, tokens=512, vocabulary=None, rank=8, adapters=1):
    """Return the median seconds of a step."""
    base, batch = random_base(config, vocabulary or config.vocab_size), tokens // TOKENS // 2
    recipe = recipe_of(kind, config, r=rank, batch=batch)
    pairs = [(recipe, random_sets(base.model.config.vocab_size, 2 * batch)) for _ in range(adapters)]
    step = run_steps(base, pairs)
    seconds = []
    for _ in range(2 + steps):  # two steps are an epoch, in which caches are filled
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    del base, step
    gc.collect()
    return median(seconds[2:])


def random_base(config, vocabulary, device="cpu", dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    freeze(model)
    return Base(model, SimpleNamespace(pad_token_id=0, eos_token_id=0, get_vocab=dict), "random")


def random_sets(vocabulary, count, width=TOKENS, targets=TOKENS - 1):
    """Return `count` forget rows of random tokens, the last `targets` of which count, and as many retain rows."""
    counted = [False] * (width - targets) + [True] * targets

    def rows():
        return [Example(row, counted) for row in torch.randint(vocabulary, (count, width)).tolist()]

    return Sets(rows(), rows(), held_out=[])


if __name__ == "__main__":
    main()
