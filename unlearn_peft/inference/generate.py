"""Answers to prompts, greedy or sampled, with whatever adapters are attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.tokenize import chat_prompt, encode_text
from ..data.words import said
from ..models.base import Base


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
) -> list[str]:
    """Answer each prompt once, greedily unless a temperature is given; `strip` removes white space around answers."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts += _generate(base, batch, chat_template, 1, max_new_tokens, temperature, seed)
    return [text.strip() for text in texts] if strip else texts


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
) -> list[list[str]]:
    """Sample `count` answers to each prompt from the whole distribution.

    Each batch has its own seed (`seed` + the number of its first prompt): with a batch size of 1, a prompt's answers do
    not depend on the other prompts.
    """
    samples: list[list[str]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = _generate(base, batch, chat_template, count, max_new_tokens, temperature, seed + start)
        samples += [[text.strip() for text in texts[n : n + count]] for n in range(0, len(texts), count)]
    return samples


@torch.no_grad()
def _generate(
    base: Base, prompts: Sequence[str], chat: bool, count: int, max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Answer prompts, padded on the left, `count` times each; the caller's random state is kept."""
    tokenizer, pad_id = base.tokenizer, base.tokenizer.pad_token_id
    encoded = [encode_text(chat_prompt(prompt, tokenizer, chat), tokenizer) for prompt in prompts]
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    attention = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = base.model.generate(
            input_ids=ids.to(base.device), attention_mask=attention.to(base.device), max_new_tokens=max_new_tokens,
            num_return_sequences=count, pad_token_id=pad_id, **sampling,
        )  # fmt: skip
    return list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))


def leaked(text: str, words: Sequence[str]) -> list[str]:
    """Return the words that the text contains, in whatever spelling: see `data.words.said`."""
    return said(text, words)
