"""Before, with adapters, after removal: answers side by side, leaked words marked, and what it cost the neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.trust import Trust
from ..data.source import Row
from ..errors import AdapterError
from ..inference.attach import attach, attached, detach
from ..inference.generate import answers, leaked, mean_kl, target_log_probabilities
from ..models.base import Base

STATES = ("before", "with", "after")


def compare(
    base: Base,
    adapters: Sequence[str | Path],
    probes: Sequence[Row],
    neighbours: Sequence[Row] = (),
    strength: float | Sequence[float] = 1.0,
    max_new_tokens: int = 40,
    *,
    trust: Trust | None = None,
) -> dict[str, Any]:
    """Measure a base before, with and after adapters.

    Args:
        base: a base with nothing attached.
        adapters: adapter directories.
        probes: rows with `prompt` and `leak` words.
        neighbours: rows that must survive, for the mean KL(with || before) over their completions, nats/token.
        strength: as `attach` takes it.
        max_new_tokens: length of the greedy answers.
        trust: as `attach` takes it.

    Raises:
        AdapterError: if something is attached already, or an adapter is refused.
    """
    if attached(base):
        raise AdapterError("adapters are attached already: detach them, so that 'before' is the base")
    texts: dict[str, list[str]] = {}
    log_probabilities = {}
    for state in STATES:
        if state == "with":
            attach(base, *adapters, strength=strength, trust=trust)
        if state == "after":
            detach(base)
        texts[state] = answers(base, [row["prompt"] for row in probes], max_new_tokens=max_new_tokens)
        log_probabilities[state] = target_log_probabilities(base, neighbours, "neighbours")
    result: dict[str, Any] = {"adapters": [str(path) for path in adapters], "probes": []}
    for n, row in enumerate(probes):
        shown = {state: {"text": texts[state][n], "leaked": leaked(texts[state][n], row["leak"])} for state in STATES}
        result["probes"].append({"prompt": row["prompt"], **shown})
    result["leaks"] = {state: sum(bool(p[state]["leaked"]) for p in result["probes"]) for state in STATES}
    if neighbours:
        before = log_probabilities["before"]
        result["neighbour_kl"] = {state: mean_kl(log_probabilities[state], before) for state in ("with", "after")}
    return result


def show(result: dict[str, Any]) -> None:
    """Print a comparison as a table for the terminal, leaked words in red."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_lines=True, expand=True)
    for title in ("prompt", "before", "with the adapter", "after removal"):
        table.add_column(title, ratio=1)
    for probe in result["probes"]:
        cells = [Text(probe["prompt"])]
        for state in STATES:
            cell = Text(probe[state]["text"] or "(empty)")
            cell.highlight_words(probe[state]["leaked"], "bold red", case_sensitive=False)
            cells.append(cell)
        table.add_row(*cells)
    if result["probes"]:
        console.print(table)
        n = len(result["probes"])
        counts = ", ".join(f"{state} {result['leaks'][state]}/{n}" for state in STATES)
        console.print(f"answers that leak: {counts}")
    if "neighbour_kl" in result:
        kl = result["neighbour_kl"]
        console.print(
            f"neighbours, mean KL to the base: {kl['with']:.4f} nats/token with the adapter, "
            f"{kl['after']:.4f} after removal"
        )
