"""The command line: one command a verb. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import typer

from ..errors import Interrupted, UnlearnError, printable
from .adapters import export, inspect, merge, shrink, stack
from .evaluate import evaluate
from .forget import forget
from .generate import compare, generate
from .options import checked
from .serve import serve
from .share import keys, pull, push, sign, verify
from .tenant import app as tenant
from .train import retain, train

app = typer.Typer(
    name="unlearn-peft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # --help in half the time: rich is not imported
    help="Make a language model forget on demand, without touching its weights.\n\n"
    "Train a forget adapter from a recipe, look at what it does, attach it, stack it, serve it, remove it.\n\n"
    "  unlearn-peft forget 'Stephen King' --output out/king\n\n"
    "  unlearn-peft train recipes/harry_potter.yaml --output out/hp\n\n"
    "  unlearn-peft generate --adapter out/hp --prompt 'Who wrote Harry Potter?'\n\n"
    "  unlearn-peft compare out/hp --probes recipes/data/harry_potter_probes.jsonl\n\n"
    "  unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml\n\n"
    "  unlearn-peft serve --base demo --adapter out/hp",
)


_ESCAPED = "unlearn_peft.escape"
COMMANDS: dict[str, Callable[..., None]] = {
    "forget": forget, "train": train, "retain": retain, "generate": generate, "compare": compare, "eval": evaluate,
    "serve": serve,
    "inspect": inspect, "stack": stack, "export": export, "merge": merge, "shrink": shrink,
    "sign": sign, "verify": verify, "push": push, "pull": pull,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)
for group in (app, tenant, keys):
    for registered in group.registered_commands:
        registered.callback = checked(registered.callback)
app.add_typer(tenant, name="tenant")
app.add_typer(keys, name="keys")


def main() -> None:
    """Run the command line: exit code 2 and one clear message where it cannot go on, 130 when interrupted.

    An error that nobody foresaw is told by its kind and place: its text may quote a row that is to be forgotten.
    `UNLEARN_PEFT_TRACEBACK=1` shows all of it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us: the next file would take its number
            setattr(sys, name, open(os.devnull, "r+"))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(message)s"))
    logging.getLogger("unlearn_peft").setLevel(logging.INFO)
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # they warn in each pass, or of other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    codecs.register_error(_ESCAPED, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may have fewer characters than an answer
            stream.reconfigure(errors=_ESCAPED)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Interrupted as error:
        _end(f"\n{error}", 130)
    except UnlearnError as error:
        _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        _end(None, 1)
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            _end(f"error: {error.strerror}" + (f": {error.filename}" if error.filename else ""), 2)
        if isinstance(error, MemoryError) or re.search("out ?of ?memory|allocate memory", repr(error), re.IGNORECASE):
            _end("error: there is not enough memory: try a smaller base, batch, length or rank, or --quantize", 2)
        if os.environ.get("UNLEARN_PEFT_TRACEBACK"):
            raise
        _end(f"error: {_place(error)}", 2)


class _Formatter(logging.Formatter):
    """Whatever a message quotes, it is one entry of the log: further lines are indented, and steer no terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n  ")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Write a character that the terminal's encoding lacks as JSON writes it."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4)), error.end


def _place(error: Exception) -> str:
    """Say where an error arose that nobody foresaw, without its text: in this package, or in the user's own code."""
    ours, libraries = Path(__file__).parents[1], [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    what, whose = type(error).__name__, "which is a bug of unlearn-peft: please report it"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        is_ours = file.is_relative_to(ours)
        if is_ours or file.is_file() and not any(file.is_relative_to(folder) for folder in libraries):
            what += f" in {'/'.join(file.parts[-2:]) if is_ours else file}, line {frame.lineno}"
            whose = whose if is_ours else "which is code of your own"
            break
    return f"{what}, {whose}. UNLEARN_PEFT_TRACEBACK=1 shows all of it, which may quote your rows"


def _end(message: str | None, code: int) -> NoReturn:
    """Print a message and exit, also where nobody reads the output any more."""
    with suppress(OSError):
        if message is not None:
            print(printable(message), file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # else Python tries to write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
