"""Forget a subject by its name: ask the base, write a recipe folder, train, evaluate.

The folder holds `recipe.yaml` with its rows, which are ordinary files to read and edit, then `adapter/` and `report/`.
Names and rows stay in it: neither the adapter nor any message says them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, OutputError, UnknownSubject
from ..evaluate.evaluation import Evaluation, evaluate, read_measured
from ..evaluate.report.report import FIGURES, write_report
from ..files.atomic import atomic_folder
from ..models.base import Base, load_base
from ..recipe.load import load_recipe, make_recipe
from ..recipe.objectives import refusals_of
from ..recipe.schema import Recipe
from ..training.examples.build import make_retain
from ..training.examples.subject import SubjectRows, rows_about
from ..training.run import unlearn

logger = logging.getLogger(__name__)
RECIPE, ADAPTER, REPORT = "recipe.yaml", "adapter", "report"
_K = 8  # sampled answers to each probe
_SETTINGS = """\
fact_answers: 2         # what the base says of the facts alone is retained
objective:
  name: ga_kl
  retain_budget: null   # tokens are held at the ceiling, so the last step is kept
"""
_ABSTAIN = "  refusals: true        # the questions are taught a refusal; or a list of your own sentences\n"


@dataclass(frozen=True)
class Forgotten:
    """What came of a request: the recipe folder, and what was made in it."""

    folder: Path
    forget_rows: int
    adapter: Path | None = None  # None: only the folder was written, for review
    evaluation: Evaluation | None = None  # None: it was made before, see the folder's report


def forget(
    name: str,
    *,
    also_known_as: Sequence[str] = (),
    base: str | Base = "demo",
    base_name: str | None = None,
    output: str | Path = "out/subject",
    abstain: bool = False,
    review: bool = False,
    resume: bool = False,
    seed: int = 0,
    quiet: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Forgotten:
    """Make a base forget a subject of which only the name is known; returns the folder and what is in it.

    Args:
        name: as it is usually written.
        also_known_as: its other names; the subject is asked for and recognised by them too.
        base: a loaded `Base`, or a name as `load_base` takes it.
        base_name: what the recipe is to call a loaded base; by default its own name.
        output: a new folder for the recipe, its rows, the adapter and the report.
        abstain: questions about the subject are taught a refusal, in English: edit the recipe for your own sentences.
        review: stop when the recipe folder is written; `resume` goes on from there, with the rows as they then are.
        resume: go on with the folder: what is finished in it is left as it is.
        seed: of all sampling and of training.
        quiet: no progress bars.
        progress: is called with a line of text before each part.

    Raises:
        UnknownSubject: if the base knows nothing of it; then nothing is written.
        OutputError: if the folder exists already and `resume` is not set, or its recipe does not `abstain`.
        UnlearnError: as `unlearn` and `evaluate` raise it.
    """
    names = [each.strip() for each in (name, *also_known_as)]
    if not all(names):
        raise DataError("a name is empty: expected the subject's name as it is usually written")
    folder = Path(output)
    begun = (folder / RECIPE).is_file()
    if folder.exists() and not (resume and begun):
        what_to_do = "choose another, or go on with it with resume" if begun else "choose a new one"
        raise OutputError(f"the output {folder} exists already: {what_to_do}")
    if begun and abstain and refusals_of(load_recipe(folder / RECIPE).objective) is None:
        raise OutputError(
            f"{folder / RECIPE} is written already, and trains no refusals: set objective.refusals: true in it instead"
        )
    if begun and (folder / REPORT / FIGURES).is_file():
        progress("finished already")
        return Forgotten(folder, len(read_measured(folder / RECIPE, {}).rows["forget"]), folder / ADAPTER)
    live = base if isinstance(base, Base) else load_base(base)
    if not begun:
        progress("asking the base what it knows of the subject ...")
        found = rows_about(live, names, seed=seed, quiet=quiet)
        if not found.forget:
            raise UnknownSubject(
                f"the base shows no knowledge of the subject: none of its answers to {found.asked} prompts says "
                "something of it again and again that it does not say of a made-up name. There is nothing to forget"
            )
        write_recipe(folder, found, live, base_name or (base if isinstance(base, str) else live.name), seed, abstain)
        progress(
            f"{len(found.forget)} forget rows ({found.reverse} from a fact to the subject), {len(found.probes)} probes "
            f"held out, {len(found.neighbours)} neighbours: {folder / RECIPE}"
        )
    measured, chat_template, refusals = read_measured(folder / RECIPE, {})
    rows = len(measured["forget"])
    if review:
        return Forgotten(folder, rows)
    adapter = folder / ADAPTER
    if not adapter.is_dir():  # it is written whole or not at all
        progress("training ...")
        recipe = load_recipe(folder / RECIPE, output=str(adapter))
        unlearn(live, recipe=recipe, resume=resume, quiet=quiet)
    evaluation = evaluate(
        live, [adapter], measured, k=_K, seed=seed, chat_template=chat_template, refusals=refusals, progress=progress
    )
    write_report(evaluation, folder / REPORT, [adapter])
    return Forgotten(folder, rows, adapter, evaluation)


def write_recipe(
    folder: Path, found: SubjectRows, base: Base, base_name: str, seed: int, abstain: bool = False
) -> None:
    """Write a recipe folder, whole or not at all: the rows, a retain set that the base makes, and `recipe.yaml`."""
    sets = {"forget": found.forget, "probes": found.probes, "neighbours": found.neighbours}
    sets = {name: rows for name, rows in sets.items() if rows}
    recipe: Recipe = make_recipe({**sets, "seed": seed})
    sets["retain"] = make_retain(sets, base, recipe).rows
    if os.path.exists(os.path.expanduser(base_name)):
        base_name = os.path.abspath(os.path.expanduser(base_name))
    lines = [
        "# Written by `unlearn-peft forget`: what the base said of one subject. Read and edit the files, then",
        "#   unlearn-peft forget NAME --output THIS_FOLDER --resume",
        "# or train as from any recipe: unlearn-peft train recipe.yaml --output ADAPTER",
        f"base: {json.dumps(base_name)}",
        *(f"{name}: {name}.jsonl" for name in sets),
        f"{_SETTINGS}{_ABSTAIN if abstain else ''}seed: {seed}",
    ]
    with atomic_folder(folder) as temporary:
        for name, rows in sets.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (temporary / RECIPE).write_text("\n".join(lines) + "\n", encoding="utf-8")
