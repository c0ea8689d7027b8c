"""Read hostile adapters under watch: a fork for each, with limits on memory and time, and an ear on what Python does.

    child.py BASE < asked.json      asked: a list of [name, path, ways]; answers go to stdout, a line of JSON each

Ways: `read` (read_bundle), `bank` (bank.load on the base), `cli` (unlearn-peft inspect). An answer: name, way, outcome
(`taken`, `refused`, or whatever else happened), text, memory in MB that the process grew by, what it was heard to do.
Two more ways check the watch itself: `control` lets a pickle run, `memory` asks for too much.
"""

import contextlib
import gc
import io
import json
import logging
import os
import pickle
import resource
import signal
import sys
from pathlib import Path

from spoil import CANARY

MEMORY = 600_000_000  # bytes that an input may add to the process
SECONDS = 20  # of the processor
HEARD = (  # audit events that no adapter may cause
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "pickle.find_class", "marshal.loads", "code.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "shutil.rmtree", "shutil.copyfile", "shutil.move", "ctypes.dlopen", "cpython.run_string", "urllib.Request",
)  # fmt: skip


def answer(way, path, model):
    """Read one; returns (outcome, text)."""
    from unlearn_peft import cli
    from unlearn_peft.adapters.read import read_bundle
    from unlearn_peft.errors import AdapterError
    from unlearn_peft.inference.bank import Bank

    try:
        if way == "control":
            os.environ[CANARY] += ".control"
            pickle.loads((path / "adapter_model.bin").read_bytes())
        elif way == "memory":
            bytearray(MEMORY + 100_000_000)
        elif way == "read":
            read_bundle(path)
        elif way == "bank":
            bank = Bank(model.model, model.tokenizer)
            try:
                bank.load("it", path)
            finally:
                assert not bank.stats.resident or bank.known == ("it",)
        else:
            sys.argv = ["unlearn-peft", "inspect", str(path)]
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    cli.main()
                    code = 0
                except SystemExit as done:
                    code = done.code or 0
            lines = err.getvalue().splitlines()
            if code == 0 and not lines:
                return "taken", ""
            errors = [line for line in lines if line.startswith("error:")]
            if code == 2 and lines[:1] == errors and "Traceback" not in err.getvalue():
                return "refused", err.getvalue()
            return f"exit code {code}", err.getvalue()
    except AdapterError as error:
        return "refused", str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}", ""
    return "taken", ""


def watched(ways, path, model, write):
    """In a fork of its own: limits, the ear, the answers."""
    with open("/proc/self/statm") as stream:
        pages = int(stream.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(10 * SECONDS)  # what hangs without working; the machine may be shared
    heard = set()

    def hear(event, arguments):
        if event in HEARD:
            heard.add(event)
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            heard.add(f"write {arguments[0]}")
        elif event == "import" and str(arguments[0]).split(".")[0] in ("evil", "transformers_modules"):
            heard.add(f"import {arguments[0]}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.addaudithook(hear)
    for way in ways:
        outcome, text = answer(way, Path(path), model)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        told = {"way": way, "outcome": outcome, "text": text, "mb": grown, "heard": sorted(heard)}
        os.write(write, json.dumps(told).encode() + b"\n")
        heard.clear()


def main():
    """Answer all that is asked."""
    import torch

    from unlearn_peft import cli, load_base  # noqa: F401  imported before the forks

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    model = load_base(sys.argv[1])
    answer("bank", Path(sys.argv[2]), model)  # whatever is imported late, is imported now
    answer("cli", Path(sys.argv[2]), model)
    gc.collect()
    gc.freeze()  # else each fork copies most of the memory when it looks for garbage
    for name, path, ways in json.load(sys.stdin):
        read, write = os.pipe()
        if not (child := os.fork()):
            os.close(read)
            with contextlib.suppress(BaseException):
                watched(ways, path, model, write)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            answers = list(map(json.loads, stream.read().splitlines()))
        _, status = os.waitpid(child, 0)
        for way in ways[len(answers) :]:
            answers.append({"way": way, "outcome": f"ended with {status}", "text": "", "mb": 0, "heard": []})
        for told in answers:
            print(json.dumps({"name": name, **told}), flush=True)


if __name__ == "__main__":
    main()
