"""Forward passes over rows that joined at different times: tokens -> logits. Serving gives each row its own adapters.

Keys and values lie in a plain `DynamicCache`: per layer two tensors of shape (B, H, T, D), padded on the left. Sliding
windows work too: the mask implements them, the cache keeps everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import BaseModelError
from ..models.forward import contiguous_head


@dataclass(eq=False)
class KVBatch:
    """The keys and values of rows so far, and the newest token of each, which is still to be run."""

    cache: DynamicCache
    mask: Tensor  # (B, T): 0 on padding, which is on the left only
    newest: Tensor  # (B, 1)

    @property
    def places(self) -> int:
        """Tokens that keys and values are kept of, padding included."""
        return self.mask.numel()

    def select(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the padding that the selected ones share."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        padding = int((mask.amax(0) == 0).sum())
        layers = [(layer.keys[index, :, padding:], layer.values[index, :, padding:]) for layer in self.cache.layers]
        self._set(layers, mask[:, padding:], self.newest[index])

    def extend(self, other: KVBatch) -> None:
        """Append another batch's rows; if that fails, this one is as it was."""
        width = max(self.mask.shape[1], other.mask.shape[1])

        def joined(*states: Tensor) -> Tensor:
            return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in states])

        pairs = zip(self.cache.layers, other.cache.layers, strict=True)
        layers = [(joined(a.keys, b.keys), joined(a.values, b.values)) for a, b in pairs]
        masks = [pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self._set(layers, torch.cat(masks), torch.cat([self.newest, other.newest]))

    def repeated(self, counts: Sequence[int]) -> KVBatch:
        """Return another batch, of row n `counts[n]` times."""
        times = torch.tensor(counts, device=self.mask.device)
        cache = DynamicCache()
        for n, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.repeat_interleave(times, 0), layer.values.repeat_interleave(times, 0), n)
        return KVBatch(cache, *(part.repeat_interleave(times, 0) for part in (self.mask, self.newest)))

    def shift(self, by: Tensor) -> None:
        """Move row n to the right by `by[n]`, over its last places, and hide the first."""
        width = self.mask.shape[1]
        places = torch.arange(width, device=self.mask.device) - by[:, None]  # (B, T): where each comes from
        index = places.clamp(min=0)

        def moved(states: Tensor) -> Tensor:
            return states.gather(2, index[:, None, :, None].expand_as(states))

        layers = [(moved(layer.keys), moved(layer.values)) for layer in self.cache.layers]
        self._set(layers, self.mask.gather(1, index) * (places >= 0), self.newest)

    def _set(self, layers: Sequence[tuple[Tensor, Tensor]], mask: Tensor, newest: Tensor) -> None:
        for layer, (keys, values) in zip(self.cache.layers, layers, strict=True):
            layer.keys, layer.values = keys, values
        self.mask, self.newest = mask, newest


