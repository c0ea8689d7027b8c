"""Checked rows (`prompt`/`completion`, `messages` or `text`) -> token ids, with a mask of the target tokens.

No error or log line quotes a row: rows are named by their number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from ..errors import DataError
from .prompt import Rendered, Span, ask, format_of, has_template, render
from .source import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A row, or a window of a long one, as tokens; `is_target[t]` says whether the losses count token t.

    The first token never counts.
    """

    ids: list[int]
    is_target: list[bool]
    truncated: bool = False  # a part of the prompt is out of sight
    row: int = 0  # number of its row in the set, from 1; 0: of none
    head: int = 0  # tokens in front of the first target, which each window of a long row begins with
    text: str = ""  # the rendered row
    characters: list[Span] = field(default_factory=list)  # of `text`, that each token covers
    answers: list[Span] = field(default_factory=list)  # the characters of `text` that are what the model is to say
    specific: list[bool] | None = None  # of the targets, the fact tokens (training/examples/fact_tokens.py); None: all
    refusal: Example | None = None  # the same question answered by a refusal (training/examples/refusals.py)


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 512,
    train_on: str = "completion",
    chat_template: bool = True,
    closing: bool = True,
    what: str = "data",
) -> list[Example]:
    """Turn rows into token ids and target masks: one example a row, several of a row longer than `max_length`.

    A row is tokenized as a whole, and tokens are matched to the completion by character offsets. A token that spans the
    border between prompt and completion is a target: it carries a part of the answer.

    Args:
        rows: checked rows, see `read_rows`.
        tokenizer: the base's.
        max_length: in tokens; a longer row becomes several examples, see `windows`. None: one example for each row.
        train_on: `completion`, or `all` to count the tokens of the other turns' contents too.
        chat_template: whether `prompt`/`completion` rows go through the tokenizer's chat template, or where it has
            none through the prompt format; `messages` always do. See data/prompt.py.
        closing: whether the end-of-turn marker counts: yes for retain rows; no for forget rows, since a model that
            forgets how to stop writes word salad.
        what: the set's name, for warnings and errors.

    Raises:
        DataError: if a row has no target token, or the template rewrites earlier turns.
    """
    examples = []
    for n, row in enumerate(rows, 1):
        name = f"row {n} of the {what} set"
        rendered = render(row, tokenizer, chat_template, closing, name)
        example = replace(_encode(rendered, tokenizer, train_on), row=n)
        if not any(example.is_target):
            raise DataError(f"{name} has no token to learn from ({len(example.ids)} tokens): write a longer answer")
        examples += windows(example, max_length) if max_length else [example]
    if cut := len({example.row for example in examples if example.truncated}):
        message = "%d of %d rows of the %s set have a prompt of more than half of max_length=%d: only its end is kept"
        logger.warning(message, cut, len(rows), what, max_length)
    return examples


def windows(example: Example, size: int) -> list[Example]:
    """Cut a row into windows of at most `size` tokens that overlap; a row that fits is returned as it is.

    A target counts in the first window that has it, so that at least a quarter of the window's room is in front of it.
    Each window begins with the prompt (of a plain text, with its BOS). If that takes more than half of the window, its
    first token and its last ones are kept, and the windows are `truncated`. Windows without a target are left out.
    """
    n = len(example.ids)
    if n <= size:
        return [example]
    head = min(example.head, size // 2)
    prompt = [0, *range(example.head - head + 1, example.head)] if head else []
    room = size - head
    step = max(room - max(room // 4, 1), 1)
    found, counted = [], example.head
    while counted < n:
        stop = min(n, counted + (room if counted == example.head else step))
        tokens = [*prompt, *range(max(stop - room, example.head), stop)]
        found.append(_part(example, tokens, counted, truncated=head < example.head))
        counted = stop
    return [window for window in found if any(window.is_target)]


def by_row(examples: Sequence[Example]) -> list[list[Example]]:
    """Group the examples of a set by row, in order."""
    return [list(group) for _, group in groupby(examples, lambda example: example.row)]


def encode_text(text: str, tokenizer: Any, *, templated: bool = False) -> list[int]:
    """Return a text's token ids, in training, measuring and serving alike.

    Special tokens are added as the tokenizer does, unless the text begins with its BOS or a chat template made it
    (`templated`): as transformers and vLLM do, a template alone decides about its special tokens.
    """
    return list(tokenizer(text, add_special_tokens=not templated and _lacks_bos(text, tokenizer))["input_ids"])


def chat_prompt(prompt: str, tokenizer: Any, chat_template: bool = True) -> str:
    """Return the text after which the model is to answer `prompt`."""
    if not has_template(tokenizer, chat_template) and format_of(tokenizer, chat_template) is None:
        return prompt
    return ask([{"role": "user", "content": prompt}], tokenizer, chat_template)


def with_places(text: str, tokenizer: Any, special: bool = False) -> tuple[list[int], list[Span]]:
    """Return a text's token ids and the characters that each covers.

    Raises:
        DataError: if the tokenizer cannot tell the characters.
    """
    if not getattr(tokenizer, "is_fast", True):
        raise DataError(
            f"the base's tokenizer ({type(tokenizer).__name__}) is written in Python and does not tell where in a text "
            "a token stands: take a base with a fast tokenizer (tokenizer.json)"
        )
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _encode(rendered: Rendered, tokenizer: Any, train_on: str) -> Example:
    special = not rendered.templated and _lacks_bos(rendered.text, tokenizer)
    ids, offsets = with_places(rendered.text, tokenizer, special)

    def within(spans: Sequence[Span]) -> list[bool]:
        return [any(start < right and end > left for left, right in spans) for start, end in offsets]

    said = within(rendered.contents)
    is_target = within(rendered.answers)
    if train_on == "all":
        is_target = [a or b for a, b in zip(is_target, said, strict=True)]
    head = is_target.index(True) if any(is_target) else len(ids)
    is_target[:1] = [False] * len(is_target[:1])  # nothing precedes the first token that could predict it
    return Example(ids, is_target, head=head, text=rendered.text, characters=offsets, answers=list(rendered.answers))


def _part(example: Example, tokens: Sequence[int], counted: int, truncated: bool) -> Example:
    """Return an example of these of a row's tokens; those before `counted` are context."""

    def part(values: list[Any] | None) -> Any:
        return [values[t] for t in tokens] if values else values

    is_target = [example.is_target[t] and t >= counted for t in tokens]
    return replace(
        example, ids=part(example.ids), is_target=is_target, characters=part(example.characters),
        specific=part(example.specific), truncated=truncated,
    )  # fmt: skip


def _lacks_bos(text: str, tokenizer: Any) -> bool:
    """Return whether the tokenizer is to add its special tokens: a rendered chat template already begins with them."""
    bos = getattr(tokenizer, "bos_token", None)
    return not (bos and text.startswith(bos))
