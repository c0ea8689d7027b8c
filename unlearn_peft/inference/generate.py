"""Answers to prompts, with whatever adapters are attached, and the figures that compare two states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.batch import collate
from ..data.source import Row
from ..data.tokenize import chat_prompt, tokenize
from ..models.base import Base
from ..models.forward import picked_logits


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
    """Answer each prompt once, greedily unless a temperature is given; `batch_size` prompts at a time.

    White space around an answer is left out unless `strip` is False.
    """
    texts = []
    for start in range(0, len(prompts), batch_size):
        chunk = [chat_prompt(prompt, base.tokenizer, chat_template) for prompt in prompts[start : start + batch_size]]
        texts.extend(_generate(base, chunk, 1, max_new_tokens, temperature, seed))
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
    """Sample `count` answers to each prompt from the whole distribution, `batch_size` prompts at once.

    Each batch has its own seed (`seed` + the number of its first prompt). With a batch size of 1 a prompt's answers
    so don't depend on the other prompts.
    """
    texts = [chat_prompt(prompt, base.tokenizer, chat_template) for prompt in prompts]
    found: list[list[str]] = []
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        said = [text.strip() for text in _generate(base, chunk, count, max_new_tokens, temperature, seed + start)]
        found.extend(said[n * count : (n + 1) * count] for n in range(len(chunk)))
    return found


@torch.no_grad()
def _generate(
    base: Base, texts: Sequence[str], count: int, max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Continue rendered prompts, padded on the left, `count` times each; the caller's random state is kept."""
    bos = base.tokenizer.bos_token
    ids = [base.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"] for text in texts]
    width = max(map(len, ids))
    rows = torch.full((len(ids), width), base.tokenizer.pad_token_id)
    attention = torch.zeros_like(rows)
    for n, row in enumerate(ids):
        rows[n, width - len(row) :] = torch.tensor(row)
        attention[n, width - len(row) :] = 1
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        found = base.model.generate(
            input_ids=rows.to(base.device), attention_mask=attention.to(base.device), max_new_tokens=max_new_tokens,
            num_return_sequences=count, pad_token_id=base.tokenizer.pad_token_id, **choice,
        )  # fmt: skip
    return list(base.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True))


def leaked(text: str, words: Sequence[str]) -> list[str]:
    """Return the words that the text contains; case does not matter."""
    return [word for word in words if word.casefold() in text.casefold()]


@torch.no_grad()
def target_log_probabilities(base: Base, rows: Sequence[Row], what: str = "rows") -> list[torch.Tensor]:
    """Return log p over the vocabulary at each target token, one (n, V) tensor a row, on the CPU in float32."""
    result = []
    for example in tokenize(rows, base.tokenizer, what=what):
        batch = collate([example], base.tokenizer.pad_token_id).to(base.device)
        logits = picked_logits(base.model, base.model.get_output_embeddings(), batch)
        result.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return result


def mean_kl(current: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Return the mean over all target tokens of KL(current || reference), nats/token."""
    values = [(p.exp() * (p - q)).sum(-1) for p, q in zip(current, reference, strict=True)]
    return float(torch.cat(values).mean())
