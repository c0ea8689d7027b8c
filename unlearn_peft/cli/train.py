"""The commands `train` and `retain`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import QuantizeOption

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field of the recipe: retain_weight=10, adapter.r=16; repeatable."),
]
RecipeBaseOption = Annotated[
    str | None, typer.Option("--base", help="Hub id, local folder, .gguf file, or 'demo'. Default: the recipe's.")
]
RecipeDtypeOption = Annotated[str | None, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
RecipeDeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, mps, ...")]


def train(
    recipes: Annotated[list[Path], typer.Argument(help="YAML recipes, e.g. recipes/harry_potter.yaml.")],
    set_: SetOption = None,
    output: Annotated[
        Path | None, typer.Option(help="The new adapter directory; with several recipes, the folder for all of them.")
    ] = None,
    base: RecipeBaseOption = None,
    dtype: RecipeDtypeOption = None,
    device: RecipeDeviceOption = None,
    quantize: QuantizeOption = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the adapted layers with torch.compile.")
    ] = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(help="Memory in GB for the base's activations, computed once; the rest goes to disk. [1]"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint beside the output.")] = False,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, trackio or wandb.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no curves.")] = False,
) -> None:
    """Train a forget adapter from each of one or more recipes.

    Several are trained together on one base, each with the same result as if
    it were trained alone, and each is saved as soon as it is done:

      unlearn-peft train mine.yaml --output out/mine

      unlearn-peft train requests/*.yaml --output out/requests
    """
    from ..recipe.load import load_recipe

    loaded = []
    for path in recipes:
        recipe = load_recipe(
            path, set_ or (), base=base, dtype=dtype, device=device, quantize=quantize, compile=compile_,
            cache_gb=cache_gb,
        )  # fmt: skip
        if output is not None:
            recipe.output = str(output if len(recipes) == 1 else output / path.stem)
        loaded.append(recipe.model_copy(update={"output": recipe.output or f"out/{path.stem}"}))
    from ..adapters.card import rows_told
    from ..training.curves import curve_lines
    from ..training.run import unlearn_many

    adapters = unlearn_many(loaded, resume=resume, tracker=tracker, quiet=quiet)
    _leave_process_group()
    if int(os.environ.get("RANK", 0)) != 0:
        return
    for adapter in adapters:
        if not quiet and len(adapters) == 1:
            print(curve_lines(adapter.progress.evaluations, adapter.progress.best_step))
        m = adapter.metrics
        scaled = f" at {m['scaled_to']:g} of its delta" if m.get("scaled_to", 1) != 1 else ""
        print(
            f"forget loss {m['forget_loss_base']:.3f} -> {m['forget_loss']:.3f} nats/token "
            f"({m['forget_loss_change_percent']:+.0f}%), step {m['best_step']} kept{scaled}, "
            f"{m['training_seconds']:.0f} s of training"
        )
        if "forgotten_rows" in m:
            print(rows_told(m))
        print(f"adapter: {adapter.path} ({adapter.bytes / 1e6:.2f} MB)")


def retain(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; it need not name a retain set.")],
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Write a .jsonl file instead of printing the rows.")] = None,
    base: RecipeBaseOption = None,
    dtype: RecipeDtypeOption = None,
    device: RecipeDeviceOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Show the retain set that `retain: auto` makes for a recipe.

    The rows are the base's own answers to broad prompts and to the forget
    rows' questions about other subjects. They need not be true: they record
    how the base answers now, so that training keeps it. Read them, delete what
    may change, add near neighbours of the target (they protect best), and use
    the file:

      unlearn-peft retain mine.yaml --output retain.jsonl

      unlearn-peft train mine.yaml --set retain=retain.jsonl
    """
    from ..files.atomic import atomic_file
    from ..models.base import load_base
    from ..recipe.load import load_recipe
    from ..training.examples.build import make_retain, read_sets

    settings = load_recipe(
        recipe, [*(set_ or ()), "retain=auto"], base=base, dtype=dtype, device=device, quantize=quantize
    )
    live = load_base(settings.base, settings.dtype, settings.device, settings.quantize)
    made = make_retain(read_sets(settings), live, settings)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows)
    if output is None:
        print(lines, end="")
    else:
        with atomic_file(output) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    print(made.summary() + (f" -> {output}" if output else ""), file=sys.stderr)


def _leave_process_group() -> None:
    """Leave the group of processes, if there is one: a process that just ends may abort in the group's threads."""
    import torch.distributed as group

    if group.is_available() and group.is_initialized():
        group.destroy_process_group()
