"""The command line: one command a verb. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import typer

from ..errors import Interrupted, UnlearnError
from .adapters import export, inspect, merge, shrink, stack
from .evaluate import evaluate
from .generate import compare, generate
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
    "  unlearn-peft train recipes/harry_potter.yaml --output out/hp\n\n"
    "  unlearn-peft generate --adapter out/hp --prompt 'Who wrote Harry Potter?'\n\n"
    "  unlearn-peft compare out/hp --probes recipes/data/harry_potter_probes.jsonl\n\n"
    "  unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml\n\n"
    "  unlearn-peft serve --base demo --adapter out/hp",
)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train, "retain": retain, "generate": generate, "compare": compare, "eval": evaluate, "serve": serve,
    "inspect": inspect, "stack": stack, "export": export, "merge": merge, "shrink": shrink,
    "sign": sign, "verify": verify, "push": push, "pull": pull,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(tenant, name="tenant")
app.add_typer(keys, name="keys")


def main() -> None:
    """Run the command line: exit code 2 and one clear message for what a user can mend, 130 when interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("unlearn_peft").setLevel(logging.INFO)
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # they warn in each pass, or of other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(130)
    except UnlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
