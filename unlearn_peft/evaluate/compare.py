"""`unlearn-peft compare`: answers before, with and after adapters side by side, and the neighbours' KL to the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.bundle import Bundle
from ..adapters.trust import Trust
from ..data.source import Row
from ..data.words import places
from ..errors import printable
from ..inference.generate import answers
from ..models.base import Base
from .responses import Comparison, Responses, compare_probes
from .score import per_token, sums
from .states import STATES, check_adapters, in_each_state
from .token_scores import keep_reference, kl_to_reference


def compare(
    base: Base,
    adapters: Sequence[str | Path | Bundle],
    probes: Sequence[Row],
    neighbours: Sequence[Row] = (),
    strength: float | Sequence[float] = 1.0,
    max_new_tokens: int = 40,
    *,
    trust: Trust | None = None,
) -> dict[str, Any]:
    """Return greedy answers to probes in each state, and the neighbours' mean KL to the base, nats/token.

    `adapters`, `strength` and `trust` are as for `attach`; probes are rows with `prompt` and `leak` words, neighbours
    rows that must survive, the KL over their completions.

    Raises:
        AdapterError: if something is attached already, or an adapter is refused.
    """
    checked = check_adapters(base, adapters, strength, trust)
    options: dict[str, Any] = {"what": "neighbours", "batch_size": 1}
    reference = keep_reference(base, neighbours, **options)

    def measure(state: str) -> tuple[Responses, float]:
        texts = answers(base, [row["prompt"] for row in probes], max_new_tokens=max_new_tokens)
        measured = neighbours and state != "before"
        kl = per_token(sums(kl_to_reference(base, neighbours, reference, **options))) if measured else 0.0
        return Responses(texts), kl

    states = in_each_state(base, checked, measure)
    paths = [str(adapter.path if isinstance(adapter, Bundle) else adapter) for adapter in adapters]
    comparisons = compare_probes(probes, {state: responses for state, (responses, _) in states.items()})
    kl = {"neighbour_kl": {state: states[state][1] for state in ("with", "after")}} if neighbours else {}
    return {"adapters": paths, **as_dict(comparisons), **kl}


def as_dict(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return comparisons of probes as `compare --json` prints them, with how many answers leak in each state."""
    probes = [
        {"prompt": row.prompt, **{state: {"text": row.texts[state], "leaked": row.leaks[state]} for state in STATES}}
        for row in comparisons
    ]
    return {"probes": probes, "leaks": {state: sum(bool(row.leaks[state]) for row in comparisons) for state in STATES}}


def show(result: dict[str, Any]) -> None:
    """Print what `compare` or `as_dict` returned as a table for the terminal, leaked words in red."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_lines=True, expand=True)
    for title in ("prompt", "before", "with the adapter", "after removal"):
        table.add_column(title, ratio=1)
    for probe in result["probes"]:
        cells = [Text(printable(probe["prompt"]))]
        for state in STATES:
            cell = Text(printable(probe[state]["text"]) or "(empty)")
            for start, end in places(cell.plain, probe[state]["leaked"]):
                cell.stylize("bold red", start, end)
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
