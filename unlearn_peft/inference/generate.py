"""Answers to prompts, greedy or sampled, with whatever adapters are attached."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from ..data.prompt import cut_at_end, end_tokens, format_of, has_template
from ..data.tokenize import chat_prompt, encode_text
from ..data.words import said
from ..models.base import Base
from ..models.layers import check_known
from .decoding import Decoding, generate

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"^\s*\d+\.\s*")  # in front of an entry


def answers(
    base: Base,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: bool = True,
    strip: bool = True,
    rendered: bool = False,
) -> list[str]:
    """Answer each prompt once, greedily unless a temperature is given.

    `strip` removes white space around answers; only behind them where a bare text is continued, so that the text and
    its answer can be joined again. `rendered`: the prompts went through the template or format already.
    """
    asked = _generate(base, prompts, chat_template, 1, max_new_tokens, temperature, seed, rendered)
    texts = [text for (text,) in asked]
    return [_stripped(text, base, chat_template) for text in texts] if strip else texts


def sampled(
    base: Base,
    prompts: Sequence[str],
    *,
    count: int,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: bool = True,
    rendered: bool = False,
) -> list[list[str]]:
    """Sample `count` answers to each prompt from the whole distribution; `rendered` as for `answers`.

    Prompt n has the seed `seed + n`: its answers do not depend on the other prompts, but for rounding.
    """
    samples = _generate(base, prompts, chat_template, count, max_new_tokens, temperature, seed, rendered)
    return [[_stripped(text, base, chat_template) for text in texts] for texts in samples]


def continued_lists(
    base: Base, lists: Sequence[Sequence[str]], *, count: int, max_new_tokens: int, seed: int, temperature: float = 0.7
) -> list[list[list[str]]]:
    """Return for each list what the base goes on with in each of `count` samples, without a last entry that is cut.

    The lists are numbered lines of plain text. At temperature 1 a small base leaves the topic.
    """
    begun = ["".join(f"{n}. {entry}\n" for n, entry in enumerate(entries, 1)) for entries in lists]
    begun = [f"{text}{len(entries) + 1}." for text, entries in zip(begun, lists, strict=True)]
    continued = sampled(
        base, begun, count=count, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed,
        chat_template=False, rendered=True,
    )  # fmt: skip
    return [
        [[_NUMBER.sub("", line).strip() for line in text.split("\n")[:-1]] for text in texts] for texts in continued
    ]


def _generate(
    base: Base, prompts: Sequence[str], chat: bool, count: int, max_new_tokens: int, temperature: float, seed: int,
    rendered: bool,
) -> list[list[str]]:  # fmt: skip
    """Answer prompts `count` times each."""
    if not prompts:
        return []
    tokenizer = base.tokenizer
    templated = has_template(tokenizer, chat)
    asked = prompts if rendered else [chat_prompt(prompt, tokenizer, chat) for prompt in prompts]
    encoded = [encode_text(text, tokenizer, templated=templated) for text in asked]
    for token_ids in encoded:
        check_known(base.model, token_ids, "a prompt")
    encoded, max_new_tokens = _fitting(encoded, max_new_tokens, base)
    form = format_of(tokenizer, chat)
    stops = form.ends if form else []

    def text_of(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def ended(ids: Sequence[int]) -> bool:
        text = text_of(ids)
        return cut_at_end(text, stops) != text

    ends = set(end_tokens(tokenizer, chat)) | own_ends(base.model)
    how = Decoding(max_new_tokens, ends, ended if stops else None, temperature)
    answers = generate(base, encoded, how, count, seed)
    return [[cut_at_end(text_of(ids), stops) for ids in some] for some in answers]


def _fitting(encoded: list[list[int]], max_new_tokens: int, base: Base) -> tuple[list[list[int]], int]:
    """Return prompts and the length of answers as the base has positions for them; of a longer prompt, its end."""
    longest = max(map(len, encoded))
    room = base.window(longest + max_new_tokens)
    if room == longest + max_new_tokens:
        return encoded, max_new_tokens
    kept = max(room - max_new_tokens, room // 2)
    if cut := sum(len(ids) > kept for ids in encoded):
        logger.warning("the base has %d positions: of %d longer prompts only the end is asked", room, cut)
    return [ids[-kept:] for ids in encoded], min(max_new_tokens, room - min(longest, kept))


def own_ends(model: Any) -> set[int]:
    """Return the end tokens that the model's `generation_config` names."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _stripped(text: str, base: Base, chat: bool) -> str:
    bare = not has_template(base.tokenizer, chat) and format_of(base.tokenizer, chat) is None
    return text.rstrip() if bare else text.strip()


def leaked(text: str, words: Sequence[str]) -> list[str]:
    """Return the words that the text contains, in whatever spelling: see `data.words.said`."""
    return said(text, words)
