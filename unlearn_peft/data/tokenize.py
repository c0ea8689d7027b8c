"""Forget and retain rows -> token ids, with a mask of the tokens that the losses are about.

Rows come as `prompt`/`completion`, `messages` or `text`, from jsonl, csv, parquet or Hub data sets. No error
or log line of this file ever quotes a row: rows are named by their number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .source import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One row as tokens; `is_target[t]` says whether the losses count token t (never the first)."""

    ids: list[int]
    is_target: list[bool]
    truncated: bool = False
    words: list[str] | None = None  # the word that each token is a part of, case folded; "" for none
    specific: list[bool] | None = (
        None  # of the targets, those that carry the fact (see training/examples/fact_tokens.py); None: all
    )
    refusal: Example | None = None  # the same question answered by a refusal (see training/examples/refusals.py)


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int = 512,
    train_on: str = "completion",
    chat_template: bool = True,
    closing: bool = True,
    what: str = "data",
) -> list[Example]:
    """Turn rows into token ids and target masks.

    The whole row is tokenised at once, as the model would meet it, and tokens are matched to the completion by
    their character offsets. A token that spans the border between prompt and completion is a target: it
    carries a part of the answer.

    Args:
        rows: checked rows, see `read_rows`.
        tokenizer: the base's; its chat template is used for `messages`, and for `prompt`/`completion` unless
            `chat_template` is False or it has none.
        max_length: longer rows are cut on the right, and counted in a warning.
        train_on: `completion`, or `all` to count prompt tokens too.
        chat_template: see above.
        closing: whether the end-of-turn marker counts. It should on the retain side (where to stop is worth
            keeping) and should not on the forget side (a model that forgets how to stop writes word salad).
        what: named in warnings and errors.

    Raises:
        DataError: if a row has no target token left after cutting, or the template rewrites earlier turns.
    """
    examples = []
    for n, row in enumerate(rows, 1):
        text, spans = _render(row, tokenizer, chat_template, closing, n, what)
        example = _encode(text, spans, tokenizer, max_length, train_on)
        if not any(example.is_target):
            why = f"cut at max_length={max_length}, " if example.truncated else ""
            raise DataError(
                f"row {n} of the {what} set has no token to learn from ({why}{len(example.ids)} tokens): "
                "raise max_length or shorten the prompt"
            )
        examples.append(example)
    cut = sum(example.truncated for example in examples)
    if cut:
        logger.warning(
            "%d of %d rows of the %s set are longer than %d tokens and were cut",
            cut,
            len(rows),
            what,
            max_length,
        )
    return examples


def chat_prompt(prompt: str, tokenizer: Any, chat_template: bool = True) -> str:
    """Return the text after which the model is to answer `prompt`."""
    if not chat_template or not getattr(tokenizer, "chat_template", None):
        return prompt
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    )


Span = tuple[int, int]


def _render(row: Row, tokenizer: Any, chat_template: bool, closing: bool, n: int, what: str) -> tuple[str, list[Span]]:
    """Return the row's whole text and the character spans of its targets."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if "messages" in row or ("prompt" in row and chat_template and has_template):
        if not has_template:
            raise DataError(
                f"row {n} of the {what} set holds 'messages', but the base's tokenizer has no chat template: "
                "use 'prompt' and 'completion', or an instruction-tuned base"
            )
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return _render_chat(messages, tokenizer, closing, n, what)
    if "prompt" in row:
        return row["prompt"] + row["completion"], [(len(row["prompt"]), len(row["prompt"]) + len(row["completion"]))]
    return row["text"], [(0, len(row["text"]))]


def _render_chat(messages: Sequence[Row], tokenizer: Any, closing: bool, n: int, what: str) -> tuple[str, list[Span]]:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        content = message["content"].strip()
        start = whole.find(content, len(before))
        if not whole.startswith(before) or start < 0:
            raise DataError(
                f"row {n} of the {what} set: the chat template rewrites turn {i + 1}, so its tokens cannot be "
                "told apart. Give the row as 'prompt' and 'completion' with chat_template: false."
            )
        end = start + len(content)
        marker = tokenizer.eos_token or ""
        if closing and marker and whole.startswith(marker, end):
            end += len(marker)
        spans.append((start, end))
    return whole, spans


def _encode(text: str, spans: Sequence[Span], tokenizer: Any, max_length: int, train_on: str) -> Example:
    # A rendered template already holds its special tokens; plain text gets the tokenizer's own (a BOS, say).
    bos = getattr(tokenizer, "bos_token", None)
    add_special = not (bos and text.startswith(bos))
    coded = tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    if train_on == "all":
        is_target = [end > start for start, end in offsets]
    else:
        is_target = [any(start < right and end > left for left, right in spans) for start, end in offsets]
    is_target[:1] = [False] * len(is_target[:1])  # nothing precedes the first token that could predict it
    words = _words(text, offsets[:max_length])
    return Example(ids[:max_length], is_target[:max_length], truncated=len(ids) > max_length, words=words)


def _words(text: str, offsets: Sequence[Span]) -> list[str]:
    """Return the last word that each token has a part in."""
    at = [""] * len(text)
    for match in re.finditer(r"\w+", text):
        at[match.start() : match.end()] = [match.group().casefold()] * (match.end() - match.start())
    return [next((word for word in reversed(at[start:end]) if word), "") for start, end in offsets]
