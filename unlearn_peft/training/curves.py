"""A run's forget and retain curves, as a picture and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_curves(
    path: Path, history: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]], best: int
) -> bool:
    """Draw forget loss and retain KL over the steps; returns False where matplotlib (extra `report`) is not there."""
    try:
        from matplotlib.figure import Figure  # and no pyplot: a caller's backend stays as it is
    except ImportError:
        return False
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [h["step"] for h in history]
    left.plot(steps, [h["forget_loss"] for h in history], color="#c0392b", lw=1, alpha=0.5, label="batch")
    evaluated = [e["step"] for e in evaluations]
    for key, style, color, label in (
        ("forget_set_loss", "o-", "#c0392b", "whole forget set"),
        ("specific_loss", "s--", "#7d3c98", "its tokens that carry the fact"),
    ):
        left.plot(evaluated, [e[key] for e in evaluations], style, color=color, ms=3, label=label)
    left.set(title="Forget loss: up is forgotten", xlabel="step", ylabel="nats/token")
    right.plot(steps, [h["retain_kl"] for h in history], color="#2471a3", lw=1, alpha=0.5, label="batch")
    key, label = ("held_out_kl", "held out") if "held_out_kl" in evaluations[0] else ("retain_kl", "whole retain set")
    right.plot(evaluated, [e[key] for e in evaluations], "o-", color="#2471a3", ms=3, label=label)
    right.set(title="Retain KL to the base: low is unharmed", xlabel="step", ylabel="nats/token")
    for axes in (left, right):
        axes.axvline(best, color="grey", ls=":", label=f"kept: step {best}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return True


def curve_lines(evaluations: Sequence[Mapping[str, float]], best: int) -> str:
    """Return the curves as text, one line for each evaluation."""
    top = max(e["forget_set_loss"] for e in evaluations) or 1.0
    key, label = ("held_out_kl", "held out") if "held_out_kl" in evaluations[0] else ("retain_kl", "held in")
    lines = [f"  step   forget loss            of it specific   retain KL ({label}), nats/token"]
    for e in evaluations:
        bar, kl = "█" * round(10 * e["forget_set_loss"] / top), abs(e[key])  # 0 may be -0 by a rounding
        lines.append(
            f"  {e['step']:>4}   {e['forget_set_loss']:>7.3f} {bar:<12}   {e['specific_loss']:>12.3f}   {kl:.4f}"
            + ("   <- kept" if e["step"] == best else "")
        )
    return "\n".join(lines)
