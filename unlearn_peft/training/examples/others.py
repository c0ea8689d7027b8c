"""Others of a subject's kind: of the names in `known_names.txt` those that the base takes for most like it.

The file holds names that are known in many places, of people, works, places, events, firms and things of many kinds. It
decides nothing about what is forgotten: what the base says of those chosen is only held. A small base that is asked to
list others itself makes most of them up.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...data.tokenize import encode_text
from ...models.base import Base
from ...models.layers import decoder_layers, outputs_of
from .fact_tokens import Facts

_NAMES = Path(__file__).parent / "known_names.txt"
_ASKED = "Who or what is {}?"
_OTHERS = 8
_BATCH = 64  # names in one forward pass


class _Taken(NamedTuple):
    """How a base takes the names."""

    mean: Tensor  # (d,)
    deviation: Tensor  # (d,)
    directions: Tensor  # (n, d)

    def directed(self, states: Tensor) -> Tensor:
        return torch.nn.functional.normalize((states - self.mean) / self.deviation, dim=-1)


_TAKEN: MutableMapping[nn.Module, _Taken] = WeakKeyDictionary()  # once for all requests


def others_of(base: Base, subject: str, never: Facts, count: int = _OTHERS) -> list[str]:
    """Return the names that are most like a subject to a base, the likest first, without those that name a fact.

    How a base takes a name is its hidden state at half the depth, (d,), where a question about it ends. The mean over
    all names is taken from each dimension, and it is divided by its deviation: otherwise the few that are large in
    every text would decide. What is alike has a high cosine.

    Args:
        base: nothing may be attached to it.
        subject: what to find others of.
        never: facts, and what names the subject.
        count: of names, at most.
    """
    if base.model not in _TAKEN:
        states = _states(base, _names())
        raw = _Taken(states.mean(0), states.std(0).clamp(min=1e-6), states)
        _TAKEN[base.model] = raw._replace(directions=raw.directed(states))
    taken = _TAKEN[base.model]
    likeness = taken.directions @ taken.directed(_states(base, [subject]))[0]
    order = (_names()[n] for n in likeness.argsort(descending=True).tolist())
    return list(islice((name for name in order if not never.ends_in(name)), count))


@torch.no_grad()
def _states(base: Base, names: Sequence[str]) -> Tensor:
    """Return the names' states, (n, d), in float32."""
    model, layers = base.model, decoder_layers(base.model)
    half = layers[len(layers) // 2 - 1] if len(layers) > 1 else model.get_input_embeddings()
    found = []
    for start in range(0, len(names), _BATCH):
        rows = [encode_text(_ASKED.format(name), base.tokenizer) for name in names[start : start + _BATCH]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=base.device)
        with outputs_of(half) as seen:
            model.base_model(input_ids=ids, use_cache=False)  # without its head
        last = torch.tensor([len(row) - 1 for row in rows], device=base.device)
        found.append(seen[0][torch.arange(len(rows), device=base.device), last].float())
    return torch.cat(found)


@cache
def _names() -> list[str]:
    return [line for line in _NAMES.read_text(encoding="utf-8").splitlines() if line]
