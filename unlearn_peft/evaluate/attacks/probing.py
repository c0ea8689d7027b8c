"""White-box probing: read the answer off the middle layers (logit lens), or off the adapter's effect (adapter diff)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.prompt import has_template
from ...data.source import Row
from ...data.tokenize import encode_text
from ...errors import BaseModelError
from ...models.base import Base
from ...models.layers import decoder_layers, outputs_of
from ..score import Array
from ..token_scores import adapters_off
from .harness import Attacked, Target, adapters_on, attacked, averages, beginning_of, render
from .templates import GENERIC
from .weights import random_like


@dataclass(frozen=True)
class Question:
    """Where the model would say a leak word: the token ids before it, and the id of its first token there."""

    ids: list[int]
    first: int


def logit_lens(target: Target, *, top: int = 10) -> Attacked:
    """Read middle layers through the base's final norm and output head (nostalgebraist 2020, "the logit lens").

    The position read is where the answer names the fact: after the prompt and the probe's `completion` up to the leak
    word, or after the prompt alone where it has none. A probe is recovered if, after any layer, the first token of one
    of its leak words is among the `top` most likely. Reading needs the weights. The head is the base's own, without
    what an adapter adds to it: who can read layers has that one too, so an adapter on the head alone hides nothing
    from this attack.

    `details`: shares by layer (0: embeddings; the last: the head's input), medians over the probes of the best rank
    over layers (0 is first) and of the highest probability over layers. With many layers some token is often among the
    first by chance: compare with the base, which is read likewise.
    """
    questions = [_questions(target, row) for row in target.probes]
    with adapters_off(target.base):
        base_ranks, base_probabilities = _lens(target.base, questions)
    with adapters_on(target):
        ranks, probabilities = _lens(target.base, questions)
    details: dict[str, Any] = {
        f"layer {n}": averages(of_layer < top, of_base < top)
        for n, (of_layer, of_base) in enumerate(zip(ranks.T, base_ranks.T, strict=True))
    }
    best, base_best = ranks.min(1), base_ranks.min(1)
    details["median best rank"] = averages(best, base_best, average=np.median)
    details["median best probability"] = averages(probabilities.max(1), base_probabilities.max(1), average=np.median)
    budget = f"weights and all {ranks.shape[1]} layer states at one position a probe; first token in the top {top}"
    return attacked(target, "logit_lens", budget, best < top, base_best < top, details)


def adapter_diff(target: Target, *, top: int = 50) -> Attacked:
    """Read the forget topic off the adapter's effect: which tokens does it make less likely, whatever is asked?

    The attacker holds adapter and base, and asks generic questions that name nothing. Tokens are ordered by the mean
    over these of log p(base) - log p(adapter) of the next token. A probe is recovered if the first token of one of its
    leak words is among the `top`. The comparison is chance: a random LoRA of the same layers, rank and size in the
    adapter's place.

    A low share here does not show that the adapter gives nothing away. This is one simple reading; who guesses the
    topic and asks about it sees the difference at once, since suppressing an answer is what the adapter is for. A
    forget adapter must be kept as confidential as the request to forget.

    `quoted` has the tokens themselves; `details` only the median over the probes of the best rank of their words (0 is
    first).
    """
    prompts = [render(target, text) for text in GENERIC]
    tokenizer = target.base.tokenizer

    first_tokens = [
        {
            ids[0]
            for word in row["leak"]
            for text in (word, f" {word}")
            if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])
        }
        for row in target.probes
    ]
    with adapters_off(target.base):
        plain = _next_log_p(target, prompts)  # (P, V)
    with adapters_on(target):
        drop = (plain - _next_log_p(target, prompts)).mean(0)  # (V,)
    with adapters_on(target, bundles=random_like(target.bundles, target.seed)):
        random_drop = (plain - _next_log_p(target, prompts)).mean(0)
    special = tokenizer.all_special_ids
    ranks, random_ranks = (_best_ranks(values, first_tokens, special) for values in (drop, random_drop))
    tokens = [i for i in drop.argsort(descending=True).tolist() if i not in special][:top]
    details = {"median best rank": averages(ranks, random_ranks, average=np.median)}
    budget = (
        f"the adapter's files and the base, next tokens after {len(prompts)} generic prompts, first token in the top "
        f"{top} drops; the comparison is a random LoRA of the same size"
    )
    quoted = tuple(tokenizer.decode([i]) for i in tokens)
    return attacked(target, "adapter_diff", budget, ranks < top, random_ranks < top, details, *quoted)


@torch.no_grad()
def layer_logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Return the logits that the base's bare head gives each layer's state at the last position, (layers + 1, V).

    The last row is what the model itself predicts, but for a scaling or capping behind the head. The final norm is the
    part of the decoder whose output is the head's input. `output_hidden_states=True` is not asked for: on its first use
    transformers leaves hooks in the model.

    Raises:
        BaseModelError: if the model's layers cannot be found.
    """
    head, decoder, layers = base.model.get_output_embeddings(), base.model.base_model, decoder_layers(base.model)
    if not layers:
        raise BaseModelError(
            f"the decoder layers of {type(base.model).__name__} were not found (expected one list of "
            "config.num_hidden_layers modules): leave logit_lens out of the attacks"
        )
    inputs: dict[nn.Module, Tensor] = {}

    def note_input(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        inputs[module] = args[0] if args else named["hidden_states"]

    with ExitStack() as stack:
        for module in (layers[0], head):
            stack.callback(module.register_forward_pre_hook(note_input, with_kwargs=True).remove)
        states = [stack.enter_context(outputs_of(layer)) for layer in layers]
        parts = {part: stack.enter_context(outputs_of(part)) for part in decoder.children() if part is not head}
        base.model(input_ids=torch.tensor([ids], device=base.device), use_cache=False)
    last = inputs[head][0, -1]  # (d,)
    norms = [
        part for part, outputs in parts.items()
        if outputs and outputs[0].shape[-1:] == last.shape and torch.equal(outputs[0][0, -1], last)
    ]  # fmt: skip
    norm = norms[-1].forward if norms else nn.Identity()
    before_last = [inputs[layers[0]], *(outputs[0] for outputs in states[:-1])]
    middle = torch.stack([state[0, -1] for state in before_last])[None]  # (1, layers, d)
    return torch.cat([head.forward(norm(middle))[0], head.forward(last[None])]).float()


def _questions(target: Target, row: Row) -> list[Question]:
    """Return the `Question` of each leak word of a probe."""
    text = render(target, row["prompt"], beginning=beginning_of(row))
    templated = has_template(target.base.tokenizer, target.chat_template)
    before = encode_text(text, target.base.tokenizer, templated=templated)
    questions = []
    for word in row["leak"]:
        ids = encode_text(text + word, target.base.tokenizer, templated=templated)
        at = next((n for n, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        at = min(at, len(ids) - 1)
        questions.append(Question(ids[:at], ids[at]))
    return questions


def _lens(base: Base, probes: Sequence[Sequence[Question]]) -> tuple[Array, Array]:
    """Return the best rank and the highest probability over a probe's leak words, each (probes, layers + 1)."""
    ranks, probabilities = [], []
    for questions in probes:
        of_words = []
        for question in questions:
            logits = layer_logits(base, question.ids)
            rank = (logits > logits[:, question.first, None]).sum(1)
            p = torch.softmax(logits, dim=-1)[:, question.first]
            of_words.append((rank.cpu().numpy(), p.cpu().numpy()))
        ranks.append(np.min([rank for rank, _ in of_words], axis=0))
        probabilities.append(np.max([p for _, p in of_words], axis=0))
    return np.array(ranks, dtype=np.float64), np.array(probabilities, dtype=np.float64)


@torch.no_grad()
def _next_log_p(target: Target, texts: Sequence[str]) -> Tensor:
    """Return log p of the next token after each text, (texts, V), on the CPU."""
    base, rows = target.base, []
    templated = has_template(base.tokenizer, target.chat_template)
    for text in texts:
        ids = torch.tensor([encode_text(text, base.tokenizer, templated=templated)], device=base.device)
        logits = base.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        rows.append(torch.log_softmax(logits[0, -1].float(), dim=-1).cpu())
    return torch.stack(rows)


def _best_ranks(drop: Tensor, token_sets: Sequence[set[int]], special: Sequence[int]) -> Array:
    """Return for each set of tokens the best rank by drop, 0 for the largest; special tokens are left out."""
    values = drop.clone()
    values[[token for token in special if token < len(values)]] = -torch.inf  # a padding token may be beyond the model
    return np.array([min(int((values > values[i]).sum()) for i in ids) for ids in token_sets], dtype=np.float64)
