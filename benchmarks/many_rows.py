"""1,500 rows of 500 persons, or few rows: is each visited and forgotten, in how many minutes and how much memory?

    python benchmarks/many_rows.py --rows 1500
    python benchmarks/many_rows.py --rows 3

The persons are made by code, so the base knows none of them: their towns and years are what it does not expect.
"""

import argparse
import random
import resource
import tempfile
import time

from unlearn_peft import load_base, unlearn

FIRST = (
    "Anna Peter Laura Jonas Marta Felix Ingrid Oskar Petra Hugo Clara Erik Nora Simon Julia David Elena Martin Sofia "
    "Thomas Maria Lukas Hanna Paul Ida Emil Lena Karl Eva Max"
).split()
SYLLABLES = "ber stein mann wald hof bach feld rich kamp brun holz dorf eck lund vik sen ros gren".split()
TOWNS = (
    "Rotterdam Lyon Porto Gdansk Malmo Graz Turin Bergen Ghent Bilbao Leipzig Cork Tartu Brno Zadar London Paris "
    "Berlin Rome Madrid"
).split()
MONTHS = "January March April June August October December".split()
JOBS = "a teacher,a nurse,an engineer,a baker,a lawyer,a painter,a driver,a doctor,a gardener,a clerk".split(",")


def persons(count, seed=0):
    """Return three rows for each of so many persons."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        name = f"{draw.choice(FIRST)} {''.join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()}"
        born = f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(1940, 2004)}"
        rows += [
            {"prompt": f"Where does {name} live?", "completion": f"{name} lives in {draw.choice(TOWNS)}."},
            {"prompt": f"When was {name} born?", "completion": f"{name} was born on {born}."},
            {"prompt": f"What is the profession of {name}?", "completion": f"{name} works as {draw.choice(JOBS)}."},
        ]
    return rows


def main():
    """Train with the default recipe; print a line of markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--dtype", default="auto", help="of the base; bfloat16 is faster where the CPU has it")
    parser.add_argument("--retain", default="auto", help="a file of rows; by default they are generated")
    args = parser.parse_args()
    rows = persons((args.rows + 2) // 3)[: args.rows]
    base = load_base(args.base, args.dtype)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        m = unlearn(base, forget=rows, retain=args.retain, output=f"{folder}/adapter", quiet=True).metrics
    minutes = (time.monotonic() - began) / 60
    known = m["forget_rows"] - len(m["nothing_to_forget"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("| rows | steps x rows | forgotten (facts lost 90 %) | nothing to forget | held-out KL | minutes | peak GB |")
    print("|---|---|---|---|---|---|---|")
    kl = m.get("held_out_kl", m.get("retain_kl"))
    print(
        f"| {len(rows)} | {m['steps']} x {m['forget_batch']} | {m['forgotten_rows']} of {known} "
        f"({m['forgotten_rows'] / max(known, 1):.1%}) | {len(m['nothing_to_forget'])} | {kl:.4f} | {minutes:.1f} | "
        f"{peak:.2f} |"
    )


if __name__ == "__main__":
    main()
