"""What a step computes: which rows, which positions, and what is computed only once.

Tokenised rows come in; packed target tokens with their logits (`Tokens`) go out to an objective. Only target
positions reach the output head, and the reference of each row is computed once and kept as the hidden states in
front of the head (d numbers a token instead of V), with those of a decoder layer where the objective asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch import Batch, collate, pack
from .data import Example
from .layers import outputs_of, watched_layer
from .objectives import Tokens
from .trunk import Trunk, alike


class _Reference(NamedTuple):
    example: Example  # kept, because the ids of dead rows come again
    final: Tensor  # (n, d), hidden states in front of the head
    hidden: Tensor | None  # (n, d), those of the watched layer


class Engine:
    """Runs a PEFT model over rows and hands out target tokens, with the reference beside them where asked.

    Args:
        model: the PEFT model, perhaps wrapped for distributed training.
        unwrapped: the PEFT model itself; with its adapter switched off it is the reference.
        pad_id: any token id; padding is never looked at.
        hidden_layer: the decoder layer whose output tokens bring along; None: see `watched_layer`; False: they do not.

    Raises:
        RecipeError: if that layer does not exist, or the adapter does not reach it.
    """

    def __init__(self, model: nn.Module, unwrapped: Any, pad_id: int, hidden_layer: int | bool | None = False) -> None:
        self.model, self.unwrapped, self.pad_id = model, unwrapped, pad_id
        self.device = next(unwrapped.parameters()).device
        self.head = unwrapped.get_base_model().get_output_embeddings()
        self._reference: dict[int, _Reference] = {}  # by id
        self._head_is_last: bool | None = None  # found out by comparing once
        self._rows = Rows(unwrapped, self.head, pad_id)
        self.trunk = Trunk.of(unwrapped, pad_id)
        self._watched = None if hidden_layer is False else watched_layer(unwrapped, hidden_layer)

    def tokens(self, forget: Sequence[Example], retain: Sequence[Example]) -> tuple[Tokens, Tokens]:
        """Return the target tokens of both sides from one forward pass, and the reference of both.

        Forget rows that come with a refusal bring it along, so that however a batch is split, pairs stay together.
        """
        paired = [n for n, example in enumerate(forget) if example.refusal is not None]
        refusals = [example.refusal for example in forget if example.refusal is not None]
        examples = [*forget, *refusals, *retain]
        batch = self._rows.batch(examples)
        with outputs_of(self._watched) as seen:
            logits = self._logits(self.model, examples, batch)
        hidden = seen[-1][_predicting(batch)] if seen else None  # of the last run: the first batch is run several times
        labels, rows = _labels(batch)
        reference, reference_hidden = self._reference_of(examples)
        specific = torch.tensor(
            [s for e in forget for s, t in zip(e.specific or e.is_target, e.is_target, strict=True) if t],
            dtype=torch.bool,
        )

        def side(chosen: Tensor, rows: Tensor, **more: Any) -> Tokens:
            states = {"hidden": hidden, "reference_hidden": reference_hidden}
            more |= {name: state[chosen] for name, state in states.items() if state is not None}
            return Tokens(logits[chosen], labels[chosen], rows, reference[chosen], **more)

        f, r = rows < len(forget), rows >= len(forget) + len(refusals)
        refused = None
        if refusals:
            x = ~(f | r)
            refused = side(x, torch.tensor(paired, device=self.device)[rows[x] - len(forget)])
        return (
            side(f, rows[f], specific=specific.to(self.device), refusal=refused),
            side(r, rows[r] - len(forget) - len(refusals)),
        )

    def _logits(
        self, model: nn.Module, examples: Sequence[Example], batch: Batch, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Return the target logits of a batch, over the kept trunk where there is one."""

        def forward() -> Tensor:  # without gradients never through a wrapper: processes may differ in their batches
            return picked_logits(model if torch.is_grad_enabled() else self.unwrapped, self.head, batch, watch)

        if self.trunk is not None:
            found = self.trunk.run(
                forward,
                examples,
                batch,
                lambda other: picked_logits(self.unwrapped, self.head, other),
            )
            if found is not None:
                return found
            self.trunk = None
        return forward()

    def _reference_of(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
        """Return the base's logits at the examples' targets, (N, V), and what its watched layer gives, (N, d)."""
        with torch.no_grad(), self.unwrapped.disable_adapter():
            fresh = [example for example in examples if id(example) not in self._reference]
            if fresh and (self._head_is_last is not False or self._watched is not None):
                self._remember(fresh)
            kept = [self._reference[id(example)] for example in examples if id(example) in self._reference]
            states = [reference.hidden for reference in kept if reference.hidden is not None]
            hidden = torch.cat(states) if states else None
            if not self._head_is_last:
                return picked_logits(self.unwrapped, self.head, self._rows.batch(examples)), hidden
            return self.head(torch.cat([reference.final for reference in kept])), hidden

    def _remember(self, examples: Sequence[Example]) -> None:
        # padded: a packed row's last bits depend on its neighbours, and a resumed run meets the rows in another order
        batch = collate(examples, self.pad_id).to(self.device)
        seen: list[Tensor] = []
        with outputs_of(self._watched) as outputs:
            logits = self._logits(self.unwrapped, examples, batch, watch=seen.append)
        final = seen[-1]
        if self._head_is_last is None:  # some models scale or cap what their head gives: its input is of no use then
            self._head_is_last = torch.allclose(self.head(final), logits, rtol=1e-4, atol=1e-4)
        counts = [sum(example.is_target) for example in examples]
        hidden = torch.split(outputs[-1][_predicting(batch)], counts) if outputs else [None] * len(examples)
        for kept in zip(examples, torch.split(final, counts), hidden, strict=True):
            self._reference[id(kept[0])] = _Reference(*kept)


class Rows:
    """Lays rows out for one model: packed, if that is worth it and the model is seen to give the same, else padded.

    Args:
        model: whatever is attached to it stays as it is.
        head: its output head.
        pad_id: any token id; padding is never looked at.
    """

    def __init__(self, model: Any, head: nn.Module, pad_id: int) -> None:
        self.model, self.head, self.pad_id = model, head, pad_id
        self.device = next(model.parameters()).device
        self._packs: bool | None = None  # found out by comparing once

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return the rows in one batch, on the model's device."""
        packed = None
        if self._packs is not False:
            packed = pack(examples, getattr(self.model.config, "sliding_window", None))
        if packed is not None:
            packed = packed.to(self.device, self.model.dtype)
            if self._packs is None:
                self._packs = self._takes(packed, collate(examples, self.pad_id).to(self.device))
            if self._packs:
                return packed
        return collate(examples, self.pad_id).to(self.device)

    @torch.no_grad()
    def _takes(self, packed: Batch, padded: Batch) -> bool:
        """Return whether the model gives the same for packed rows as for padded ones."""
        expected = picked_logits(self.model, self.head, padded)
        try:
            return alike(picked_logits(self.model, self.head, packed), expected)
        except (RuntimeError, TypeError, ValueError, IndexError):  # a model that takes no such mask
            return False


def picked_logits(
    model: nn.Module, head: nn.Module, batch: Batch, watch: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Return the logits that predict the batch's targets, (N, V), in row order.

    The positions are picked in front of the output head, by a hook, so that the head's cost and memory grow with
    the targets and not with prompt and padding, and so that whatever a model does behind its head still happens.
    """
    picked = _predicting(batch)

    def pick(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0][picked]
        if watch is not None:
            watch(hidden)
        return (hidden[None], *inputs[1:])

    where = {} if batch.positions is None else {"position_ids": batch.positions}
    with _hooked(head, pick):
        return model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False, **where).logits[0]  # type: ignore[no-any-return]


def training_mode(model: Any, gradient_checkpointing: bool) -> None:
    """Switch on the adapters' dropout and, if asked, checkpointing; the base's own dropout stays off."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.training = True
    if gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # this module's own flag: what lies inside stays in evaluation mode


def row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of `values` (N,) over the tokens of each of `count` rows, (count,)."""
    sums = torch.zeros(count, device=values.device, dtype=values.dtype).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)


def _predicting(batch: Batch) -> Tensor:
    """Return the positions that predict a target, as a mask like `batch.targets`."""
    picked = torch.zeros_like(batch.targets)
    picked[:, :-1] = batch.targets[:, 1:]
    return picked


def _labels(batch: Batch) -> tuple[Tensor, Tensor]:
    is_label = batch.targets[:, 1:]
    return batch.ids[:, 1:][is_label], batch.rows[:, 1:][is_label]


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
