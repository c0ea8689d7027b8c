"""Dots and intervals: one small panel a figure, with a row each for the base, with the adapter, and after removal.

An `Evaluation` comes in; SVG for a page that colours it by its own style sheet, or one PNG, goes out. Needs
matplotlib (extra `report`).
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluation import STATES, Evaluation
from .labels import factor, label, main_figures, unit

ROWS = {"before": "base", "with": "with adapter", "after": "after removal"}
# Stand-ins that the page's style sheet gives its own colours, light or dark; also good on white as they are.
COLOURS = {"before": "#5b6673", "with": "#c2410c", "after": "#1d6fa5"}
INK, LINE = "#20262e", "#d5dae1"
FRONTIER = "Forgetting against harm, by strength"
_VARIABLES = {COLOURS["before"]: "before", COLOURS["with"]: "with", COLOURS["after"]: "after", INK: "ink", LINE: "line"}


def panels(evaluation: Evaluation) -> list[tuple[str, str]] | None:
    """Return label and inline SVG of each main figure; None where matplotlib is not there."""
    if _matplotlib() is None:
        return None
    names, points = main_figures(evaluation), frontier(evaluation)
    found = [(label(name), _svg(1.45, partial(_draw, evaluation=evaluation, name=name))) for name in names]
    if points:
        found.append((FRONTIER, _svg(2.2, partial(_draw_frontier, points=points))))
    return found


def frontier(evaluation: Evaluation) -> list[tuple[str, float, float]]:
    """Return strength, neighbours' KL (nats/token) and share of probes that leak, if the attack `scaling` told them."""
    for attack in evaluation.attacks:
        if attack.name == "scaling":
            details = getattr(attack, "details", {})
            return [(s, d["neighbours_kl"], d["recovered"]) for s, d in details.items() if "neighbours_kl" in d]
    return []


def drawable(evaluation: Evaluation) -> bool:
    """Return whether there is something to draw, and matplotlib to draw it with."""
    return bool(main_figures(evaluation)) and _matplotlib() is not None


def draw(path: Path, evaluation: Evaluation) -> None:
    """Draw all panels into one PNG on white, see `drawable`."""
    names, points = main_figures(evaluation), frontier(evaluation)
    count = len(names) + bool(points)
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = _matplotlib().figure.Figure(figsize=(4 * columns, 1.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for n, axes in enumerate(grid.flat):
        if n < len(names):
            _draw(axes, evaluation, names[n])
            _title(axes, label(names[n]))
        elif n == len(names) and points:
            _draw_frontier(axes, points)
            _title(axes, FRONTIER)
        else:
            axes.set_axis_off()
    figure.savefig(path, dpi=130, format="png")


def _title(axes: Any, text: str) -> None:
    axes.set_title(textwrap.fill(text, 36), fontsize=10, fontweight="bold", color=INK, loc="left")


def _draw(axes: Any, evaluation: Evaluation, name: str) -> None:
    unit_ = ""
    for y, state in enumerate(STATES):
        score = evaluation.score(name, state)
        if score is None:
            continue
        times, unit_ = factor(score), unit(score)
        axes.plot([times * score.low, times * score.high], [y, y], color=COLOURS[state], lw=2.5, solid_capstyle="round")
        axes.plot([times * score.value], [y], "o", color=COLOURS[state], ms=7)
    low, high = axes.get_xlim()
    first = evaluation.score(name, "before") or evaluation.score(name, "with")
    if first and first.unit.startswith("share"):
        axes.set_xlim(-4, 104)  # all shares on one scale
    elif low > 0 or low > -0.1 * high:
        axes.set_xlim(-0.04 * max(high, 1e-3), max(high, 1e-3) * 1.04)  # from zero: what looks large is large
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(len(STATES) - 0.5, -0.5)
    axes.set_yticks(range(len(STATES)), list(ROWS.values()))
    _frame(axes, unit_, "x")


def _draw_frontier(axes: Any, points: list[tuple[str, float, float]]) -> None:
    axes.plot([kl for _, kl, _ in points], [100 * share for _, _, share in points], "o-", color=COLOURS["with"], ms=5)
    last, wide = -1.0, 0.1 * max(kl for _, kl, _ in points)  # of a label, about
    for strength, kl, share in points:
        crowded = 0 <= kl - last < wide  # weak strengths lie close together
        at = ((-10, -12) if share > 0.5 else (-3, 14)) if crowded else (3, 5)
        axes.annotate(strength, (kl, 100 * share), at, textcoords="offset points", fontsize=8, color=INK)
        last = kl
    axes.set_ylim(-4, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_xlim(left=0)
    axes.set_ylabel("% of probes leak", color=INK, fontsize=9)
    _frame(axes, "neighbours' KL to the base, nats/token", "both")


def _frame(axes: Any, unit: str, grid: Any) -> None:
    axes.set_xlabel(unit, color=INK, fontsize=9)
    axes.grid(axis=grid, color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)


def _svg(height: float, draw_into: Callable[[Any], None]) -> str:
    style = {"svg.fonttype": "none", "svg.hashsalt": "unlearn_peft", "font.family": "sans-serif", "font.size": 9}
    matplotlib = _matplotlib()
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(3.5, height), layout="constrained")
        draw_into(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue())


def _inline(svg: str) -> str:
    """Cut a file down to its <svg> element, let the page colour it, and drop ids that would repeat."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', ' aria-hidden="true"', svg, count=1)
    svg = re.sub(r' height="[^"]*pt"| width="[^"]*pt"', "", svg, count=2)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _matplotlib() -> Any:
    """Return the package, or None; not pyplot, which would change the backend of the notebook that this runs in."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    return matplotlib
