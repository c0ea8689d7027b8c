"""Lines of a benchmark made side by side: each once, failures named, Ctrl-C ends all."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = """
import argparse, os, sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from jobs import add_arguments, keep, make_missing

parser = argparse.ArgumentParser()
parser.add_argument("names", nargs="+")
add_arguments(parser)
given = parser.parse_args()
here = Path(__file__).parent

def make(names):
    for name in names:
        if name == "bad":
            sys.exit("no such thing")
        if name.startswith("slow"):
            (here / f"{{name}}.began").write_text(str(os.getpid()))
            time.sleep(600)
        keep(here / f"{{name}}.json", [os.getpid(), os.environ.get("OMP_NUM_THREADS"), (here / "first.json").is_file()])

if given.line:
    sys.exit(make([given.line]))
failed = make_missing(__file__, {{n: here / f"{{n}}.json" for n in given.names}}, given.jobs, make, first=["first"])
print(",".join(failed))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    return path


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def test_each_line_has_a_process_and_a_share_of_the_cores_and_a_failure_is_named(script):
    process = start(script, "a", "bad", "first", "b", "--jobs", "3")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == "bad" and "bad failed (code 1): no such thing" in errors
    assert "for 3 of 4 lines made now" in errors
    kept = {name: json.loads(script.with_name(f"{name}.json").read_text()) for name in ("first", "a", "b")}
    assert len({pid for pid, _, _ in kept.values()} | {process.pid}) == 4
    assert kept["a"][1] == kept["b"][1] == str(max(os.cpu_count() // 3, 1))
    assert kept["a"][2] and kept["b"][2]  # what must be first was there
    again = start(script, "a", "b", "first", "--jobs", "2")
    assert again.wait(120) == 0 and json.loads(script.with_name("a.json").read_text()) == kept["a"]


def test_where_the_first_fails_nothing_else_is_begun(script, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    jobs, began = importlib.import_module("jobs"), []
    monkeypatch.setattr(jobs, "side_by_side", lambda _, places, jobs: began.append(list(places)) or list(places))
    places = {name: script.with_name(name) for name in ("a", "first")}
    assert jobs.make_missing(script, places, 2, None, first=["first"]) == ["first"] and began == [["first"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes(script, number):
    process = start(script, "slow1", "slow2", "slow3", "a", "--jobs", "2")
    began = [script.with_name(f"slow{n}.began") for n in (1, 2, 3)]
    until = time.monotonic() + 120
    while not (began[0].exists() and began[1].exists()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert not began[2].exists() and not script.with_name("a.json").exists()
    for file in began[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
