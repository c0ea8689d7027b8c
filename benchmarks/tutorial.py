"""Run docs/tutorial.md from top to bottom, as a reader would, and write what its commands print into it.

    python benchmarks/tutorial.py [N ...] [--base demo] [--folder out/tutorial] [--no-write]

The page is its own script. A block after a line with nothing but a file's name (`forget.jsonl`:) is that file. A
`console` block holds commands behind `$ `; what stands under a command is replaced by what it prints, without progress
bars. A command that ends with `&` is a server: it is waited for, and stopped at the end of its block. Numbers choose
blocks, counted from 1, of a folder in which the earlier ones have run. On 2 cores all take about ten minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRESS = re.compile(r"\d+%\||^\d+(it|step)? ?\[|it/s\]")
SECONDS = 180  # that a server may take to be ready


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", type=int, metavar="N", help="of the console blocks; all by default")
    parser.add_argument("--base", default="demo", help="another base than the page's, to see that all runs")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "tutorial.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "tutorial", help="emptied when all blocks run")
    parser.add_argument("--no-write", action="store_true", help="leave the page as it is")
    args = parser.parse_args()
    text = args.page.read_text()
    if not args.blocks:
        shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILE.findall(text):
        (args.folder / name).write_text(other_base(content, args.base))
    for n, block in enumerate(CONSOLE.findall(text), 1):
        if args.blocks and n not in args.blocks:
            continue
        new = run_block(block, args.folder, args.base)
        if not args.no_write:
            current = args.page.read_text()
            args.page.write_text(current.replace(f"```console\n{block}```", f"```console\n{new}```", 1))


def run_block(block, folder, base):
    """Run a block's commands; returns it with what they print."""
    shown, servers = [], []
    try:
        for command in (line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")):
            print(f"$ {command}", flush=True)
            printed = start(command, folder, base, servers) if command.endswith("&") else run(command, folder, base)
            print(printed, flush=True)
            shown.append(f"$ {command}\n{printed}\n" if printed else f"$ {command}\n")
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    return "\n".join(shown)


def run(command, folder, base):
    """Run a command; returns what it prints, or ends this program if it fails."""
    done = subprocess.run(
        ["bash", "-c", other_base(command, base)], cwd=folder, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    printed = without_progress(done.stdout.decode())
    if done.returncode:
        sys.exit(f"{command}\n{printed}\nended with {done.returncode}: the page keeps what it had")
    return printed


def start(command, folder, base, servers):
    """Start a server and wait until it is ready; returns what it has printed by then."""
    log = folder / "server.log"
    with log.open("wb") as output:
        exact = f"exec {other_base(command.removesuffix('&'), base)}"
        server = subprocess.Popen(
            ["bash", "-c", exact], cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )  # fmt: skip
    servers.append(server)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        if url := re.search(r"http://[\d.:]+", log.read_text()):
            try:
                with urllib.request.urlopen(f"{url[0]}/readyz", timeout=5):
                    return without_progress(log.read_text())
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(0.5)
    sys.exit(f"{command}\n{log.read_text()}\nwas not ready within {SECONDS} s")


def environment():
    """Return the variables of a terminal 110 wide in which this Python's programs come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "110", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def other_base(text, base):
    """Return a file or a command with another base in the page's place."""
    return text if base == "demo" else re.sub(r"\bdemo\b", base, text)


def without_progress(text):
    """Return what stays on a terminal: of a line written over and over the last, and no progress bar."""
    lines = (line.rpartition("\r")[2].rstrip() for line in text.strip("\n").split("\n"))
    return "\n".join(line for line in lines if not PROGRESS.search(line)).strip("\n")


if __name__ == "__main__":
    main()
