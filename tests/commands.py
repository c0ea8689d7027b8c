"""The command line in a process of its own, without waiting ten seconds for each to import torch.

A fork server imports what commands need, once; each command is a fork of it. What a command sees is as in a shell:
arguments, environment, exit code, two streams. What is read from the environment while libraries are imported (Hugging
Face's `HF_*`) is that of the tests, whatever a call says: a test of such things starts a real process.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "transformers", "peft", "datasets", "unlearn_peft.cli", "unlearn_peft.run"])
_SECONDS = 300


def cli(*arguments, **environment):
    """Run `unlearn-peft ARGUMENTS`; returns what `subprocess.run(capture_output=True, text=True)` would."""
    words = ["unlearn-peft", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = _FORKS.Process(target=_run, args=(words, {**os.environ, **environment}, os.getcwd(), out, err))
        child.start()
        child.join(_SECONDS)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(words, _SECONDS, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, child.exitcode, out.read_text(), err.read_text())


def _run(words, environment, folder, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    import torch

    from unlearn_peft import cli

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    cli.main()
