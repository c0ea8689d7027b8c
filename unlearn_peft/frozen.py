"""What the frozen base gives for each row, computed once in one pass without adapters, and kept in a cache.

Rows come in; named tensors go out: the final hidden states at the targets, the input of the first adapted layer, the
output of a layer that an objective watches, and for adapters on the head alone what the bare head gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .cache import Cache
from .data.tokenize import Example
from .models.forward import Halves, Rows, alike, picked_logits, predicting
from .models.layers import decoder_layers, outputs_of
from .pieces import target_count
from .training.step.head import knows_delta
from .trunk import rows_apart

FINAL, HEAD = "final", "head"  # (n, d) and (n, V), both at the targets
_RUN_TOKENS = 4096  # of one forward pass


class Frozen:
    """The base of a PEFT model, as far as training needs it.

    Args:
        model: the PEFT model.
        halves: its base in two parts.
        rows: lays rows out for it.
        cache: where tensors are kept.
        below: the layer under the first adapted one; None: the first layer is adapted, or none.
        watched: layers whose output an objective sees.
        keep_head: keep the bare head's outputs too, while they fit into memory.
        off: keep nothing: the model only runs as a whole.
    """

    def __init__(
        self,
        model: Any,
        halves: Halves,
        rows: Rows,
        cache: Cache,
        below: nn.Module | None,
        watched: Sequence[nn.Module],
        *,
        keep_head: bool,
        off: bool,
    ) -> None:
        self.model, self.halves, self.rows, self.cache = model, halves, rows, cache
        self.layers = decoder_layers(model)
        self.below, self.watched = below, list(dict.fromkeys(watched))
        self.keep_head = keep_head and knows_delta(halves.head)
        # whether the model gives the same in two halves; None: found out by comparing once
        self.splits: bool | None = False if off or halves.backbone is halves.model else None
        # (T, d), whole rows; by the layer's number, for another layer's input is no use
        self.input = None if below is None else f"input of {self.layers.index(below) + 1}"
        self._needs = {FINAL, *map(self.name, self.watched)} | ({self.input} if self.input else set())

    def name(self, layer: nn.Module) -> str:
        """Return under which name a watched layer's output is kept."""
        return f"output of {self.layers.index(layer)}"

    def prepare(self, examples: Sequence[Example], *, quiet: bool = True) -> None:
        """Compute what is not there yet, with a progress bar.

        Rows are grouped by what they are, not by what is there: a row's last bits depend on its neighbours in a pass.
        """
        from tqdm import tqdm

        rows = sorted({id(e): e for e in examples}.values(), key=lambda e: len(e.ids))
        with tqdm(total=len(rows), unit="row", desc="once through the base", disable=quiet) as bar:
            while rows and self.splits is not False:
                some = rows[-max(1, _RUN_TOKENS // len(rows[-1].ids)) :]
                del rows[-len(some) :]
                if any(self._found(e) is None for e in some):
                    self._compute(some)
                bar.update(len(some))
        self.cache.flush()

    def of(self, examples: Sequence[Example]) -> list[Mapping[str, Tensor]] | None:
        """Return what is kept of each row, computing what is new; None where the model only runs as a whole."""
        if self.splits is False:
            return None
        kept = {id(e): self._found(e) for e in examples}
        fresh = list({id(e): e for e in examples if kept[id(e)] is None}.values())
        if fresh:
            made = self._compute(fresh)
            if made is None:
                return None
            kept |= {id(e): tensors for e, tensors in zip(fresh, made, strict=True)}
        return [kept[id(e)] or {} for e in examples]

    @torch.no_grad()
    def _compute(self, examples: Sequence[Example]) -> list[dict[str, Tensor]] | None:
        with self.model.disable_adapter():
            if self.splits is None:
                some = self.rows.batch(examples[:2])
                expected = picked_logits(self.model, self.halves.head, some)
                self.splits = alike(self.halves.logits(self.halves.states(some)[predicting(some)]), expected)
            if not self.splits:
                return None
            batch = self.rows.batch(examples)
            with ExitStack() as stack:
                seen = {layer: stack.enter_context(outputs_of(layer)) for layer in (*self.watched, self.below)}
                states = self.halves.states(batch)
        counts, picked = [target_count(e) for e in examples], predicting(batch)
        kept: dict[str, Sequence[Tensor]] = {FINAL: torch.split(states[picked], counts)}
        kept |= {self.name(layer): torch.split(seen[layer][-1][picked], counts) for layer in self.watched}
        if self.input is not None:
            kept[self.input] = rows_apart(seen[self.below][-1], batch, [len(e.ids) for e in examples])
        result = []
        for n, example in enumerate(examples):
            tensors = {name: values[n].clone() for name, values in kept.items()}
            if self.keep_head and counts[n]:
                self._add_head_outputs(tensors)
            self.cache.put(example, tensors)
            result.append(tensors)
        return result

    def _add_head_outputs(self, tensors: dict[str, Tensor]) -> None:
        """Keep the bare head's outputs too, while they fit: a step is then two thin products."""
        bare = getattr(self.halves.head, "base_layer", self.halves.head)
        size = len(tensors[FINAL]) * bare.weight.shape[0] * tensors[FINAL].element_size()
        if self.cache.has_room(size):
            tensors[HEAD] = bare(tensors[FINAL])

    def _found(self, example: Example) -> Mapping[str, Tensor] | None:
        kept = self.cache.get(example)
        return kept if kept is not None and self._needs <= kept.keys() else None
