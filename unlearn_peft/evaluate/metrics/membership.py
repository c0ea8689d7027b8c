"""Membership inference: was a row in the training set? Six attacks, their AUC, and privacy leakage.

Per-token numbers come in; one number a row goes out, higher for a row that looks less like a member (as a loss is).
Definitions as in open-unlearning (arXiv:2506.12618): all but loss, zlib and reference leave out the end-of-turn marker.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ...data.batch import collate, target_count
from ...data.source import Row
from ...data.tokenize import by_row, tokenize
from ...errors import BaseModelError
from ...models.base import Base
from ...models.forward import picked_logits
from ...models.restore import left_as_found
from ..score import Array, Score, score
from ..token_scores import RowTokens, row_tokens

LEAST_LIKELY = 0.4  # share of tokens that min-k% looks at, as MUSE and open-unlearning have it


def losses(tokens: Sequence[RowTokens]) -> Array:
    """Return each row's mean loss, nats/token (Yeom et al. 2018, arXiv:1709.01604)."""
    return np.array([row.loss for row in tokens])


def zlib_ratios(tokens: Sequence[RowTokens]) -> Array:
    """Return each row's mean loss over its text's zlib-compressed bytes (Carlini et al. 2021, arXiv:2012.07805)."""
    return np.array([row.loss / len(zlib.compress(row.text.encode())) for row in tokens])


def min_k(tokens: Sequence[RowTokens], k: float = LEAST_LIKELY) -> Array:
    """Return min-k% prob: the mean loss of each row's least likely tokens, a share k of them, one at the least.

    Shi et al. 2024, arXiv:2310.16789.
    """
    return np.array([_of_lowest(row.answer(row.log_p), k) for row in tokens])


def min_k_plus_plus(tokens: Sequence[RowTokens], k: float = LEAST_LIKELY) -> Array:
    """Return min-k%++: as `min_k`, of log p standardised by its mean and deviation over the vocabulary at the position.

    Zhang et al. 2025, arXiv:2404.02936. The variance is held at 1e-6 or more, as in open-unlearning.
    """
    standardised = [row.answer((row.log_p - row.mean) / row.std.clamp(min=1e-3)) for row in tokens]
    return np.array([_of_lowest(values, k) for values in standardised])


def over_reference(tokens: Sequence[RowTokens], reference: Sequence[RowTokens]) -> Array:
    """Return each row's mean loss less that under a reference model, as in open-unlearning."""
    return losses(tokens) - losses(reference)


def gradient_norms(base: Base, rows: Sequence[Row], *, p: float = 2, chat_template: bool = True) -> Array:
    """Return the p-norm of the gradient of each row's mean loss, averaged over the base's parameter tensors.

    Wang et al. 2024 (arXiv:2402.17012), aggregated as in open-unlearning. The gradients take as much memory as the
    parameters, whose `requires_grad` is afterwards as before.

    Raises:
        BaseModelError: if no parameter can have a gradient (a quantised base).
    """
    parameters = [parameter for parameter in base.model.parameters() if parameter.is_floating_point()]
    if not parameters:
        raise BaseModelError("no parameter of this base can have a gradient: load it unquantised for gradient norms")
    head = base.model.get_output_embeddings()
    norms = []
    with left_as_found(base.model):
        for parameter in parameters:
            parameter.requires_grad_(True)
        examples = tokenize(
            rows,
            base.tokenizer,
            max_length=base.window(512),
            what="gradient norm",
            chat_template=chat_template,
            closing=False,
        )
        for windows in by_row(examples):
            gradients: list[Tensor | None] = [None] * len(parameters)
            count = sum(map(target_count, windows))
            for window in windows:
                batch = collate([window], base.pad_id).to(base.device)
                labels = batch.ids[:, 1:][batch.targets[:, 1:]]
                with torch.enable_grad():
                    loss = torch.nn.functional.cross_entropy(picked_logits(base.model, head, batch).float(), labels)
                    of_window = torch.autograd.grad(loss * (len(labels) / count), parameters, allow_unused=True)
                for n, gradient in enumerate(of_window):
                    if gradient is not None:
                        gradients[n] = gradient if (so_far := gradients[n]) is None else so_far + gradient
            norms.append(float(torch.stack([g.float().norm(p) for g in gradients if g is not None]).mean()))
    return np.array(norms)


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Return how often a member scores below a non-member, ties by half: 1 is certain membership, 0.5 chance."""
    values, ranked = np.asarray(members, dtype=np.float64), np.sort(np.asarray(others, dtype=np.float64))
    below, up_to = (np.searchsorted(ranked, values, side=side) for side in ("left", "right"))  # others, for each member
    return float(1 - (below + up_to).mean() / (2 * len(ranked)))


def privacy_leakage(unlearned: float, retrained: float = 0.5) -> float:
    """Return MUSE's PrivLeak in percent (arXiv:2407.06460) from AUCs of min-k% on forget rows against held-out rows.

    Zero is as if never learned; far below zero the rows are still known, far above zero the model visibly avoids them.
    MUSE takes the non-members for the positives, so that its AUCs are one minus ours; that is done here. `retrained`
    is the AUC of a model trained without the rows; 0.5, as in open-unlearning, where there is none.
    """
    return 100 * ((1 - unlearned) - (1 - retrained)) / (1 - retrained)


def membership(
    base: Base,
    members: Sequence[Row],
    others: Sequence[Row],
    *,
    reference: Base | None = None,
    retrained_auc: float = 0.5,
    gradients: bool = True,
    k: float = LEAST_LIKELY,
    chat_template: bool = True,
    batch_size: int = 8,
) -> list[Score]:
    """Run the attacks on a live base, with whatever is attached, and add privacy leakage.

    Lower is better only down to chance: an AUC far below 0.5 (a leakage far above 0) gives the rows away as well.

    `members` are forget rows, `others` rows of the same kind that were never trained on. `reference` is another model
    for the reference attack, one that never saw the forget rows; None: no such attack. `gradients`: run the
    gradient-norm attack, a backward pass a row. For `retrained_auc` see `privacy_leakage`, for `k` see `min_k`.
    """
    options: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    sides = [row_tokens(base, rows, what=what, **options) for rows, what in ((members, "members"), (others, "others"))]
    numbers = {
        "loss": [losses(side) for side in sides],
        "zlib": [zlib_ratios(side) for side in sides],
        "min_k": [min_k(side, k) for side in sides],
        "min_k_plus_plus": [min_k_plus_plus(side, k) for side in sides],
    }
    if gradients:
        numbers["gradient_norm"] = [
            gradient_norms(base, rows, chat_template=chat_template) for rows in (members, others)
        ]
    if reference is not None:
        numbers["reference"] = [
            over_reference(side, row_tokens(reference, rows, what="reference", **options))
            for side, rows in zip(sides, (members, others), strict=True)
        ]
    scores = [score(f"membership_{name}", "AUC", False, *both, statistic=auc) for name, both in numbers.items()]

    def leakage(*both: Array) -> float:
        return privacy_leakage(auc(*both), retrained_auc)

    return [*scores, score("privacy_leakage", "percent", False, *numbers["min_k"], statistic=leakage)]


def _of_lowest(values: Tensor, k: float) -> float:
    count = max(1, int(len(values) * k))
    return -float(values.double().sort().values[:count].mean())
