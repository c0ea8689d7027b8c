"""What can 1, 10 and 1000 GPUs serve? Arithmetic and a simulation; writes docs/scaling.md's figures.

    python benchmarks/scaling.py [--small]

Nothing is measured: the shapes are the models' own, the rates the data sheets', the shares of them that are used are
assumed (projection.py), the hit rates come from zipf.py. The section between the document's markers is written anew.
"""

import argparse
from pathlib import Path

from performance import write
from projection import BANDWIDTH, HALF, MODELS, OPERATIONS, STREAMED, USED
from zipf import BATCH, SLACK, distinct, expected, popularity, simulate

DOC = Path(__file__).parent.parent / "docs" / "scaling.md"
MODEL = "Llama-3.1-8B"
MEMORY, RESERVED = 80e9, 0.1  # bytes of an H100 (data sheet); share that vLLM leaves (its --gpu-memory-utilization 0.9)
PCIE, DISK = 64e9, 7e9  # bytes a second: PCIe 5 x16; an NVMe disk's reading, as data sheets have it
HOST = 250e9  # bytes of host memory for sets, for each GPU: an eighth of a DGX H100's 2 TB (data sheet)
CONTEXT = 1024  # tokens of a row, prompt and answer, whose keys and values are kept
ANSWER = 200  # tokens of an answer, assumed
ADAPTERS, RANK = 3, 8  # of a set: ranks add up
RANKS = (32, 64)  # vLLM's --max-lora-rank, of its allowed ones; a set's rank is 24
ROWS = (32, 128)  # of a batch
EXPONENTS = (0.8, 1.0, 1.2)
FLEETS = ((1, 10_000), (10, 100_000), (1000, 1_000_000))  # GPUs, tenants
REQUESTS = 2000  # simulated for each GPU, and
FEWEST, MOST = 400_000, 2_000_000  # for all


def widths(shape):
    """Numbers in and out of all modules that vLLM gives a place to: a layer's seven, the head and the embedding."""
    layer = sum(i + o for i, o in shape.linears)
    return shape.layers * layer + 2 * (shape.hidden + shape.vocabulary)


def place(shape, rank):
    """Bytes of one of vLLM's places (--max-loras): all modules at the largest rank, whatever a set changes."""
    return widths(shape) * rank * HALF


def set_bytes(shape):
    """Bytes of a set as it lies in host memory and on disk: our default, all linear layers of the upper half."""
    return shape.layers // 2 * sum(i + o for i, o in shape.linears) * ADAPTERS * RANK * HALF


def kept(shape):
    """Bytes of keys and values that a token leaves behind."""
    return 2 * shape.kv_heads * shape.head_dim * shape.layers * HALF


def step(shape, rows, sets=0.0, rank=0):
    """Seconds of a decoding step: what must be read, or what must be computed, whichever takes longer."""
    weights = shape.parameters * HALF
    read = weights + rows * CONTEXT * kept(shape) + sets * place(shape, rank)
    operations = 2 * rows * (shape.parameters + (widths(shape) * rank if sets else 0))
    return max(read / (STREAMED * BANDWIDTH), operations / (USED * OPERATIONS))


def places(shape, rank, rows):
    """How many places there is memory for, beside the weights and the rows' keys and values."""
    left = MEMORY * (1 - RESERVED) - shape.parameters * HALF - rows * CONTEXT * kept(shape)
    return int(left / place(shape, rank))


def one_gpu(shape):
    lines = [
        "| --max-lora-rank | a place, MB | rows | places beside them | tokens/s, base | one set for all | a set for "
        "each row |",
        "|---|---|---|---|---|---|---|",
    ]
    for rank in RANKS:
        for rows in ROWS:
            room = places(shape, rank, rows)
            base, one, each = (rows / step(shape, rows, n, rank) for n in (0, 1, min(rows, room)))
            lines.append(
                f"| {rank} | {place(shape, rank) / 1e6:.0f} | {rows} | {room} | {base:,.0f} | {one:,.0f} "
                f"({one / base:.2f}x) | {each:,.0f} ({each / base:.2f}x) |"
            )
    return lines


