"""How fast does this machine multiply and copy? float32, at the shapes of a training step; the best of several tries.

    python benchmarks/rates.py [--base demo]

Prints one JSON object: GFLOP/s of a matrix product (2mnk operations) for `layer` (512 tokens through a layer's widest
matrix), `head` (256 targets through the output head) and `thin` (256 targets, rank 8, to the vocabulary), and GB/s of
a copy (bytes read plus bytes written) that no cache can hold; and the base's shape (floor.py).
"""

import argparse
import json
import time

import torch
from floor import Shape

from unlearn_peft import load_base

TOKENS, TARGETS, RANK = 512, 256, 8
COPIED = 256_000_000  # bytes
TRIES, AT_LEAST = 7, 0.2  # seconds a try


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo", help="whose shapes to take")
    config = load_base(parser.parse_args().base, device="cpu").model.config
    shapes = {
        "layer": (TOKENS, config.hidden_size, config.intermediate_size),
        "head": (TARGETS, config.hidden_size, config.vocab_size),
        "thin": (TARGETS, RANK, config.vocab_size),
    }
    found = {name: product(*shape) for name, shape in shapes.items()}
    shape = vars(Shape.of(config.to_dict()))
    threads = torch.get_num_threads()
    print(json.dumps({**found, "copy": copy_rate(), "shapes": shapes, "shape": shape, "threads": threads}))


def product(m, k, n):
    """Return GFLOP/s of x (m, k) times W (n, k) transposed, as a linear layer does it."""
    x, weight = torch.randn(m, k), torch.randn(n, k)
    out = torch.empty(m, n)
    return 2 * m * k * n / best(lambda: torch.mm(x, weight.T, out=out)) / 1e9


def copy_rate():
    """Return GB/s."""
    source, target = torch.ones(COPIED // 4), torch.zeros(COPIED // 4)
    return 2 * COPIED / best(lambda: target.copy_(source)) / 1e9


def best(work):
    """Return the seconds of one call, in the fastest of several tries."""
    began = time.perf_counter()
    work()
    calls = max(1, round(AT_LEAST / max(time.perf_counter() - began, 1e-9)))
    tries = []
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        tries.append((time.perf_counter() - began) / calls)
    return min(tries)


if __name__ == "__main__":
    main()
