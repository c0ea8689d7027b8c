"""Answers to prompts, with whatever adapters are attached, and the figures that compare two states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Base
from .batch import collate
from .data import Row, chat_prompt, tokenize
from .engine import picked_logits


@torch.no_grad()
def answers(
    base: Base,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: bool = True,
) -> list[str]:
    """Answer prompts one by one, greedily unless a temperature is given."""
    texts = []
    for prompt in prompts:
        text = chat_prompt(prompt, base.tokenizer, chat_template)
        bos = base.tokenizer.bos_token
        coded = base.tokenizer(text, return_tensors="pt", add_special_tokens=not (bos and text.startswith(bos)))
        coded = {key: value.to(base.device) for key, value in coded.items() if key != "token_type_ids"}
        choice: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            torch.manual_seed(seed)
            choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids = base.model.generate(
            **coded, max_new_tokens=max_new_tokens, pad_token_id=base.tokenizer.pad_token_id, **choice
        )[0]
        texts.append(base.tokenizer.decode(ids[coded["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


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
