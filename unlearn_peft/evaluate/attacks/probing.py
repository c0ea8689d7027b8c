"""Attacks that read instead of asking: middle layers (logit lens), and the adapter's own effect (adapter diff)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.source import Row
from ...errors import BaseModelError
from ...models.base import Base
from ...models.layers import decoder_layers
from ..score import Array
from ..token_scores import adapters_off
from .harness import Attacked, Target, adapters_on, attacked, beginning_of, render
from .templates import GENERIC
from .weights import random_like


@dataclass(frozen=True)
class Question:
    """Where one leak word would be said: the token ids in front, and the id of the word's first token there."""

    ids: list[int]
    first: int


def logit_lens(target: Target, *, top: int = 10) -> Attacked:
    """Read middle layers through the base's final norm and output head (nostalgebraist 2020, "the logit lens").

    The position is the one where the answer names the fact: behind the prompt and the probe's `completion` up to the
    leak word, or behind the prompt alone where it has none. A probe counts as recovered if, after any layer, the
    first token of one of its leak words is among the `top` most likely. Reading needs the weights. The head is the
    base's own, without what an adapter adds to it: who can read layers has that one too, so an adapter on the head
    alone hides nothing from this attack.

    `details`: shares by layer (0: embeddings; the last: what goes into the head), medians over the probes of the best
    rank over layers (0 is first) and of the highest probability over layers. With many layers some token is often
    among the first by chance: compare with the base, which is read likewise.
    """
    asked = [_questions(target, row) for row in target.probes]
    with adapters_off(target.base):
        base = _lens(target.base, asked)
    with adapters_on(target):
        found = _lens(target.base, asked)
    details: dict[str, Any] = {
        f"layer {n}": {"recovered": float((f < top).mean()), "base": float((b < top).mean())}
        for n, (f, b) in enumerate(zip(found[0].T, base[0].T, strict=True))
    }
    for n, what in enumerate(("median best rank", "median best probability")):
        best = [values[n].min(1) if n == 0 else values[n].max(1) for values in (found, base)]
        details[what] = {"recovered": float(np.median(best[0])), "base": float(np.median(best[1]))}
    budget = f"weights and all {found[0].shape[1]} layer states at one position a probe; first token in the top {top}"
    hits = [(ranks.min(1) < top).astype(float) for ranks, _ in (found, base)]
    return attacked(target, "logit_lens", budget, hits[0], hits[1], details)


def adapter_diff(target: Target, *, top: int = 50) -> Attacked:
    """Read the forget topic off the adapter's effect: which tokens does it make less likely, whatever is asked?

    The attacker holds adapter and base, and asks generic questions that name nothing. Tokens are ordered by the mean
    over these of log p(base) - log p(adapter) of the next token. A probe counts as recovered if the first token of
    one of its leak words is among the `top`. Beside it stands chance: a random LoRA of the same layers, rank and size
    in the adapter's place.

    To be honest about it: a low share here does not show that the adapter gives nothing away. This is one simple
    reading; who guesses the topic and asks about it sees the difference at once, since suppressing an answer is what
    the adapter is for. A forget adapter has to be kept as one keeps the request to forget.

    `quoted` holds the tokens themselves; `details` only the best rank of each probe's words (0 is first, medians).
    """
    prompts = [render(target, text) for text in GENERIC]
    with adapters_off(target.base):
        plain = _next_log_p(target, prompts)  # (P, V)
    with adapters_on(target):
        drop = (plain - _next_log_p(target, prompts)).mean(0)  # (V,)
    with adapters_on(target, bundles=random_like(target.bundles, target.seed)):
        by_chance = (plain - _next_log_p(target, prompts)).mean(0)
    tokenizer = target.base.tokenizer
    wanted = [
        {ids[0] for word in row["leak"] for text in (word, f" {word}") if (ids := _ids(tokenizer, text))}
        for row in target.probes
    ]
    ranks = [_best_rank(values, wanted, tokenizer.all_special_ids) for values in (drop, by_chance)]
    order = [i for i in drop.argsort(descending=True).tolist() if i not in tokenizer.all_special_ids][:top]
    details = {"median best rank": {"recovered": float(np.median(ranks[0])), "base": float(np.median(ranks[1]))}}
    budget = (
        f"the adapter's files and the base, next tokens after {len(prompts)} generic prompts, first token in the top "
        f"{top} drops; the comparison is a random LoRA of the same size"
    )
    hits = [(rank < top).astype(float) for rank in ranks]
    return attacked(
        target, "adapter_diff", budget, hits[0], hits[1], details, quoted=tuple(tokenizer.decode([i]) for i in order)
    )  # fmt: skip


