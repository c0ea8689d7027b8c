"""What a step computes: which rows, which positions, what is computed only once, and how little is held at a time.

Tokenised rows come in; target tokens with their logits (`Tokens`) go out to an objective, in pieces of whole rows, so
that logits (n, V) are never held for a whole batch. What the frozen base gives for a row is computed once and kept in
a `TensorCache`: what goes into the first adapted layer (see training/step/reference.py), the final hidden states at the
targets (the reference: d numbers a token instead of V), and for an adapter on the head alone, which changes neither,
what the bare head makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.batch import Batch, side_by_side
from ...data.tokenize import Example
from ...models.forward import BackboneAndHead, BatchBuilder, alike, picked_logits, predicting
from ...models.layers import decoder_layers, outputs_of
from ..objectives import Tokens
from .head import with_delta
from .layers import changed_layers, rows_use, watched_layer
from .microbatches import RowRanges, StepRows, labels_of, specific_of, split_microbatches, target_count
from .reference import FINAL, HEAD, ReferenceCache, TensorCache, Trunk, pack_states

_PIECE_BYTES = {"head": 4_000_000, "layers": 8_000_000}  # of logits at a time, on a CPU: what caches like
_PIECE_BYTES_ELSEWHERE = 512_000_000
_RUN_TOKENS = 4096  # of one forward pass over several adapters' rows
_IN_MEMORY = 1_000_000_000  # bytes, where no cache is given


class Microbatch(NamedTuple):
    """A few whole rows of one work; `work` is its number."""

    work: int
    forget: Tokens
    retain: Tokens


class _States(NamedTuple):
    """What the adapted part gives for a work's rows, at their targets, and what the frozen base gives for them."""

    final: Tensor  # (N, d), in front of the head; where the model only runs as a whole: its logits, (N, V)
    hidden: Tensor | None  # (N, d), of the watched layer
    kept: Sequence[Mapping[str, Tensor]] | None  # one a row; None where the model only runs as a whole: then these
    reference: Tensor | None = None  # (N, V)
    reference_hidden: Tensor | None = None  # (N, d)


