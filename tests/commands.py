"""Commands in processes of their own, without waiting ten seconds for each to import torch.

A fork server imports what commands need, once; each process is a fork of it. What runs there is as in a shell:
arguments, environment, signals, exit code, two streams. What is read from the environment while libraries are imported
(Hugging Face's `HF_*`) is that of the tests, whatever a call says: a test of such things starts a real process.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch", "transformers", "peft", "datasets", "unlearn_peft.cli", "unlearn_peft.training.run"]
)
_SECONDS = 300


class Command:
    """`unlearn-peft ARGUMENTS` (or a script with these), running."""

    def __init__(self, *arguments, script=None, **environment):
        self.words = [str(script or "unlearn-peft"), *map(str, arguments)]
        self.folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self.folder.name, name) for name in ("out", "err")]
        for stream in self._streams:
            stream.touch()
        environment = {**os.environ, **environment}
        self.process = _FORKS.Process(target=_run, args=(self.words, script, environment, os.getcwd(), self._streams))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    @property
    def stdout(self):
        return self._streams[0].read_text()

    @property
    def stderr(self):
        return self._streams[1].read_text()

    def wait(self, seconds=_SECONDS):
        """Return the exit code; a process that takes longer is killed, and an error."""
        self.process.join(seconds)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.words, seconds, self.stdout, self.stderr)
        return self.returncode

    def kill(self):
        self.process.kill()
        self.process.join()


def cli(*arguments, **environment):
    """Run `unlearn-peft ARGUMENTS` to its end."""
    command = Command(*arguments, **environment)
    command.wait()
    return command


def together(count, *arguments, script, **environment):
    """Run a script in processes that know of each other, as `torchrun` starts them; returns them, ended."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared = {name: str(value) for name, value in shared.items()} | {"OMP_NUM_THREADS": "1", **environment}
    commands = [Command(*arguments, script=script, **shared, RANK=str(n), LOCAL_RANK=str(n)) for n in range(count)]
    try:
        for command in commands:
            command.wait()
    finally:
        for command in commands:
            command.kill()
    return commands


def free_port():
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words, script, environment, folder, streams):
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if script is None:
        from unlearn_peft import cli

        cli.main()
    else:
        runpy.run_path(str(script), run_name="__main__")