@torch.no_grad()
def layer_logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Return what each layer's state at the last position reads as, (layers + 1, V), through the base's bare head.

    The last row is, up to a scaling or capping behind the head, what the model itself predicts. The final norm is
    found by running: the part of the decoder whose output is what the head gets.

    Raises:
        BaseModelError: if the model's layers cannot be found.
    """
    head, decoder = base.model.get_output_embeddings(), base.model.base_model
    states: list[Tensor] = []
    outputs: dict[str, Tensor] = {}
    with _watched(base, states, outputs):
        base.model(input_ids=torch.tensor([ids], device=base.device), use_cache=False)
    last = outputs.pop("")[0, -1]  # (d,), in front of the head
    norms = [name for name, out in outputs.items() if out.shape[-1:] == last.shape and torch.equal(out[0, -1], last)]
    norm = dict(decoder.named_children())[norms[-1]].forward if norms else nn.Identity()
    middle = torch.stack([state[0, -1] for state in states[:-1]])[None]  # (1, layers, d)
    return torch.cat([head.forward(norm(middle))[0], head.forward(last[None])]).float()


@contextmanager
def _watched(base: Base, states: list[Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Note down each layer's state, what the decoder's other parts give out, and as "" what the head gets.

    `output_hidden_states=True` is not asked for: on its first use transformers leaves hooks in the model.
    """
    head, layers = base.model.get_output_embeddings(), decoder_layers(base.model)
    if not layers:
        raise BaseModelError(
            f"the decoder layers of {type(base.model).__name__} were not found (expected one list of "
            "config.num_hidden_layers modules): leave logit_lens out of the attacks"
        )

    def enter(_: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        states.append(inputs[0] if inputs else named["hidden_states"])

    def leave(_: Any, inputs: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    def note(name: str) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    def get(_: Any, inputs: tuple[Tensor, ...]) -> None:
        outputs[""] = inputs[0]

    hooks = [layers[0].register_forward_pre_hook(enter, with_kwargs=True), head.register_forward_pre_hook(get)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    hooks += [
        part.register_forward_hook(note(name))
        for name, part in base.model.base_model.named_children()
        if part is not head
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _questions(target: Target, row: Row) -> list[Question]:
    """Return for each leak word where it would be said, and its first token there."""
    text = render(target, row["prompt"], beginning=beginning_of(row))
    tokenizer, bos = target.base.tokenizer, target.base.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    before = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    found = []
    for word in row["leak"]:
        whole = list(tokenizer(text + word, add_special_tokens=special)["input_ids"])
        at = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        at = min(at, len(whole) - 1)
        found.append(Question(whole[:at], whole[at]))
    return found


def _lens(base: Base, asked: Sequence[Sequence[Question]]) -> tuple[Array, Array]:
    """Return the best rank and the highest probability over a probe's leak words, each (probes, layers + 1)."""
    ranks, probabilities = [], []
    for questions in asked:
        of_words = []
        for question in questions:
            logits = layer_logits(base, question.ids)
            wanted = logits[:, question.first]
            p = torch.softmax(logits, dim=-1)[:, question.first]
            of_words.append(((logits > wanted[:, None]).sum(1).cpu().numpy(), p.cpu().numpy()))
        ranks.append(np.min([rank for rank, _ in of_words], axis=0))
        probabilities.append(np.max([p for _, p in of_words], axis=0))
    return np.array(ranks, dtype=np.float64), np.array(probabilities, dtype=np.float64)


@torch.no_grad()
def _next_log_p(target: Target, texts: Sequence[str]) -> Tensor:
    """Return log p of the next token after each text, (texts, V), on the CPU."""
    base, rows = target.base, []
    bos = base.tokenizer.bos_token
    for text in texts:
        ids = base.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)), return_tensors="pt")
        logits = base.model(input_ids=ids["input_ids"].to(base.device), use_cache=False, logits_to_keep=1).logits
        rows.append(torch.log_softmax(logits[0, -1].float(), dim=-1).cpu())
    return torch.stack(rows)


def _best_rank(drop: Tensor, wanted: Sequence[set[int]], special: Sequence[int]) -> Array:
    """Return for each set of tokens the best rank by drop, 0 first, special tokens left out."""
    values = drop.clone()
    values[list(special)] = -torch.inf
    return np.array([min(int((values > values[i]).sum()) for i in ids) for ids in wanted], dtype=np.float64)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
