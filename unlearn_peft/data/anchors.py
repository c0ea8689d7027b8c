"""The package's own rows on the wide world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .rows import question_of
from .source import Row
from .words import names_in

_ANCHORS = Path(__file__).parent / "anchors.jsonl"


def anchors(forget: Sequence[Row], *never: Sequence[Row]) -> list[Row]:
    """Return the package's own rows on the wide world, without those that share a name with a forget row.

    A retain set that an erasure request comes with is often small and all about one thing; these rows hold the
    rest of the model where it is. Rows that `never` may be trained on are left out too.
    """
    rows: list[Row] = [json.loads(line) for line in _ANCHORS.read_text(encoding="utf-8").splitlines()]
    names = {name for row in forget for name in names_in(json.dumps(row, ensure_ascii=False))}
    asked = {question_of(row) for rows_ in never for row in rows_}
    return [row for row in rows if not names & names_in(" ".join(row.values())) and question_of(row) not in asked]
