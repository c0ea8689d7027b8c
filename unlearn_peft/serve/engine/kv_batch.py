"""Forward passes over rows that joined at different times: their tokens -> logits, with each row's own set.

Keys and values lie in a plain `DynamicCache`: per layer two tensors of shape (B, H, T, D), padded on the left. Sliding
windows work too: the mask does them, the cache keeps everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...errors import BaseModelError


class PerRowAdapters(Protocol):
    """The part of `Bank` that is needed here."""

    def rows(self, sets: Sequence[Any]) -> AbstractContextManager[Any]:
        """While this lasts, row i of the model's batch forgets sets[i]."""


class KVBatch:
    """What rows have gone through so far, and the newest token of each, which has not."""

    def __init__(self, cache: DynamicCache, mask: Tensor, newest: Tensor) -> None:
        self.cache = cache
        self.mask = mask  # (B, T): 0 on padding, which is on the left only
        self.newest = newest  # (B, 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the padding that the ones that stay share."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        cut = int((mask.amax(0) == 0).sum())
        layers = [(layer.keys[index, :, cut:], layer.values[index, :, cut:]) for layer in self.cache.layers]
        self._become(layers, mask[:, cut:], self.newest[index])

    def join(self, other: KVBatch) -> None:
        """Put another batch's rows behind these; if that fails, these are as they were."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        layers = [
            (
                torch.cat([_padded(mine.keys, width), _padded(theirs.keys, width)]),
                torch.cat([_padded(mine.values, width), _padded(theirs.values, width)]),
            )
            for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True)
        ]
        masks = [pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self._become(layers, torch.cat(masks), torch.cat([self.newest, other.newest]))

    def _become(self, layers: Sequence[tuple[Tensor, Tensor]], mask: Tensor, newest: Tensor) -> None:
        for layer, (keys, values) in zip(self.cache.layers, layers, strict=True):
            layer.keys, layer.values = keys, values
        self.mask, self.newest = mask, newest


class ModelRunner:
    """Runs a model over batches, always inside `bank.rows`.

    Raises:
        BaseModelError: if the model's rows cannot be joined and give what each gives alone (state-space models, for
            one, keep no keys and values).
    """

    def __init__(self, model: Any, bank: PerRowAdapters) -> None:
        self.model, self._bank = model, bank
        taken = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._positions = "position_ids" in taken
        self._check()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], sets: Sequence[Any]) -> tuple[KVBatch, Tensor]:
        """Run prompts together; returns their batch, its newest tokens still to be set, and logits (B, V)."""
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, prompt in enumerate(prompts):
            ids[n, width - len(prompt) :] = torch.tensor(prompt)
            mask[n, width - len(prompt) :] = 1
        mask, cache = mask.to(device), DynamicCache()
        logits = self._forward(ids.to(device), mask, (mask.cumsum(1) - 1).clamp(min=0), cache, sets)
        return KVBatch(cache, mask, ids[:, -1:].to(device)), logits

    @torch.no_grad()
    def step(self, batch: KVBatch, sets: Sequence[Any]) -> Tensor:
        """Run the newest token of each row; returns logits (B, V)."""
        mask = pad(batch.mask, (0, 1), value=1)
        logits = self._forward(batch.newest, mask, mask.sum(1, keepdim=True) - 1, batch.cache, sets)
        batch.mask = mask
        return logits

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, sets: Sequence[Any]
    ) -> Tensor:
        places = {"position_ids": positions} if self._positions else {}
        with self._bank.rows(sets):
            out = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **places, **self._last_only
            )
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def _check(self) -> None:
        """Join two rows of the base and compare them with each alone."""
        plain, bank, self._bank = _NoBank(), self._bank, _NoBank()
        name = type(self.model).__name__
        what = f"{name} cannot be served by this engine: "
        last = self.model.config.get_text_config().vocab_size - 1
        prompts = [[min(n, last) for n in range(3, 10)], [min(n, last) for n in (11, 4)]]
        try:
            batch, _ = self.prefill(prompts[:1], [plain])
            self.step(batch, [plain])
            other, _ = self.prefill(prompts[1:], [plain])
            layers = batch.cache.layers
            if not layers or not all(type(layer) is DynamicLayer and layer.keys.dim() == 4 for layer in layers):
                kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none of transformers' own"
                raise BaseModelError(f"{what}its cache ({kinds}) is not keys and values alone")
            batch.join(other)
            together = self.step(batch, [plain, plain])
            batch.keep([1])
            together = torch.cat([together, self.step(batch, [plain])])
            whole = [
                prompt + prompt[-1:] * more for prompt, more in ((prompts[0], 2), (prompts[1], 1), (prompts[1], 2))
            ]
            alone = torch.cat([self.prefill([prompt], [plain])[1] for prompt in whole])
        except BaseModelError:
            raise
        except Exception as error:  # whatever a model that is made otherwise does with such a cache
            raise BaseModelError(
                f"{what}a pass over joined rows failed ({type(error).__name__}). Expected a causal language model with "
                "attention alone, such as Llama, Mistral, Qwen2 or SmolLM."
            ) from error
        finally:
            self._bank = bank
        apart = float((together - alone).abs().max() / alone.abs().max())
        if not apart < (1e-3 if self.model.dtype == torch.float32 else 0.1):
            raise BaseModelError(
                f"{what}rows in one batch differ from the same rows alone by {apart:.1e} of the largest logit. "
                "Expected a model that heeds attention_mask and position_ids, such as Llama, Mistral, Qwen2 or SmolLM."
            )


class _NoBank:
    def rows(self, sets: Sequence[Any]) -> AbstractContextManager[Any]:
        return nullcontext()


def _padded(states: Tensor, width: int) -> Tensor:
    return pad(states, (0, 0, width - states.shape[2], 0))
