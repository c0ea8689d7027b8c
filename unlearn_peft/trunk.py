"""The frozen trunk below the first adapted layer, computed once a row.

An adapter on the upper layers never changes what the layers below it give. Their output is kept for each row, and
while a batch runs, those layers are stood in for: all pass on what they get, the last gives the kept states. The
first batch is run both ways and compared; a model for which that does not hold is run the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, collate
from .data import Example
from .layers import changed_layers, decoder_layers

MAX_BYTES = 1_000_000_000  # beyond this, states are not kept and every step runs the whole model


class Trunk:
    """The layers of a PEFT model that no adapter touches, and their output for each row seen."""

    def __init__(self, layers: Sequence[nn.Module], pad_id: int, device: torch.device) -> None:
        self.layers, self.pad_id, self.device = list(layers), pad_id, device
        self._states: dict[int, tuple[Example, Tensor]] = {}  # by id, with the row itself: ids of dead rows come again
        self._bytes = 0
        self._checked = False

    @classmethod
    def of(cls, model: Any, pad_id: int) -> Trunk | None:
        """Return the trunk of a PEFT model, or None where the first layer (or what is before it) is adapted."""
        layers = decoder_layers(model)
        below = next(iter(changed_layers(model, layers)), len(layers))
        return cls(layers[:below], pad_id, next(model.parameters()).device) if below else None

    def run(
        self, forward: Callable[[], Tensor], examples: Sequence[Example], batch: Batch, plain: Callable[[Batch], Any]
    ) -> Tensor | None:
        """Run `forward` with the kept states of `examples`, or return None where the plain way must be gone.

        Args:
            forward: runs the model on `batch`.
            examples: the rows of the batch, in its order.
            batch: the same, padded or packed.
            plain: runs the model on any batch; what it returns is not looked at.
        """
        fresh = [example for example in examples if id(example) not in self._states]
        if fresh and not self._keep(fresh, plain):
            return None
        states = self._laid_out(examples, batch)
        if not self._checked:
            with torch.no_grad():
                expected = forward()
                with self._standing_in(states):
                    found = forward()
            self._checked = alike(found, expected)
            if not self._checked:
                return None
        with self._standing_in(states):
            return forward()

    def _laid_out(self, examples: Sequence[Example], batch: Batch) -> Tensor:
        kept = [self._states[id(example)][1] for example in examples]
        if batch.positions is not None:
            return torch.cat([kept[0][: batch.shared], *(states[batch.shared :] for states in kept)])[None]
        return nn.utils.rnn.pad_sequence(kept, batch_first=True)

    def _keep(self, examples: Sequence[Example], plain: Callable[[Batch], Any]) -> bool:
        batch = collate(examples, self.pad_id).to(self.device)
        seen: list[Any] = []
        handle = self.layers[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            with torch.no_grad():
                plain(batch)
        finally:
            handle.remove()
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].shape[:2] != batch.ids.shape:
            return False
        for states, example in zip(seen[0], examples, strict=True):
            self._states[id(example)] = (example, states[: len(example.ids)].clone())
            self._bytes += states[: len(example.ids)].nbytes
        return self._bytes <= MAX_BYTES

    @contextmanager
    def _standing_in(self, states: Tensor) -> Iterator[None]:
        def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

        def give(*_: Any, **__: Any) -> Tensor:
            return states

        try:
            for layer in self.layers[:-1]:
                layer.forward = pass_on
            self.layers[-1].forward = give
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether two ways of computing the same logits agree to rounding."""
    scale = expected.abs().max().item() or 1.0
    slack = 0.05 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((found - expected).abs().max() <= slack * scale)
