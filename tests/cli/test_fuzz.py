"""No command line ends in a traceback: one error, exit code 2, and nothing written but the output.

`UNLEARN_PEFT_FUZZ=2000` tries that many, in some ten minutes.
"""

import contextlib
import gc
import io
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invocations import commands, invocation, make_world

from unlearn_peft import cli

RUNS = int(os.environ.get("UNLEARN_PEFT_FUZZ", 40))
SECONDS = 60  # of one invocation's own computing, however busy the machine is


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Yield a folder to work in, and its copy as it was; what is heavy or waits is cut short."""
    from unlearn_peft.inference import generate
    from unlearn_peft.models import base
    from unlearn_peft.serve.api.server import HttpServer
    from unlearn_peft.training import run

    whole = tmp_path_factory.mktemp("fuzz")
    folder = whole / "world"
    folder.mkdir()
    (whole / "home").mkdir()
    make_world(folder)
    shutil.copytree(folder, whole / "copy", symlinks=True)
    generated, trained = generate._generate, run.train

    def few(live, prompts, chat, count, tokens, *rest):
        made = generated(live, prompts[:1], chat, 1, min(tokens, 3), *rest)
        return [made[0] * min(count, 100)] * min(len(prompts), 100)

    def short(live, jobs, *rest, **named):
        for job in jobs:
            if (job.recipe.steps or 99) > 2:
                job.recipe.steps = 2
        return trained(live, jobs, *rest, **named)

    def served(self, sockets):
        assert gc.get_freeze_count() > 100_000, "what is there is not looked through while requests wait"
        gc.unfreeze()
        for each in sockets:
            each.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_generate", few)
        patch.setattr(run, "train", short)
        patch.setattr(base, "demo_gguf", lambda: None)
        patch.setattr(HttpServer, "run", served)
        for name, value in {
            "HOME": whole / "home",
            "UNLEARN_PEFT_TRACEBACK": 1,
            "COLUMNS": 150,
            "TORCHDYNAMO_DISABLE": 1,
        }.items():
            patch.setenv(name, str(value))
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "UNLEARN_PEFT_CACHE"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "stdin", open(os.devnull))
        patch.chdir(folder)
        yield folder, whole / "copy"


def run_cli(arguments, recipe):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    Path("recipe.yaml").write_bytes(recipe)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["unlearn-peft", *arguments]
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


def files_in(folder):
    """Return every file with its size and the time of its last change."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), folder)] = status.st_size, status.st_mtime_ns
    found.pop("recipe.yaml", None)
    return found


def check(world, arguments, recipe):
    folder, copy = world
    before = files_in(folder)
    try:
        code, _, err = run_cli(arguments, recipe)
        after = files_in(folder)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        changed = {name for name in changed if not name.startswith("tenants.db")}  # and SQLite's own beside it
        errors = [line for line in err.splitlines() if line.lower().startswith("error: ")]
        assert code in (0, 1, 2) and (code != 1 or arguments[0] == "eval"), (code, err)
        assert len(errors) == (code == 2), (code, err)
        if code:
            pairs = zip(arguments, arguments[1:], strict=False)
            made = {value for name, value in pairs if name in ("--store", "--audit")}
            assert not changed - made, (code, err, changed)  # these two are opened before the rest is tried
        else:
            words = [*arguments, *(word.partition("=")[2] for word in arguments if "=" in word[:-1]), "out"]
            named = [os.path.normpath(os.path.expanduser(word)) for word in words]
            named += [word.strip("\"',{}:.") or "-" for word in recipe.decode(errors="replace").split()]
            strange = {name for name in changed if not any(name.startswith(word) for word in named)}
            assert not strange, (strange, arguments)
        return code
    finally:
        if files_in(folder) != before:
            for place in folder.iterdir():
                shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
            shutil.copytree(copy, folder, symlinks=True, dirs_exist_ok=True)


def test_every_command_is_tried():
    assert {("train",), ("tenant", "forget"), ("keys", "new")} <= commands().keys()


@settings(
    max_examples=RUNS, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.randoms(use_true_random=False))
def test_nothing_ends_in_a_traceback(world, rng):
    check(world, *invocation(rng))
