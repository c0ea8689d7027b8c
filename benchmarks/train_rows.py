"""Rows of exactly 64 tokens for benchmarks/train.py, from TOFU's questions and answers.

`chat`: as the product sees a row: the chat template's tokens, a question, its answer; the answer's tokens are targets.
`text`: 64 tokens of running text, a different one in each row; all tokens are targets, and no two rows begin alike.
"""

import json
from itertools import islice
from os.path import commonprefix
from pathlib import Path

from unlearn_peft.data.tokenize import Example, tokenize
from unlearn_peft.training.examples.build import Sets

DATA = Path(__file__).parent / "data"
FILES = {"forget": DATA / "tofu_forget10.jsonl", "retain": DATA / "tofu_retain.jsonl"}
TOKENS = 64  # of a row
ROWS = 8  # forget rows of a data set, and as many retain rows
JOINED = 4  # answers in a text: always more than 64 tokens of the demo's tokenizer


def data_sets(tokenizer, kind, count=1):
    """Return `count` data sets of 8 forget and 8 retain rows of 64 tokens; no row comes twice."""
    rows = {name: _rows(tokenizer, path, name, kind, count * ROWS) for name, path in FILES.items()}
    parts = [slice(n * ROWS, (n + 1) * ROWS) for n in range(count)]
    return [Sets(rows["forget"][part], rows["retain"][part], held_out=[]) for part in parts]


def counts(sets, batch):
    """Return what a step works on, on average over the data set: tokens, of a row, targets, what all rows share."""
    share = batch / ROWS
    targets = {name: share * sum(sum(row.is_target) for row in getattr(sets, name)) for name in FILES}
    return {
        "tokens": 2 * batch * TOKENS,
        "width": TOKENS,
        "forget_targets": targets["forget"],
        "retain_targets": targets["retain"],
        "shared": len(commonprefix([row.ids for row in (*sets.forget, *sets.retain)])),
    }


def _rows(tokenizer, path, name, kind, count):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if kind == "text":
        answers = [row["completion"] for row in rows]
        rows = [{"text": " ".join(answers[n : n + JOINED])} for n in range(0, len(answers), JOINED)]
    whole = (tokenize([row], tokenizer, max_length=100_000, closing=name != "forget", what=name)[0] for row in rows)
    cut = (Example(e.ids[:TOKENS], e.is_target[:TOKENS]) for e in whole if len(e.ids) >= TOKENS)
    found = list(islice((example for example in cut if any(example.is_target)), count))
    if len(found) < count:
        raise SystemExit(f"{path.name}: {len(found)} rows have {TOKENS} tokens and a target, {count} are needed")
    return found