class StepRunner:
    """Runs a PEFT model over rows and hands out target tokens, with the reference beside them.

    Args:
        model: the PEFT model; with its adapters switched off it is the reference.
        pad_id: any token id; padding is never looked at.
        hidden_layer: the decoder layer whose output tokens bring along; None: see `watched_layer`; False: they do
            not. A mapping: one for each adapter by name.
        cache: where what is computed once is kept; None: in memory.
        spelling: see `specific.spellings`, for each adapter whose objective looks at it, by name.
        whole: the model as it runs where processes share it out and must run it alike (see training/step/sharding.py):
            nothing is kept then, and a step of one work is one pass with the adapter and one without, whatever its
            rows.

    Raises:
        RecipeError: if that layer does not exist, or the adapter does not reach it.
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        hidden_layer: int | bool | None | Mapping[str, int | bool | None] = False,
        *,
        cache: TensorCache | None = None,
        spelling: Mapping[str, Tensor] | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        self.model, self.whole, self.spelling = model, whole, spelling or {}
        self.device = next(model.parameters()).device
        self.halves = BackboneAndHead(model.get_base_model())
        self._rows = BatchBuilder(model, self.halves.head, pad_id, packs=None if whole is None else False)
        self.vocabulary = model.get_base_model().config.get_text_config().vocab_size
        names, layers = list(model.peft_config), decoder_layers(model)
        self._several = len(names) > 1
        asked = hidden_layer if isinstance(hidden_layer, Mapping) else dict.fromkeys(names, hidden_layer)
        self._watched = {n: watched_layer(model, number, n) for n, number in asked.items() if number is not False}
        changed = {name: changed_layers(model, layers, name) for name in names}
        below = min((min(numbers) for numbers in changed.values() if numbers), default=0)
        self.adapted_layers = [layers[n] for n in sorted({n for numbers in changed.values() for n in numbers})]
        self._head_only = {name for name, numbers in changed.items() if layers and not numbers}
        self.trunk = Trunk(layers[:below]) if below and whole is None else None
        self._trunk_checked = False
        below_all = self.trunk.layers[-1] if self.trunk else None
        self.frozen = ReferenceCache(
            model, self.halves, self._rows, cache or TensorCache("", _IN_MEMORY), below_all,
            list(self._watched.values()),
            keep_head=bool(self._head_only), off=whole is not None,
        )  # fmt: skip
        reach = "head" if self._head_only == set(names) else "layers"  # with layers, each piece reads the whole head
        size = _PIECE_BYTES[reach] if self.device.type == "cpu" else _PIECE_BYTES_ELSEWHERE
        self.piece_tokens = max(size // (4 * self.vocabulary), 1)

    def prepare(self, examples: Sequence[Example], *, quiet: bool = True) -> None:
        """Compute what is computed once for the rows that are not there yet, with a progress bar."""
        self.frozen.prepare(examples, quiet=quiet)

    @contextmanager
    def step(self, works: Sequence[StepRows]) -> Iterator[Iterator[Microbatch]]:
        """Yield the target tokens of all works in pieces; send a loss of each backward before taking the next.

        When the block ends, the gradients that the pieces left at the hidden states flow on into the layers.
        """
        found = self._states(works)
        if self.frozen.splits is False:
            yield self._pieces(works, found, None)
            return
        tensors = [tensor for states in found for tensor in (states.final, states.hidden) if tensor is not None]
        roots = [tensor for tensor in tensors if tensor.requires_grad]
        leaves = {id(root): root.detach().requires_grad_() for root in roots}
        ends = [
            states._replace(
                final=leaves.get(id(states.final), states.final), hidden=leaves.get(id(states.hidden), states.hidden)
            )
            for states in found
        ]
        yield self._pieces(works, ends, self.piece_tokens)
        reached = [root for root in roots if leaves[id(root)].grad is not None]
        if reached:
            torch.autograd.backward(reached, [leaves[id(root)].grad for root in reached])

    def tokens(
        self, forget: Sequence[Example], retain: Sequence[Example], adapter: str = "default"
    ) -> tuple[Tokens, Tokens]:
        """Return the target tokens of both sides in one piece, with their graph, and the reference of both."""
        works = [StepRows(adapter, forget, retain)]
        (piece,) = self._pieces(works, self._states(works), None)
        return piece.forget, piece.retain

    def _states(self, works: Sequence[StepRows]) -> list[_States]:
        found: dict[int, _States] = {}
        waiting: dict[int, Sequence[Mapping[str, Tensor]] | None] = {}
        for n, work in enumerate(works):
            kept = self.frozen.of(work.examples())  # finds out, too, whether the model splits
            if kept is not None and work.adapter in self._head_only:
                found[n] = _States(_joined(kept, FINAL, self.device), None, kept)
                continue
            if waiting and sum(len(e.ids) for m in (*waiting, n) for e in works[m].examples()) > _RUN_TOKENS:
                found |= self._run(works, waiting)
                waiting = {}
            waiting[n] = kept
        if waiting:
            found |= self._run(works, waiting)
        return [found[n] for n in range(len(works))]

    def _run(
        self, works: Sequence[StepRows], chosen: Mapping[int, Sequence[Mapping[str, Tensor]] | None]
    ) -> dict[int, _States]:
        """Run some works' rows through the adapted part in one forward pass; `chosen`: what is kept of their rows."""
        batches = [self._rows.batch(works[n].examples()) for n in chosen]
        packed = all(batch.positions is not None for batch in batches)
        lines = [kept or () for kept in chosen.values()]  # of each batch
        if not packed and len(batches) > 1:
            batches = [self._rows.padded([example for n in chosen for example in works[n].examples()])]
            lines = [[row for kept in lines for row in kept]]
        batch = side_by_side(batches)
        names = [works[n].adapter for n in chosen for _ in range(1 if packed else len(works[n].examples()))]
        layers = list({self._watched[name] for name in names if name in self._watched})
        reference, reference_hidden = None, {}
        if self.frozen.splits is False:
            with torch.no_grad(), self.model.disable_adapter(), _targets_of(layers, batch) as reference_hidden:
                reference = picked_logits(self.whole or self.model, self.halves.head, batch)
        with _targets_of(layers, batch) as hidden, rows_use(self.model, names if self._several else None):
            if self.frozen.splits is False:
                final = picked_logits(self.whole or self.model, self.halves.head, batch)
            else:
                final = self._over_trunk(lines, batches, batch)[predicting(batch)]
        found, first = {}, 0
        for n, kept in chosen.items():
            span = slice(first, first + sum(map(target_count, works[n].examples())))
            layer = self._watched.get(works[n].adapter)
            found[n] = _States(
                final[span],
                None if layer is None else hidden[layer][span],
                kept,
                None if reference is None else reference[span],
                None if layer is None or reference is None else reference_hidden[layer][span],
            )
            first = span.stop
        return found

    def _over_trunk(
        self, lines: Sequence[Sequence[Mapping[str, Tensor]]], batches: Sequence[Batch], batch: Batch
    ) -> Tensor:
        """Return the final states of a batch, (B, T, d), over the kept trunk where there is one.

        Args:
            lines: what is kept of the rows of each of the batches.
            batches: parts of the batch that stand below each other, or the batch alone.
            batch: what is run.
        """
        name = self.frozen.input
        if self.trunk is None or name is None:
            return self.halves.states(batch)
        inputs = [pack_states([row[name] for row in rows], part) for rows, part in zip(lines, batches, strict=True)]
        states = inputs[0] if len(inputs) == 1 else nn.utils.rnn.pad_sequence([s[0] for s in inputs], batch_first=True)
        if not self._trunk_checked:
            with torch.no_grad():
                expected = self.halves.states(batch)
                with self.trunk.patched_forward(states):
                    found = self.halves.states(batch)
            picked = predicting(batch)
            if not alike(found[picked], expected[picked]):
                self.trunk = None
                return self.halves.states(batch)
            self._trunk_checked = True
        with self.trunk.patched_forward(states):
            return self.halves.states(batch)

    def _pieces(self, works: Sequence[StepRows], found: Sequence[_States], most: int | None) -> Iterator[Microbatch]:
        """Yield the works' rows in pieces of at most `most` target tokens (or one row); None: one piece a work."""
        for n, (work, states) in enumerate(zip(works, found, strict=True)):
            examples = work.examples()
            for part in split_microbatches(work, most):
                if most is not None and not sum(target_count(examples[i]) for i in (*part.forget, *part.retain)):
                    continue  # rows without targets are there for models that all processes must run alike
                yield self._piece(n, work, states, part)  # no name here: a piece is let go before the next is made

    def _piece(self, number: int, work: StepRows, states: _States, part: RowRanges) -> Microbatch:
        refusal = self._side(work, states, part.refusals, numbers=part.paired) if part.refusals else None
        forget = self._side(work, states, part.forget, specific=True, refusal=refusal)
        return Microbatch(number, forget, self._side(work, states, part.retain))

    def _side(
        self,
        work: StepRows,
        states: _States,
        chosen: range,
        *,
        numbers: Sequence[int] | None = None,
        specific: bool = False,
        refusal: Tokens | None = None,
    ) -> Tokens:
        """Return the target tokens of some rows of a work, which are called by `numbers` (0, 1, ... by default)."""
        examples = work.examples()
        rows = [examples[i] for i in chosen]
        before = sum(map(target_count, examples[: chosen.start]))
        span = slice(before, before + sum(map(target_count, rows)))
        kept = None if states.kept is None else states.kept[chosen.start : chosen.stop]
        named = [n for n, e in zip(numbers or range(len(rows)), rows, strict=True) for _ in range(target_count(e))]
        if kept is None:
            logits, reference = states.final[span], states.reference[span]  # type: ignore[index]
        else:
            logits, reference = self._logits(work.adapter, kept, states.final[span])
        hidden = {}
        if states.hidden is not None:
            own = states.hidden[span]
            if states.reference_hidden is not None:
                reference_hidden = states.reference_hidden[span]
            elif len(own):
                name = self.frozen.name(self._watched[work.adapter])
                reference_hidden = _joined(kept or (), name, self.device)
            else:
                reference_hidden = own.detach()
            hidden = {"hidden": own, "reference_hidden": reference_hidden}

        def here(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        marks = here(specific_of(rows), torch.bool) if specific else None
        return Tokens(
            logits, here(labels_of(rows), torch.long), here(named, torch.long), reference,
            specific=marks, spelling=self.spelling.get(work.adapter) if specific else None, refusal=refusal, **hidden,
        )  # fmt: skip

    def _logits(self, adapter: str, kept: Sequence[Mapping[str, Tensor]], states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (n, V) of some rows and their reference."""
        if not len(states):
            return (states.new_zeros(0, self.vocabulary),) * 2
        final = _joined(kept, FINAL, self.device)
        if adapter in self._head_only and all(HEAD in row for row in kept):
            known = _joined(kept, HEAD, self.device)
            with torch.no_grad():
                reference = self.halves.logits(final, known)
            return self.halves.logits(final, with_delta(self.halves.head, adapter, final, known)), reference
        with rows_use(self.model, [adapter] if self._several else None):
            logits = self.halves.logits(states)
        with torch.no_grad(), self._bare_head():
            return logits, self.halves.logits(final)

    @contextmanager
    def _bare_head(self) -> Iterator[None]:
        switch = getattr(self.halves.head, "enable_adapters", None)
        if switch is None:
            yield
            return
        switch(False)
        try:
            yield
        finally:
            switch(True)


@contextmanager
def _targets_of(layers: Sequence[nn.Module], batch: Batch) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what layers give at a batch's targets, (N, d) each; there when the block ends."""
    found: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        seen = {layer: stack.enter_context(outputs_of(layer)) for layer in layers}
        yield found
    found |= {layer: outputs[-1][predicting(batch)] for layer, outputs in seen.items()}


def _joined(kept: Sequence[Mapping[str, Tensor]], name: str, device: torch.device) -> Tensor:
    if len(kept) == 1:  # without a copy
        return kept[0][name].to(device)
    return torch.cat([row[name].to(device) for row in kept])
