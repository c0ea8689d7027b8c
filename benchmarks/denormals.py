"""What denormal numbers in an adapter cost: one layer's part of a step, beside the layer itself.

    python benchmarks/denormals.py      prints the table and writes it into docs/security.md

Some processors multiply denormal numbers many times more slowly, which an adapter could use to slow a server down.
"""

import re
import time
from pathlib import Path

import torch

from unlearn_peft.adapters.bundle import Bundle, Delta
from unlearn_peft.inference.multi_lora import AdapterBatch, LoadedAdapter, WeightedAdapter

ROWS, TOKENS, SIZE, RANK = 8, 16, 576, 8  # SmolLM2's q_proj
NUMBERS = {"0.05": 0.05, "1e-40 (denormal)": 1e-40, "1.2e-38 (what comes of it is denormal)": 1.2e-38}


def main():
    """Measure, print, write."""
    torch.set_num_threads(1)
    x, weight = torch.randn(ROWS, TOKENS, SIZE), torch.randn(SIZE, SIZE)
    layer = best(lambda: x @ weight)
    lines = [
        f"One thread, {ROWS} rows of {TOKENS} tokens, rank {RANK} on {SIZE} x {SIZE}; the layer takes {layer:.0f} us.",
        "",
        "| numbers in the adapter | its part, us | of the layer |",
        "|---|---|---|",
    ]
    for name, number in NUMBERS.items():
        up, down = torch.full((SIZE, RANK), number), torch.full((RANK, SIZE), number)
        deltas = {"q": Delta(up, down)}
        adapter = LoadedAdapter(Bundle(Path(), {}, deltas, {}, "x", "x"), deltas)
        batch = AdapterBatch([[WeightedAdapter(adapter, 1.0)]] * ROWS)
        output = torch.zeros(ROWS, TOKENS, SIZE)
        took = best(lambda batch=batch, output=output: batch.add("q", x, output))
        lines.append(f"| {name} | {took:.0f} | {100 * took / layer:.0f} % |")
    print("\n".join(lines))
    page = Path(__file__).parent.parent / "docs" / "security.md"
    block = "<!-- denormals -->\n" + "\n".join(lines) + "\n<!-- /denormals -->"
    text = re.sub("<!-- denormals -->.*<!-- /denormals -->", lambda _: block, page.read_text(), flags=re.DOTALL)
    page.write_text(text)


@torch.no_grad()
def best(call, times=200):
    """Return the least time of a call, in microseconds."""
    found = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - began)
    return found * 1e6


if __name__ == "__main__":
    main()
