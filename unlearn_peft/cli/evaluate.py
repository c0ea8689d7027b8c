"""`unlearn-peft eval`: measure, attack, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UnlearnError
from ..evaluate.suites import Suite
from . import options


def evaluate(
    adapter: options.AdaptersArgument,
    recipe: Annotated[Path | None, typer.Option(help="Measure the sets that this recipe names.")] = None,
    forget: Annotated[Path | None, typer.Option(help="Rows that should be forgotten.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Rows that should not change, as in training.")] = None,
    probes: Annotated[Path | None, typer.Option(help="Rows with `prompt` and `leak` words, never trained on.")] = None,
    neighbours: Annotated[Path | None, typer.Option(help="Rows near the target, never trained on.")] = None,
    free_text: Annotated[Path | None, typer.Option(help="Any other text that should stay as likely as it was.")] = None,
    holdout: Annotated[
        Path | None, typer.Option(help="Rows like the forget rows that the base has never seen, for --suite full.")
    ] = None,
    real_authors: Annotated[Path | None, typer.Option(help="Rows with wrong answers, for --suite tofu.")] = None,
    world_facts: Annotated[Path | None, typer.Option(help="Rows with wrong answers, for --suite tofu.")] = None,
    rwku: Annotated[Path | None, typer.Option(help="RWKU's file of one subject, for --suite rwku.")] = None,
    base: options.BaseOption = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="full adds memorization as in MUSE, membership attacks and the truth ratio; tofu adds model utility "
            "and forget quality (rows with `perturbed`, a list of wrong answers); rwku asks the questions of --rwku."
        ),
    ] = Suite.QUICK,
    retrained: Annotated[
        str | None, typer.Option(help="A model that never saw the forget rows, for the forget quality of --suite tofu.")
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            help="Try to get it back: all, or names with commas, your own as file.py:function. Needs forget rows and "
            "probes."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric of your own: module:function or file.py:function, which runs; repeatable."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="General ability: tasks of lm-evaluation-harness (or YAML files), with commas.")
    ] = None,
    lm_eval_path: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with task YAMLs of your own; repeatable. Code that they name runs."),
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each such task.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Answers sampled for each probe.")] = 32,
    strength: options.StrengthOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of greedy and sampled answers.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the bootstrap.")] = 0,
    card: Annotated[bool, typer.Option("--card", help="Put the figures into the adapter's README.md too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: ADAPTER.eval beside it.")] = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    as_json: options.JsonOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Measure whether it is forgotten, and what that cost.

    Everything is measured on the base, with the adapters, and after their removal; every figure has its unit, the
    number n of rows behind it and a 95 % bootstrap interval. After removal all must be as before: exit code 1 if not.

    Give --recipe, single files, or both (a file goes before the recipe's); what has no rows is left out. Tasks of
    --lm-eval (pip install 'unlearn-peft[lm-eval]') run on the base and with the adapters, not after removal.

    The output folder gets report.html (opens without a network), figures.png and evaluation.json. The page and the
    terminal show your probes and the answers to them; evaluation.json and figures.png hold figures only, never a
    row, a prompt or an answer; so does the section that --card puts into the adapter's model card.

      unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml

      unlearn-peft eval out/hp --probes probes.jsonl --neighbours near.jsonl --k 8

      unlearn-peft eval out/king --suite rwku --rwku 001_stephen_king.json

      unlearn-peft eval out/hp --lm-eval world_facts --lm-eval-path recipes/tasks --card

      unlearn-peft eval out/hp --recipe recipes/harry_potter.yaml --attacks prefix,jailbreak,relearn_lora
    """
    from ..adapters.card import put_evaluation
    from ..evaluate.attacks import Target, find_attacks, run_attacks
    from ..evaluate.compare import as_dict
    from ..evaluate.compare import show as show_answers
    from ..evaluate.evaluation import evaluate as evaluate_
    from ..evaluate.evaluation import read_measured
    from ..evaluate.lm_harness import read_tasks
    from ..evaluate.report.report import PICTURE, check_folder, eval_results, markdown_section, show, write_report
    from ..evaluate.suites import check
    from ..evaluate.suites.tofu import truth_ratios
    from ..models.base import load_base
    from ..recipe.plugins import load_function

    first = adapter[0].absolute()
    folder = output or first.parent / ("+".join(path.absolute().name for path in adapter) + ".eval")
    check_folder(folder)
    if card and len(adapter) > 1:
        raise UnlearnError("--card is for a single adapter: the figures of several belong into the card of none")
    if not lm_eval and (lm_eval_path or lm_eval_limit):
        raise UnlearnError("--lm-eval-path and --lm-eval-limit say how to run tasks: name some with --lm-eval")
    files = dict(
        forget=forget, retain=retain, probes=probes, neighbours=neighbours, free_text=free_text, holdout=holdout,
        real_authors=real_authors, world_facts=world_facts, rwku=rwku,
    )  # fmt: skip
    rows, chat_template, refusals = read_measured(recipe, files, needed=not lm_eval)
    check(suite, rows)
    if retrained and suite is not Suite.TOFU:
        raise UnlearnError("--retrained is for the forget quality of --suite tofu: choose that, or leave it out")
    metrics = [load_function(name, "metric") for name in metric or ()]  # refused now and not after minutes, as below
    attack_names = _split(attacks)
    if attack_names:
        find_attacks(attack_names)
        if missing := [name for name in ("forget", "probes") if not rows.get(name)]:
            raise UnlearnError(f"--attacks needs {' and '.join(missing)} rows: name them, or a --recipe that does")
    tasks = read_tasks(task_names, lm_eval_path or (), lm_eval_limit) if (task_names := _split(lm_eval)) else None

    trust = options.trust_of(trusted_keys, require_signature)
    bundles = options.read_adapters(adapter, trust, strength)  # once: what was checked is measured and attacked

    def attack(live: Any) -> list[Any]:
        target = Target(
            live, tuple(bundles), rows["forget"], rows["probes"], rows.get("neighbours", []), seed=seed,
            chat_template=chat_template, trust=trust,
        )  # fmt: skip
        return run_attacks(target, attack_names)

    ratios = truth_ratios(load_base(retrained, dtype, device), rows["forget"]) if retrained else None
    result = evaluate_(
        options.load(base, bundles, dtype, device), bundles, rows, suite=suite, k=k, strength=strength or 1.0,
        seed=seed, max_new_tokens=max_new_tokens, chat_template=chat_template, ability=tasks, retrained=ratios,
        trust=trust, metrics=metrics, refusals=refusals, attacks=attack if attack_names else None,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    written = write_report(result, folder, adapter)
    if card:
        pictures = {PICTURE: folder / PICTURE} if (folder / PICTURE).is_file() else {}
        written.append(put_evaluation(adapter[0], markdown_section(result), eval_results(result), pictures))
    if as_json:
        print(json.dumps(result.figures(), ensure_ascii=False))
    else:
        show_answers(as_dict(result.answers))
        show(result)
        print("\n".join(f"{path}" for path in written))
    if result.left_behind:
        raise typer.Exit(1)


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]