class ModelRunner:
    """Runs a model over batches, inside `rows` of the sets of adapters of a batch's rows; without it, as it is.

    Raises a BaseModelError if joined rows do not give what each gives alone: state-space models keep no such cache.
    `token_bytes` are those of one token's keys and values, in all layers. `splits` says whether a prompt may be read in
    parts, and its beginning kept for another: not where a token's place is encoded by the length of what is read.
    """

    def __init__(self, model: Any, rows: Callable[[Sequence[Any]], AbstractContextManager[Any]] = nullcontext) -> None:
        self.model, self._rows = model, rows
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self.splits = not _rotates_by_length(model.config)
        self._check()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], sets: Sequence[Any] = ()) -> tuple[KVBatch, Tensor]:
        """Run prompts together; returns their batch, its newest tokens still to be set, and logits (B, V)."""
        rows, device = [torch.tensor(prompt) for prompt in prompts], self.model.device
        ids = pad_sequence(rows, batch_first=True, padding_side="left").to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(device)
        cache = DynamicCache()
        with contiguous_head(self.model):  # later each row has one state alone, which is no slice
            logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache, sets)
        return KVBatch(cache, mask, ids[:, -1:]), logits

    @torch.no_grad()
    def append(self, batch: KVBatch, more: Sequence[Sequence[int]], sets: Sequence[Any] = ()) -> Tensor:
        """Run further tokens of each row, at least one; returns logits (B, V) behind its last."""
        if len({len(row) for row in more}) > 1:
            self.read(batch, more, sets)
            return self.step(batch, sets)
        ids = torch.tensor([[*row] for row in more], device=self.model.device)
        logits = self._run(batch, ids, torch.ones_like(ids), sets)
        batch.newest = ids[:, -1:]
        return logits

    @torch.no_grad()
    def read(self, batch: KVBatch, more: Sequence[Sequence[int]], sets: Sequence[Any] = ()) -> None:
        """Run further tokens of each row, at least one, but for its last: that is `newest` then, still to be run."""
        device, width = self.model.device, max(map(len, more)) - 1
        if width:
            ids = torch.tensor([[*row[:-1], *[row[-1]] * (width + 1 - len(row))] for row in more], device=device)
            padding = torch.tensor([width + 1 - len(row) for row in more], device=device)
            self._run(batch, ids, torch.arange(width, device=device) < (width - padding)[:, None], sets)
            if len({len(row) for row in more}) > 1:
                batch.shift(padding)
        batch.newest = torch.tensor([row[-1:] for row in more], device=device)

    @torch.no_grad()
    def step(self, batch: KVBatch, sets: Sequence[Any] = ()) -> Tensor:
        """Run the newest token of each row; returns logits (B, V)."""
        mask = pad(batch.mask, (0, 1), value=1)
        logits = self._forward(batch.newest, mask, mask.sum(1, keepdim=True) - 1, batch.cache, sets)
        batch.mask = mask
        return logits

    def _run(self, batch: KVBatch, ids: Tensor, seen: Tensor, sets: Sequence[Any]) -> Tensor:
        mask = torch.cat([batch.mask, seen.to(batch.mask.dtype)], 1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        with contiguous_head(self.model):
            logits = self._forward(ids, mask, positions, batch.cache, sets)
        batch.mask = mask
        return logits

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, sets: Sequence[Any]
    ) -> Tensor:
        options = {**self._last_only, **({"position_ids": positions} if self._positions else {})}
        with self._rows(sets):
            out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def _check(self) -> None:
        """Join two rows of the base and compare them with each alone."""
        base = [()]  # the empty set of adapters
        refusal = f"{type(self.model).__name__} cannot be served by this engine: "
        last = self.model.config.get_text_config().vocab_size - 1
        prompts = [[min(n, last) for n in range(3, 10)], [min(n, last) for n in (11, 4)]]
        try:
            batch, _ = self.prefill(prompts[:1], base)
            self.step(batch, base)
            other, _ = self.prefill(prompts[1:], base)
            layers = batch.cache.layers
            if not layers or not all(type(layer) is DynamicLayer and layer.keys.dim() == 4 for layer in layers):
                kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none of transformers' own"
                raise BaseModelError(f"{refusal}its cache ({kinds}) is not keys and values alone")
            states = [part for layer in layers for part in (layer.keys, layer.values)]
            self.token_bytes: int = sum(part.nbytes // part.shape[2] for part in states)
            batch.extend(other)
            together = self.step(batch, base)
            batch.select([1])
            together = torch.cat([together, self.step(batch, base)])
            whole = [prompts[n] + prompts[n][-1:] * more for n, more in ((0, 2), (1, 1), (1, 2))]
            alone = torch.cat([self.prefill([prompt], base)[1] for prompt in whole])
        except BaseModelError:
            raise
        except Exception as error:  # whatever a model of another kind does with such a cache
            raise BaseModelError(
                f"{refusal}a pass over joined rows failed ({type(error).__name__}). Expected a causal language model "
                "with attention alone, such as Llama, Mistral, Qwen2 or SmolLM."
            ) from error
        difference = float((together - alone).abs().max() / alone.abs().max())
        if not difference < (1e-3 if self.model.dtype == torch.float32 else 0.1):
            raise BaseModelError(
                f"{refusal}rows in one batch differ from the same rows alone by {difference:.1e} of the largest logit. "
                "Expected a model that uses attention_mask and position_ids, such as Llama, Mistral, Qwen2 or SmolLM."
            )


def _rotates_by_length(config: Any) -> bool:
    """Whether a model's rotary embeddings depend on how many tokens there are, not on each token's place alone."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # by kind of layer
    kinds = {str(one.get("rope_type")) for one in each}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
