"""An `Evaluation` -> one page that needs no network, a section for the model card, and a table for the terminal.

The page and the terminal show prompts and answers; the section and `evaluation.json` hold figures only, and may travel
with the adapter.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.bundle import CONFIG, CURVES
from ...adapters.card import EVALUATED
from ...data.words import places
from ...errors import OutputError, printable
from ...files.atomic import atomic_file
from ..evaluation import Evaluation
from ..lm_harness import PREFIX
from ..states import STATES
from . import labels as wording
from .plots import draw, drawable, panels

if TYPE_CHECKING:
    from rich.console import Console

FIGURES, PAGE, PICTURE = "evaluation.json", "report.html", "figures.png"
TITLES = {"before": "base", "with": "with the adapter", "after": "after removal"}
_CHIPS = {
    "same": "as the base", "unclear": "not clear", "better": "better", "worse": "worse",
    "cost": "cost", "missing": "not measured",
}  # fmt: skip
_ATTACK_COLUMNS = ("attack", "budget", "recovered with the adapter", "same on the base")
_MAX_QUOTED = 5  # leaking answers shown: on the page for each probe and attack, in the terminal for each list
_PNG, _MAX_BYTES = b"\x89PNG\r\n\x1a\n", 3_000_000  # of an adapter's curves


def check_folder(folder: Path) -> None:
    """Refuse a folder that a report cannot or should not be written to, before minutes of measuring.

    Raises:
        OutputError: if it is a file, or an adapter: the page shows prompts and answers, and must not travel with it.
    """
    if folder.is_file():
        raise OutputError(f"the output {folder} is a file: choose a folder")
    if (folder / CONFIG).is_file():
        raise OutputError(
            f"the output {folder} is an adapter: the report shows prompts and answers, which must not travel with it. "
            "Choose another folder with --output."
        )


def write_report(evaluation: Evaluation, folder: Path, adapters: Sequence[str | Path] = ()) -> list[Path]:
    """Write the page, the picture and the figures into a folder, each whole or not at all; returns their paths.

    An earlier report in the folder is replaced; `adapters` are directories whose training curves the page shows.

    Raises:
        OutputError: see `check_folder`; or if the folder cannot be written.
    """
    check_folder(folder)
    with atomic_file(folder / FIGURES) as path:
        path.write_text(json.dumps(evaluation.figures(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_file(folder / PAGE) as path:
        path.write_text(html(evaluation, adapters), encoding="utf-8")
    written = [folder / FIGURES, folder / PAGE]
    if drawable(evaluation):
        with atomic_file(folder / PICTURE) as path:
            draw(path, evaluation)
        written.append(folder / PICTURE)
    else:
        (folder / PICTURE).unlink(missing_ok=True)  # an earlier report's
    return written


def html(evaluation: Evaluation, adapters: Sequence[str | Path] = ()) -> str:
    """Return the page: everything inline, everything that is not the template's own escaped by jinja2."""
    import jinja2
    from markupsafe import Markup

    pictures = panels(evaluation)
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=strict)
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.render(
        evaluation=evaluation,
        title=_title(evaluation),
        rows=", ".join(f"{n} {name.replace('_', ' ')}" for name, n in evaluation.rows.items()) or "none",
        headlines=wording.headlines(evaluation),
        panels=None if pictures is None else [(title, Markup(svg)) for title, svg in pictures],
        states=STATES,
        titles=TITLES,
        chips=_CHIPS,
        topics=_topics(evaluation),
        notes=wording.notes(evaluation),
        attacks=[*zip(wording.attack_rows(evaluation.attacks), (a.quoted for a in evaluation.attacks), strict=True)],
        curves=[(Path(path).name, picture) for path in adapters if (picture := _curves(Path(path)))],
        marked=marked,
        max_quoted=_MAX_QUOTED,
        unbroken=unbroken,
    )