def hits(shape, small):
    """Return the table of hit rates, and (places' hits, host's hits, busiest) by GPUs, exponent and way."""
    room, host = min(64, places(shape, RANKS[0], BATCH)), int(HOST / set_bytes(shape))
    lines = [
        f"| GPUs | tenants | exponent | way | in a place ({room} a GPU) | by the formula | in host memory ({host:,} a "
        "GPU), by the formula | busiest GPU / mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {}
    for gpus, tenants in FLEETS:
        for exponent in EXPONENTS:
            shares = popularity(tenants, exponent)
            for way in ("any", "home", "bounded") if gpus > 1 else ("any",):
                requests = 20_000 if small else min(max(REQUESTS * gpus, FEWEST), MOST)
                hit, busiest = simulate(shares, gpus, room, way, requests)
                formula = None if way == "bounded" else expected(shares, gpus, room, way)
                below = None if way == "bounded" else expected(shares, gpus, host, way)
                found[gpus, exponent, way] = hit, below, busiest
                cells = [f"{100 * x:.1f} %" if x is not None else "" for x in (hit, formula, below)]
                lines.append(f"| {gpus} | {tenants:,} | {exponent} | {way} | {' | '.join(cells)} | {busiest:.2f} |")
    return lines, found, room


def fleets(shape, found, room):
    """Return the table of what all of it comes to, with one exponent."""
    exponent, rank = 1.0, RANKS[0]
    lines = [
        "| GPUs | tenants | places | way | requests/s | tokens/s | of the time, loading | GB/s from host to a GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus, tenants in FLEETS:
        shares = popularity(tenants, exponent)
        sets = min(distinct(shares, BATCH), room)
        each = step(shape, BATCH, sets, rank) * ANSWER / BATCH  # seconds of an answer, the batch full
        for way in ("any", "bounded") if gpus > 1 else ("any",):
            hit, below, busiest = found[gpus, exponent, way]
            if below is None:
                below = found[gpus, exponent, "home"][1]
            missed = (1 - hit) * place(shape, rank)  # bytes an answer
            load = missed / (STREAMED * PCIE) + (1 - below) * set_bytes(shape) / DISK
            answers = gpus / (each + load) / busiest  # a second; the busiest GPU is full first
            lines.append(
                f"| {gpus} | {tenants:,} | {gpus * room:,} | {way} | {answers:,.0f} | {answers * ANSWER:,.0f} | "
                f"{100 * load / (each + load):.1f} % | {missed * answers / gpus / 1e9:.2f} |"
            )
    return lines


def section(small=False):
    shape = MODELS[MODEL]
    table, found, room = hits(shape, small)
    largest = set_bytes(shape)
    return "\n".join([
        "### One GPU",
        "",
        f"{MODEL} in bfloat16 ({shape.parameters * HALF / 1e9:.1f} GB) on an H100 with {MEMORY / 1e9:.0f} GB, of which "
        f"vLLM leaves {100 * RESERVED:.0f} %; {100 * STREAMED:.0f} % of {BANDWIDTH / 1e12:.2f} TB/s and "
        f"{100 * USED:.0f} % of {OPERATIONS / 1e12:.0f} TFLOP/s are used (assumed). A row keeps {CONTEXT} tokens of "
        f"{kept(shape) / 1e3:.0f} kB. A step reads weights, keys and values, and the whole place of each set in its "
        "batch: vLLM pads to the largest rank and to all modules. Launching kernels is not counted.",
        "",
        *one_gpu(shape),
        "",
        f"A set of {ADAPTERS} adapters of rank {RANK} on all linear layers of the upper half is one LoRA of rank "
        f"{ADAPTERS * RANK}: {largest / 1e6:.0f} MB in host memory and on disk. A place is filled over PCIe in "
        f"{1e3 * place(shape, RANKS[0]) / (STREAMED * PCIE):.1f} ms at rank {RANKS[0]}, from a disk of "
        f"{DISK / 1e9:.0f} GB/s in {1e3 * largest / DISK:.0f} ms; 1 TB of disk holds {int(1e12 / largest):,} sets.",
        "",
        "### Hit rates",
        "",
        f"Simulated, {REQUESTS:,} requests for each GPU (at least {FEWEST:,}, at most {MOST:,} in all), the first half "
        f"not counted; `bounded` takes up to {SLACK} times the mean load, of {BATCH} answers under way for each GPU.",
        "",
        *table,
        "",
        "### 1, 10 and 1000 GPUs",
        "",
        f"Exponent 1, --max-lora-rank {RANKS[0]}, batches of {BATCH} rows, {ANSWER} tokens an answer; prompts are not "
        "counted. vLLM loads a set between two steps, so that all rows of a batch wait for it; the busiest GPU is full "
        "first, and what the others could do beyond that is not counted. What is not in host memory comes from disk, "
        "composed before; for `bounded`, as often as for `home`. A batch has as many different sets as one drawn from "
        "all tenants.",
        "",
        *fleets(shape, found, room),
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few requests, to see that all runs")
    parser.add_argument("--doc", type=Path, default=DOC)
    args = parser.parse_args()
    write(args.doc, section(args.small))


if __name__ == "__main__":
    main()
