"""Answers to prompts, greedy or sampled, with whatever adapters are attached."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.prompt import cut_at_end, end_tokens, format_of, has_template
from ..data.tokenize import chat_prompt, encode_text
from ..data.words import said
from ..models.base import Base
from ..models.forward import contiguous_head
from ..models.layers import check_known

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"^\s*\d+\.\s*")  # in front of an entry
_GREEDY_BELOW = 1e-5  # a temperature, as in serving; dividing logits by less than this leaves float32's range


def answers(
    base: Base,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 1,
    strip: bool = True,
    rendered: bool = False,
) -> list[str]:
    """Answer each prompt once, greedily unless a temperature is given.

    `strip` removes white space around answers; only behind them where a bare text is continued, so that the text and
    its answer can be joined again. `rendered`: the prompts went through the template or format already.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts += _generate(base, batch, chat_template, 1, max_new_tokens, temperature, seed, rendered)
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
    batch_size: int = 1,
    rendered: bool = False,
) -> list[list[str]]:
    """Sample `count` answers to each prompt from the whole distribution; `rendered` as for `answers`.

    Each batch has its own seed (`seed` + the number of its first prompt): with a batch size of 1, a prompt's answers do
    not depend on the other prompts.
    """
    samples: list[list[str]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = _generate(base, batch, chat_template, count, max_new_tokens, temperature, seed + start, rendered)
        texts = [_stripped(text, base, chat_template) for text in texts]
        samples += [texts[n : n + count] for n in range(0, len(texts), count)]
    return samples


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


@torch.no_grad()
def _generate(
    base: Base, prompts: Sequence[str], chat: bool, count: int, max_new_tokens: int, temperature: float, seed: int,
    rendered: bool = False,
) -> list[str]:  # fmt: skip
    """Answer prompts, padded on the left, `count` times each; the caller's random state is kept."""
    from transformers import StoppingCriteriaList

    tokenizer, pad_id = base.tokenizer, base.pad_id
    templated = has_template(tokenizer, chat)
    asked = prompts if rendered else [chat_prompt(prompt, tokenizer, chat) for prompt in prompts]
    encoded = [encode_text(text, tokenizer, templated=templated) for text in asked]
    for token_ids in encoded:
        check_known(base.model, token_ids, "a prompt")
    encoded, max_new_tokens = _fitting(encoded, max_new_tokens, base)
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    attention = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    ends = set(end_tokens(tokenizer, chat)) | own_ends(base.model)
    form = format_of(tokenizer, chat)
    stops = form.ends if form else []

    def texts(output: Tensor) -> list[str]:
        answers = [_until(row, ends) for row in output[:, ids.shape[1] :].tolist()]
        return list(tokenizer.batch_decode(answers, skip_special_tokens=True))

    def stopped(output: Tensor, scores: object, **_: object) -> Tensor:
        cut = [cut_at_end(text, stops) != text for text in texts(output)]
        return torch.tensor(cut, dtype=torch.bool, device=output.device)

    criteria = StoppingCriteriaList([stopped] if stops else [])
    settings: dict[str, Any] = (
        {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature >= _GREEDY_BELOW else {}
    )
    settings |= {
        "do_sample": temperature >= _GREEDY_BELOW,
        "num_return_sequences": count,
        "max_new_tokens": max_new_tokens,
    }
    random = torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else [])
    with random, plain_generation(base.model, pad_token_id=pad_id, eos_token_id=sorted(ends) or None, **settings):
        torch.manual_seed(seed)
        output = base.model.generate(
            input_ids=ids.to(base.device), attention_mask=attention.to(base.device), stopping_criteria=criteria
        )
    return [cut_at_end(text, stops) for text in texts(output)]


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


@contextmanager
def plain_generation(model: Any, **settings: Any) -> Iterator[None]:
    """Generate by these settings alone: no penalty, cut-off or forced token of the model's `generation_config`."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(**settings)
    try:
        with contiguous_head(model):
            yield
    finally:
        model.generation_config = before


def own_ends(model: Any) -> set[int]:
    """Return the end tokens that the model's `generation_config` names."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _stripped(text: str, base: Base, chat: bool) -> str:
    bare = not has_template(base.tokenizer, chat) and format_of(base.tokenizer, chat) is None
    return text.rstrip() if bare else text.strip()


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]


def leaked(text: str, words: Sequence[str]) -> list[str]:
    """Return the words that the text contains, in whatever spelling: see `data.words.said`."""
    return said(text, words)
