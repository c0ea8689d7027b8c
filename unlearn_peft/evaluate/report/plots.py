"""An `Evaluation` -> its main figures with their intervals, as inline SVG for the page or one PNG (extra `report`)."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluation import Evaluation
from ..states import STATES
from .labels import factor, label, main_figures, unit

ROWS = {"before": "base", "with": "with adapter", "after": "after removal"}
COLOURS = {"before": "#5b6673", "with": "#c2410c", "after": "#1d6fa5"}  # as in report.html, which inverts them if dark
FRONTIER = "Forgetting against harm, by strength"
_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#c3c9d1", "xtick.major.size": 0, "ytick.major.size": 0,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "svg.fonttype": "none", "svg.hashsalt": "unlearn_peft",
}  # fmt: skip


def panels(evaluation: Evaluation) -> list[tuple[str, str]] | None:
    """Return title and inline SVG of each main figure; None without matplotlib."""
    if _matplotlib() is None:
        return None
    return [(title, _svg(height, draw_into)) for title, height, draw_into in _drawings(evaluation)]


def frontier(evaluation: Evaluation) -> list[tuple[str, float, float]]:
    """Return strength, neighbours' KL (nats/token) and share of probes that leak, if the attack `scaling` was run."""
    for attack in evaluation.attacks:
        if attack.name == "scaling":
            points = attack.details.items()
            return [(strength, p["neighbours_kl"], p["recovered"]) for strength, p in points if "neighbours_kl" in p]
    return []


def drawable(evaluation: Evaluation) -> bool:
    """Return whether there is something to draw, and matplotlib to draw it with."""
    return bool(main_figures(evaluation)) and _matplotlib() is not None


def draw(path: Path, evaluation: Evaluation) -> None:
    """Draw all panels into one PNG on white, see `drawable`."""
    drawings = _drawings(evaluation)
    columns = min(len(drawings), 3)
    lines = -(-len(drawings) // columns)
    with _matplotlib().rc_context(_STYLE):
        figure = _matplotlib().figure.Figure(figsize=(4 * columns, 1.8 * lines), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        grid = figure.subplots(lines, columns, squeeze=False).flat
        for axes, (title, _, draw_into) in zip(grid, drawings, strict=False):
            draw_into(axes)
            axes.set_title(textwrap.fill(title, 36))
        for axes in grid[len(drawings) :]:
            axes.set_axis_off()
        figure.savefig(path, dpi=130, format="png")


def _drawings(evaluation: Evaluation) -> list[tuple[str, float, Callable[[Any], None]]]:
    """Return title, height in inches, and a function that draws into axes, for each panel."""
    names, points = main_figures(evaluation), frontier(evaluation)
    last = [(FRONTIER, 2.2, partial(_draw_frontier, points=points))] if points else []
    return [*((label(name), 1.45, partial(_draw, evaluation=evaluation, name=name)) for name in names), *last]


def _draw(axes: Any, evaluation: Evaluation, name: str) -> None:
    """Draw a dot for the figure and a line for its interval, in a row for each state."""
    for y, state in enumerate(STATES):
        score = evaluation.score(name, state)
        if score is None:
            continue
        times, colour = factor(score), COLOURS[state]
        axes.plot([times * score.low, times * score.high], [y, y], color=colour, lw=2.5, solid_capstyle="round")
        axes.plot([times * score.value], [y], "o", color=colour, ms=7)
        axes.set_xlabel(unit(score))
    low, high = axes.get_xlim()
    first = evaluation.score(name, "before") or evaluation.score(name, "with")
    if first and first.unit.startswith("share"):
        axes.set_xlim(-4, 104)  # all shares on one scale
    elif low > 0 or low > -0.1 * high:
        axes.set_xlim(-0.04 * max(high, 1e-3), max(high, 1e-3) * 1.04)  # from zero: what looks large is large
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(len(STATES) - 0.5, -0.5)
    axes.set_yticks(range(len(STATES)), list(ROWS.values()))
    axes.grid(visible=False, axis="y")


def _draw_frontier(axes: Any, points: list[tuple[str, float, float]]) -> None:
    axes.plot([kl for _, kl, _ in points], [100 * share for _, _, share in points], "o-", color=COLOURS["with"], ms=5)
    last, width = -1.0, 0.1 * max(kl for _, kl, _ in points)  # of a strength's text, about
    for strength, kl, share in points:
        crowded = 0 <= kl - last < width  # weak strengths lie close together
        offset = ((-10, -12) if share > 0.5 else (-3, 14)) if crowded else (3, 5)
        axes.annotate(strength, (kl, 100 * share), offset, textcoords="offset points", fontsize=8)
        last = kl
    axes.set_ylim(-4, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_xlim(left=0)
    axes.set_ylabel("% of probes leak")
    axes.set_xlabel("neighbours' KL to the base, nats/token")


def _svg(height: float, draw_into: Callable[[Any], None]) -> str:
    """Return a panel as an <svg> element, without the ids of its groups, which would repeat on the page."""
    with _matplotlib().rc_context(_STYLE):
        figure = _matplotlib().figure.Figure(figsize=(3.5, height), layout="constrained")
        draw_into(figure.subplots())
        stream = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    return re.sub('<g id="[^"]*"', "<g", svg[svg.index("<svg") :])


def _matplotlib() -> Any:
    """Return the package, or None; not pyplot, which would change the backend of the notebook that this runs in."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    return matplotlib
