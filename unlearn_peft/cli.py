"""The command line: one command a verb. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_evaluate import evaluate
from .cli_export import export
from .cli_help import show_help
from .cli_hub import add_hub
from .cli_options import (
    AdapterOption,
    BaseOption,
    DeviceOption,
    DifferentOption,
    DtypeOption,
    JsonOption,
    QuantizeOption,
    RequireOption,
    StrengthOption,
    TrustedOption,
    load,
    trust_of,
)
from .cli_serve import serve
from .cli_tenant import app as tenant
from .cli_trust import add_trust
from .errors import Interrupted, UnlearnError

app = typer.Typer(
    name="unlearn-peft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model forget on demand, without touching its weights.\n\n"
    "Train a forget adapter from a recipe, look at what it does, attach it, stack it, serve it, remove it.\n\n"
    "  unlearn-peft train recipes/harry_potter.yaml --output out/hp\n\n"
    "  unlearn-peft generate --adapter out/hp --prompt 'Who wrote Harry Potter?'\n\n"
    "  unlearn-peft compare out/hp --probes recipes/data/harry_potter_probes.jsonl\n\n"
    "  unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml\n\n"
    "  unlearn-peft serve --base demo --adapter out/hp",
)


@app.command()
def train(
    recipes: Annotated[list[Path], typer.Argument(help="YAML recipes, e.g. recipes/harry_potter.yaml.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field: retain_weight=10, adapter.r=16; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the adapter directory goes; of several, the folder of all.")
    ] = None,
    base: BaseOption = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps, ...")] = None,
    quantize: QuantizeOption = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the adapted layers with torch.compile.")
    ] = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(help="Memory for what the frozen base gives, computed once; what is over goes to disk. [1]"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint beside the output.")] = False,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, trackio or wandb.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no curves.")] = False,
) -> None:
    """Train a forget adapter from a recipe, or one from each of several.

    Several are trained at once, in one pass over one base, and each comes out
    as if it had been trained alone; each is saved as soon as it is done:

      unlearn-peft train mine.yaml --output out/mine

      unlearn-peft train requests/*.yaml --output out/requests
    """
    from .recipe.load import load_recipe

    given = []
    for path in recipes:
        recipe = load_recipe(
            path, set_ or (), base=base, dtype=dtype, device=device, quantize=quantize, compile=compile_,
            cache_gb=cache_gb,
        )  # fmt: skip
        if output is not None:
            recipe.output = str(output if len(recipes) == 1 else output / path.stem)
        given.append(recipe.model_copy(update={"output": recipe.output or f"out/{path.stem}"}))
    from .training.curves import curve_lines
    from .training.run import unlearn_many

    adapters = unlearn_many(given, resume=resume, tracker=tracker, quiet=quiet)
    _part()
    if int(os.environ.get("RANK", 0)) != 0:
        return
    for adapter in adapters:
        if not quiet and len(adapters) == 1:
            print(curve_lines(adapter.progress.evaluations, adapter.progress.best_step))
        m = adapter.metrics
        print(
            f"forget loss {m['forget_loss_base']:.3f} -> {m['forget_loss']:.3f} nats/token "
            f"({m['forget_loss_change_percent']:+.0f}%), step {m['best_step']} kept, "
            f"{m['training_seconds']:.0f} s of training"
        )
        print(f"adapter: {adapter.path} ({adapter.bytes / 1e6:.2f} MB)")


@app.command()
def retain(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; it need not name a retain set.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field, as for train; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write a .jsonl here instead of printing it.")] = None,
    base: BaseOption = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps, ...")] = None,
    quantize: QuantizeOption = None,
) -> None:
    """Show the retain set that `retain: auto` makes for a recipe.

    The rows are the base's own answers to broad prompts and to the forget
    rows' questions about other subjects. They need not be true: they say how
    the base answers now, and that is what is kept. Read them, delete what may
    change, add near neighbours of the target (they protect best), and name
    the file:

      unlearn-peft retain mine.yaml --output retain.jsonl

      unlearn-peft train mine.yaml --set retain=retain.jsonl
    """
    from .files.atomic import whole_file
    from .models.base import load_base
    from .recipe.load import load_recipe
    from .training.examples.build import make_retain, read_sets

    given = load_recipe(
        recipe, [*(set_ or ()), "retain=auto"], base=base, dtype=dtype, device=device, quantize=quantize
    )
    made = make_retain(read_sets(given), load_base(given.base, given.dtype, given.device, given.quantize), given)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows)
    if output is None:
        print(lines, end="")
    else:
        with whole_file(output) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    print(made.line() + (f" -> {output}" if output else ""), file=sys.stderr)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to ask; repeatable.")],
    base: BaseOption = None,
    adapter: AdapterOption = None,
    strength: StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    raw: Annotated[bool, typer.Option(help="Do not use the chat template.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
    allow_different_base: DifferentOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Answer prompts, with adapters attached or (without --adapter) by the base alone."""
    from .inference.attach import attach
    from .inference.generate import answers

    trust = trust_of(trusted_keys, require_signature)
    live = load(base, adapter, dtype, device, quantize, trust)
    names = attach(
        live, *(adapter or []), strength=strength or 1.0, allow_different_base=allow_different_base, trust=trust
    )
    for asked in prompt:
        (text,) = answers(
            live,
            [asked],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat_template=not raw,
        )
        if as_json:
            print(json.dumps({"prompt": asked, "text": text, "adapters": names}, ensure_ascii=False), flush=True)
        else:
            print(f"> {asked}\n{text}\n", flush=True)


@app.command()
def compare(
    adapter: Annotated[list[Path], typer.Argument(help="Adapter directories; several are stacked.")],
    probes: Annotated[Path | None, typer.Option(help="Rows with `prompt` and `leak` words.")] = None,
    neighbours: Annotated[
        Path | None, typer.Option(help="Rows that must survive; their KL to the base is measured.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What else to ask; repeatable.")] = None,
    base: BaseOption = None,
    strength: StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Show answers before, with the adapters, and after their removal, side by side."""
    from .data.rows import read_rows
    from .data.source import DataSpec
    from .evaluate.compare import compare as compare_
    from .evaluate.compare import show

    rows = read_rows(DataSpec(path=str(probes)), "probes") if probes else []
    rows += [{"prompt": asked, "leak": []} for asked in prompt or []]
    near = read_rows(DataSpec(path=str(neighbours)), "neighbours") if neighbours else []
    if not rows and not near:
        raise UnlearnError("nothing to compare: give --probes FILE, --neighbours FILE or --prompt TEXT")
    trust = trust_of(trusted_keys, require_signature)
    live = load(base, adapter, dtype, device, quantize, trust)
    result = compare_(live, adapter, rows, near, strength or 1.0, max_new_tokens, trust=trust)
    print(json.dumps(result, ensure_ascii=False)) if as_json else show(result)


app.command("eval")(evaluate)
app.command()(serve)
app.add_typer(tenant, name="tenant")


@app.command()
def inspect(
    adapter: Path,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Tell what an adapter is: its kind, ranks, size, base and figures; every file is checked."""
    from .adapters.read import read_bundle

    bundle = read_bundle(adapter, trust=trust_of(trusted_keys, require_signature))
    ranks = sorted({delta.rank for delta in bundle.deltas.values() if delta.rank})
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "peft_type": bundle.config.get("peft_type"),
        "base": bundle.manifest.get("base", {}).get("name") or bundle.config.get("base_model_name_or_path"),
        "modules": len(bundle.deltas),
        "ranks": ranks or "dense",
        "bytes": bundle.bytes,
        "sha256": bundle.identity,
        "weights_sha256": bundle.digest,
        "signature": bundle.signed_by or ("not verified" if bundle.signature else "none"),
        "metrics": bundle.manifest.get("metrics", {}),
        "recipe": bundle.manifest.get("recipe", {}),
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for inner, part in value.items():
                print(f"  {inner}: {part}")
        else:
            print(f"{name}: {value}")


@app.command()
def stack(
    adapters: list[Path],
    output: Annotated[Path, typer.Option(help="The new adapter directory.")],
    strength: StrengthOption = None,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Write one adapter whose effect is the exact sum of several (their ranks are concatenated)."""
    from .adapters.read import read_bundle
    from .adapters.transform.merge import stack as stack_

    path = stack_(adapters, output, strength, trust=trust_of(trusted_keys, require_signature))
    print(f"adapter: {path} ({read_bundle(path).bytes / 1e6:.2f} MB)")


app.command()(export)


@app.command()
def merge(
    adapters: list[Path],
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: BaseOption = None,
    strength: StrengthOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Write the base with adapters added to its weights. A tied lm_head is untied where a delta meets it."""
    from .adapters.transform.merge import merge as merge_

    trust = trust_of(trusted_keys, require_signature)
    path = merge_(load(base, adapters, dtype, device, None, trust), adapters, output, strength, trust=trust)
    print(f"merged model: {path}")


add_trust(app)
add_hub(app)


def _part() -> None:
    """Take leave of the other processes, if there are any: one that just ends may abort in its group's threads."""
    import torch.distributed as group

    if group.is_available() and group.is_initialized():
        group.destroy_process_group()


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
        show_help(app) if sys.argv[1:] == ["--help"] else app()
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(130)
    except UnlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
