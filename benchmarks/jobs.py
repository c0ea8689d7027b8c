"""Lines of a benchmark, each kept in a file as soon as it is there, and made side by side where there are cores.

A script that makes one line when called with `--line NAME` comes in, with the files of its lines; the names of those
that failed go out. The processes share nothing but files, so the same command run again makes what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from unlearn_peft.files.atomic import atomic_file
from unlearn_peft.training.checkpoints import stop_signals


def add_arguments(parser):
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, which share the cores")
    parser.add_argument("--line", help=argparse.SUPPRESS)  # what such a process is to make; it shows nothing


def keep(place, found):
    with atomic_file(place) as temporary:
        temporary.write_text(json.dumps(found))


def make_missing(script, places, jobs, make, first=()):
    """Make the lines that aren't kept yet; returns the names of those that failed in a process of theirs.

    Args:
        script: the benchmark, which takes `--line NAME`.
        places: name of a line -> the file in which it is kept.
        jobs: 1: all are made here, one after the other; more: as many processes at a time.
        make: makes and keeps the lines whose names it gets.
        first: names of lines without which no other can be made.
    """
    began, failed = time.monotonic(), []
    missing = {name: place for name, place in places.items() if not place.is_file()}
    if jobs > 1:
        before = {name: place for name, place in missing.items() if name in first}
        others = {name: place for name, place in missing.items() if name not in first}
        failed = side_by_side(script, before, jobs) or side_by_side(script, others, jobs)
    else:
        make(missing)
    made = sum(place.is_file() for place in missing.values())
    print(f"{time.monotonic() - began:.0f} s for {made} of {len(places)} lines made now", file=sys.stderr)
    return failed


def side_by_side(script, places, jobs):
    """Make lines, a process each, at most `jobs` at a time; returns the names of those that failed.

    A process gets this one's arguments and its share of the cores; what it prints goes into a log beside its line.
    Ctrl-C or SIGTERM ends them all, then this one with code 130: training saves its state first. Twice: at once.
    """
    threads = max((os.cpu_count() or 1) // max(min(jobs, len(places)), 1), 1)
    waiting, running, failed = list(places), {}, []
    with stop_signals() as received:
        signalled = False
        try:
            while waiting or running:
                if received and not signalled:
                    signalled = True
                    waiting.clear()
                    for process in running.values():
                        process.terminate()
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    running[name] = start(script, name, log_of(places[name]), threads)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    if code and not signalled:
                        failed.append(name)
                        print(f"{name} failed (code {code}): {last_line(log_of(places[name]))}", file=sys.stderr)
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.kill()
    if received:
        sys.exit(130)
    return failed


def start(script, name, log, threads):
    print(f"{name} ... (log: {log})", file=sys.stderr, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, script, *sys.argv[1:], "--line", name],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True,  # Ctrl-C reaches this process alone, which tells each of the others once
        )  # fmt: skip


def log_of(place):
    return place.with_suffix(".log")


def last_line(log):
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
