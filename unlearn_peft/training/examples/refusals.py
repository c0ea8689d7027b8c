"""Forget rows with a refusal for an answer, for objectives whose settings have a field `refusals`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...data.refusals import REFUSALS
from ...data.source import Row


def refusing(rows: Sequence[Row], seed: int, sentences: Sequence[str] = REFUSALS) -> list[Row | None]:
    """Return each row with a refusal for its answer, or None for a row of plain text, which has no question.

    Every assistant turn of a `messages` row is replaced, so that none of the answer is left. The seed decides which
    row gets which of the sentences (`REFUSALS` by default); each comes once before any comes again.
    """
    order = random.Random(seed).sample(sentences, len(sentences))
    return [_answered(row, order[n % len(order)]) for n, row in enumerate(rows)]


def _answered(row: Row, sentence: str) -> Row | None:
    if "messages" in row:
        said = [m["role"] == "assistant" and bool(m["content"]) for m in row["messages"]]  # no turn that calls a tool
        turns = [{**m, "content": sentence} if says else m for m, says in zip(row["messages"], said, strict=True)]
        return {**row, "messages": turns}
    if "prompt" not in row:
        return None
    completion = row["completion"]
    space = completion[: len(completion) - len(completion.lstrip())]  # without a chat template it matters
    return {**row, "completion": space + sentence}
