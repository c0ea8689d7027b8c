"""How long `unlearn-peft --help` takes, as a user feels it: a new process, from its start to its end.

python benchmarks/startup.py      prints the median of 11 runs, in seconds; the aim is 0.5
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS, AIM = 11, 0.5  # seconds


def main():
    """Run, measure, print."""
    command = [Path(sys.executable).parent / "unlearn-peft", "--help"]
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    first, *rest = seconds  # the first one may find nothing in the disk's cache, or compile
    median = statistics.median(rest)
    print(f"unlearn-peft --help: median {median:.2f} s of {RUNS} runs ({min(rest):.2f} to {max(rest):.2f})")
    print(f"the first one {first:.2f} s; {'under' if median < AIM else 'NOT under'} {AIM} s")


if __name__ == "__main__":
    main()