def marked(text: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """Split a text into parts, each with whether it is one of the words, in whatever spelling."""
    parts, at = [], 0
    for start, end in places(text, words):
        parts += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [part for part in [*parts, (text[at:], False)] if part[0]]


def unbroken(text: str) -> str:
    """Return a text whose lines may break before, but not within, an interval in brackets or a number of rows."""
    return re.sub(r"\([^()]*\)$|n = \d+", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def markdown_section(evaluation: Evaluation) -> str:
    """Return a section for the model card: figures and attacks only, no prompt and no answer."""
    measured = " + ".join(  # no name: a folder may be called after what was forgotten
        f"weights {adapter.weights_sha256[:12]} at strength {adapter.strength:g}" for adapter in evaluation.adapters
    )
    verdict = f"{evaluation.created[:10]}, {measured}. {wording.removal(evaluation)}."
    lines = ["## Evaluation", "", verdict.replace("<", "&lt;"), ""]
    lines += [_line("figure", "unit", "n", *TITLES.values(), "change"), "|---" * 7 + "|"]
    for _, figures in _topics(evaluation):
        for figure in figures:
            cells = [
                f"{cell[0]} ({cell[1]})" if (cell := figure["cells"][state]) else "not measured" for state in STATES
            ]
            lines.append(_line(figure["label"], figure["unit"], figure["n"], *cells, _CHIPS[figure["change"]]))
    if evaluation.attacks:
        lines += ["", _line(*_ATTACK_COLUMNS), "|---" * 4 + "|"]
        lines += [_line(*row) for row in wording.attack_rows(evaluation.attacks)]
    lines += ["", *(f"- {note}" for note in wording.notes(evaluation)), ""]
    return "\n".join(lines)


def eval_results(evaluation: Evaluation) -> list[Any]:
    """Return the figures with the adapter, the base's beside them, as huggingface_hub's `EvalResult`."""
    from huggingface_hub import EvalResult

    results = []
    for name in evaluation.names:
        now, base = evaluation.score(name, "with"), evaluation.score(name, "before")
        if now is None:
            continue
        rows = _rows_of(name)
        result = EvalResult(
            task_type="text-generation", dataset_type=rows, dataset_name=f"{rows.replace('_', ' ')} rows (not told)",
            metric_type=name, metric_name=wording.label(name), metric_value=round(now.value, 6),
            metric_args={
                "by": EVALUATED, "unit": now.unit, "n": now.n, "low": round(now.low, 6), "high": round(now.high, 6),
                "higher_is_better": now.higher_is_better, **({"base": round(base.value, 6)} if base else {}),
            },
        )  # fmt: skip
        results.append(result)
    return results


def _rows_of(name: str) -> str:
    """Return the set of rows that a figure is about; of a harness task, its name."""
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX).partition(":")[0].partition(",")[0]
    sets = ("forget", "retain", "neighbours", "free_text", "real_authors", "world_facts")
    return next((rows for rows in sets if name.startswith(rows)), "probes" if "leak" in name else "answers")


def show(evaluation: Evaluation) -> None:
    """Print the figures and the attacks as tables for the terminal, then the texts that leak or changed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=Text(printable(f"{_title(evaluation)}, base {evaluation.base}")), title_justify="left")
    table.add_column("figure", min_width=19)  # with the others, 80 columns hold it
    for title in TITLES.values():
        table.add_column(title, max_width=12)
    table.add_column("change", no_wrap=True)
    styles = {"better": "green", "worse": "red", "cost": "yellow"}
    for heading, figures in _topics(evaluation):
        table.add_section()
        table.add_row(Text(heading, style="bold"))
        for figure in figures:
            name = Text(f"{printable(figure['label'])}\n").append(f"{figure['unit']}, n = {figure['n']}", style="dim")
            cells = [
                Text("\n".join(cell).replace(" to ", "–") if (cell := figure["cells"][state]) else "-")
                for state in STATES
            ]
            if figure["restored"]:
                cells[-1] = Text(f"{figure['cells']['after'][0]}\nas the base")
            table.add_row(name, *cells, Text(_CHIPS[figure["change"]], style=styles.get(figure["change"], "")))
    console.print(table)
    if evaluation.attacks:
        attacks = Table(*_ATTACK_COLUMNS, title="attacks", title_justify="left")
        for row in wording.attack_rows(evaluation.attacks):
            attacks.add_row(*(Text(printable(cell)) for cell in row))
        console.print(attacks)
    _show_texts(console, evaluation)
    for note in wording.notes(evaluation):
        console.print(Text(note, style="dim"))
    console.print(Text(f"{wording.removal(evaluation)}.", style="bold red" if evaluation.left_behind else "bold"))


def _show_texts(console: Console, evaluation: Evaluation) -> None:
    """Print the texts that people must judge: a leak word may be part of another, a lost name may be a made-up one."""
    from rich.text import Text

    total = len(evaluation.answers) * evaluation.settings.get("k", 0)
    sampled = [f"{row.prompt} -> {part}" for row in evaluation.answers for part in row.sampled.get("with", [])]
    changed = [
        f"{row.prompt} -> " + " // ".join(" ".join(row.texts[state].split()) for state in ("before", "with"))
        for row in evaluation.changed
    ]
    lists: dict[str, Sequence[str]] = {
        f"sampled answers with the adapter that name a leak word: {len(sampled)} of {total}": sampled,
        **{f"what the attack {attack.name} got out:": attack.quoted for attack in evaluation.attacks},
        f"neighbours whose answer names something else: {len(changed)}, before and with the adapter": changed,
    }
    for title, texts in lists.items():
        if not texts:
            continue
        console.print(Text(title))
        for line in texts[:_MAX_QUOTED]:
            text = Text(printable(f"  {line}", lines=False))
            for start, end in places(text.plain, evaluation.words):
                text.stylize("bold red", start, end)
            console.print(text, soft_wrap=True)
        if len(texts) > _MAX_QUOTED:
            console.print(f"  and {len(texts) - _MAX_QUOTED} more: see {PAGE}")


def _topics(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return all figures as texts, by topic."""

    def figure(name: str) -> dict[str, Any]:
        states = {state: evaluation.score(name, state) for state in STATES}
        first = next(score for score in states.values() if score)
        counts = [str(score.n) if score else "-" for score in states.values()]  # empty answers have no perplexity
        return {
            "name": name,
            "label": wording.label(name),
            "unit": wording.unit(first),
            "n": str(first.n) if {*counts} <= {str(first.n), "-"} else " / ".join(counts),
            "cells": {state: (wording.value(s), wording.interval(s)) if s else None for state, s in states.items()},
            "change": wording.change(states["before"], states["with"]),
            "restored": states["after"] is not None and states["after"] == states["before"],  # exactly, unrounded
        }

    by_topic = {key: [name for name in evaluation.names if wording.topic(name) == key] for key in wording.TOPICS}
    return [(wording.TOPICS[key], [figure(name) for name in names]) for key, names in by_topic.items() if names]


def _title(evaluation: Evaluation) -> str:
    return "Evaluation of " + " + ".join(adapter.name for adapter in evaluation.adapters)


def _curves(folder: Path) -> str | None:
    """Return an adapter's curves as a data URI, if they are a PNG of a plausible size."""
    path = folder / CURVES
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    data = path.read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode() if data.startswith(_PNG) else None


def _line(*cells: str) -> str:
    """Return a row of a Markdown table."""
    escaped = [re.sub(r"\s+", " ", cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return f"| {' | '.join(escaped)} |"
