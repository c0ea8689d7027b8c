"""The package's own rows of general knowledge, trained on beside a retain set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .rows import question_of
from .source import Row
from .words import names_in

_ANCHORS = Path(__file__).parent / "anchors.jsonl"


def anchors(forget: Sequence[Row], *never: Sequence[Row]) -> list[Row]:
    """Return the package's own rows, without those that share a name with a forget row or ask what `never` asks.

    The retain set of an erasure request is often small and all about one thing; these rows hold the rest of the model.
    `never`: sets that must not be trained on, such as probes.
    """
    rows: list[Row] = [json.loads(line) for line in _ANCHORS.read_text(encoding="utf-8").splitlines()]
    names = {name for row in forget for name in names_in(json.dumps(row, ensure_ascii=False))}
    excluded = {question_of(row) for one_set in never for row in one_set}
    return [row for row in rows if not names & names_in(" ".join(row.values())) and question_of(row) not in excluded]
