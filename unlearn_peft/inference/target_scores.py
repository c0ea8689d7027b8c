"""What the base expects of each target of rows: passes without gradients, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch

from ..data.batch import labels_of, target_count
from ..data.prompt import Span
from ..data.tokenize import Example, windows
from ..models.base import Base
from ..models.forward import BatchBuilder, picked_logits
from ..models.layers import vocabulary
from ..models.losses import cross_entropy

CONTEXT = 4  # tokens that are "the few in front of" another
_PASS_TOKENS, _MAX_LOGITS = 2048, 2**26

Values = dict[Span, float]  # by the characters of the rendered row that a token covers: nats


def log_probabilities(base: Base, examples: Sequence[Example], max_length: int) -> list[Values]:
    """Return the log-probability of each whole row's targets, nats, long ones in windows as in training."""
    parts = [part for example in examples for part in windows(example, max_length)]
    result: dict[int, Values] = {example.row: {} for example in examples}
    for part, values in zip(parts, _flat_log_probabilities(base, parts), strict=True):
        spans = (span for span, target in zip(part.characters, part.is_target, strict=True) if target)
        result[part.row].update(zip(spans, values, strict=True))
    return [result[example.row] for example in examples]


def after_few_tokens(base: Base, examples: Sequence[Example], needed: Sequence[Set[Span]]) -> list[Values]:
    """Return the log-probability of the needed targets after no more than the few tokens in front of them."""
    places = [
        (n, t)
        for n, e in enumerate(examples)
        for t, target in enumerate(e.is_target)
        if target and e.characters[t] in needed[n]
    ]
    short = []
    for n, t in places:
        ids = examples[n].ids[max(0, t - CONTEXT) : t + 1]
        short.append(Example(ids, [False] * (len(ids) - 1) + [True]))
    result: list[Values] = [{} for _ in examples]
    for (n, t), (value,) in zip(places, _flat_log_probabilities(base, short), strict=True):
        result[n][examples[n].characters[t]] = value
    return result


def _flat_log_probabilities(base: Base, examples: Sequence[Example]) -> list[list[float]]:
    """Return the log-probability of each target."""
    result: list[list[float]] = [[] for _ in examples]
    for numbers, logits in passes(base, examples):
        labels = torch.tensor(labels_of([examples[n] for n in numbers]), device=logits.device)
        values = iter((-cross_entropy(logits, labels)).tolist())
        for n in numbers:
            result[n] = [next(values) for _ in range(target_count(examples[n]))]
    return result


@torch.no_grad()
def passes(base: Base, examples: Sequence[Example]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield numbers of examples of like length and the logits of all their targets, (N, V), in bounded passes."""
    head = base.model.get_output_embeddings()
    builder = BatchBuilder(base.model, head, base.pad_id, packs=False)
    max_targets = max(_MAX_LOGITS // vocabulary(base.model), 1)
    order = sorted(range(len(examples)), key=lambda n: len(examples[n].ids))
    while order:
        batch = [order.pop()]
        width = len(examples[batch[0]].ids)
        targets = target_count(examples[batch[0]])
        while order and (len(batch) + 1) * width <= _PASS_TOKENS:
            targets += target_count(examples[order[-1]])
            if targets > max_targets:
                break
            batch.append(order.pop())
        yield batch, picked_logits(base.model, head, builder.padded([examples[n] for n in batch])).float()
