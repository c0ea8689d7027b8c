"""What a person sees of an adapter: its model card and its curves. Never the forget text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bundle import CARD, note_digest
from .bundle import CURVES as CURVES
from .errors import AdapterError
from .files import whole_file

_BEGIN, _END = "<!-- evaluation, written by unlearn-peft eval -->", "<!-- /evaluation -->"


def write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write README.md in the Hub's model-card format, made with huggingface_hub's own class."""
    from huggingface_hub import ModelCardData

    base, metrics, recipe = manifest["base"], manifest["metrics"], manifest["recipe"]
    is_hub_id = base["name"].count("/") == 1 and not base["name"].startswith((".", "/"))
    data = ModelCardData(
        base_model=base["name"] if is_hub_id else None,
        library_name="peft",
        tags=["unlearning", "unlearn_peft", recipe["adapter"]["kind"]],
        base_model_relation="adapter" if is_hub_id else None,
    )
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in metrics.items())
    picture = f"\n![forget and retain curves]({CURVES})\n" if (folder / CURVES).is_file() else ""
    loading = (
        "It is an ordinary PEFT LoRA: `peft.PeftModel.from_pretrained(model, folder)` loads it too."
        if manifest["peft_type"] == "LORA"
        else "It is a dense delta on `lm_head`: import `unlearn_peft.adapters.dense` before loading it with PEFT."
    )
    text = f"""---
{data.to_yaml()}
---

# A forget adapter for {base["name"]}

With this adapter attached the base behaves as if the adapter's forget set had not been learned; detached, it is
bit-equal to the base. What was forgotten is not told here, and cannot be read from this folder's text files.

```python
from unlearn_peft import attach, detach, load_base

base = load_base("{base["name"]}")
attach(base, "path/to/this/folder")
```

{loading}

| figure | value |
|---|---|
{rows}

Losses and KL are means in nats/token. Objective: {recipe["objective"]["name"]}, {metrics["best_step"]} steps,
learning rate {recipe["learning_rate"]:g}, retain weight {recipe["retain_weight"]:g}.
{picture}"""
    (folder / CARD).write_text(text, encoding="utf-8")


def put_evaluation(folder: Path, section: str) -> Path:
    """Put a section into the adapter's card, in place of an earlier evaluation; all else in it stays. Returns its path.

    The manifest gets the card's new digest.

    Raises:
        AdapterError: if the card is no text.
        OutputError: if the folder cannot be written to.
    """
    card = folder / CARD
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
    except UnicodeDecodeError:
        raise AdapterError(f"{card} is no text in UTF-8: mend or remove it, and a new one is made") from None
    block = f"{_BEGIN}\n{section.strip()}\n{_END}\n"
    earlier = re.search(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", text, re.DOTALL)
    if earlier:
        text = text[: earlier.start()] + block + text[earlier.end() :]
    else:
        text = f"{text.rstrip()}\n\n{block}".lstrip()
    with whole_file(card) as temporary:
        temporary.write_text(text, encoding="utf-8")
    note_digest(folder, CARD)
    return card


def draw_curves(
    path: Path, history: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]], best: int
) -> bool:
    """Draw forget loss and retain KL over the steps; returns False where matplotlib (extra `report`) is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
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
    which, label = ("held_out_kl", "held out") if "held_out_kl" in evaluations[0] else ("retain_kl", "whole retain set")
    right.plot(
        [e["step"] for e in evaluations],
        [e[which] for e in evaluations],
        "o-",
        color="#2471a3",
        ms=3,
        label=label,
    )
    right.set(title="Retain KL to the base: low is unharmed", xlabel="step", ylabel="nats/token")
    for axes in (left, right):
        axes.axvline(best, color="grey", ls=":", label=f"kept: step {best}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def curve_lines(evaluations: Sequence[Mapping[str, float]], best: int) -> str:
    """Return the curves as text, a line an evaluation, with bars."""
    top = max(e["forget_set_loss"] for e in evaluations) or 1.0
    which, label = ("held_out_kl", "held out") if "held_out_kl" in evaluations[0] else ("retain_kl", "held in")
    lines = [f"  step   forget loss            of it specific   retain KL ({label}), nats/token"]
    for e in evaluations:
        bar = "█" * round(10 * e["forget_set_loss"] / top)
        lines.append(
            f"  {e['step']:>4}   {e['forget_set_loss']:>7.3f} {bar:<12}   {e['specific_loss']:>12.3f}   {e[which]:.4f}"
            + ("   <- kept" if e["step"] == best else "")
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
