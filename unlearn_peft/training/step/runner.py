"""One step's forward passes: tokenised rows -> target tokens with their logits and the reference, and back again.

`Tokens` go out to an objective in microbatches of whole rows, so that logits (n, V) never exist for a whole batch. The
reference is cached (see training/step/reference.py) as final hidden states: d numbers a token instead of V. So is the
input of the first adapted layer: the layers below it do not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.batch import Batch, labels_of, side_by_side, target_count
from ...data.tokenize import Example
from ...errors import AdapterError
from ...models.forward import BackboneAndHead, BatchBuilder, agrees, picked_logits, predicting
from ...models.layers import decoder_layers, outputs_of, vocabulary
from ..tokens import Tokens
from .head import with_delta
from .layers import adapter_names, changed_layers, watched_layer
from .microbatches import RowRanges, StepRows, facts_of, split_microbatches
from .reference import FINAL, HEAD, PASS_TOKENS, ReferenceCache, TensorCache, pack_states, skipping

_LOGITS_BYTES = {"head": 4_000_000, "layers": 8_000_000}  # of a microbatch, on a CPU: what its caches like
_LOGITS_BYTES_ELSEWHERE = 512_000_000
_CACHE_BYTES = 1_000_000_000  # in memory, where no cache is given
Cached = Sequence[Mapping[str, Tensor]] | None  # of each row; None where the model only runs as a whole


class Microbatch(NamedTuple):
    """A few whole rows of one adapter: the target tokens of both sides."""

    number: int  # of its `StepRows`
    forget: Tokens
    retain: Tokens


class Activations(NamedTuple):
    """What the adapted layers give at the targets of an adapter's rows, and the reference for it."""

    final: Tensor  # (N, d), in front of the head; where the model only runs as a whole: its logits, (N, V)
    hidden: Tensor | None  # (N, d), of the watched layer
    cached: Cached  # where it is None, the reference is here:
    reference: Tensor | None = None  # (N, V)
    reference_hidden: Tensor | None = None  # (N, d)


class StepRunner:
    """Runs a PEFT model over rows and hands out target tokens, with the reference beside them.

    Args:
        model: the PEFT model; with its adapters switched off it is the reference.
        pad_id: any token id; padding is never looked at.
        hidden_layer: of `Tokens.hidden`, see `watched_layer`, or by adapter; False: no hidden states.
        cache: of the reference activations; None: in memory.
        spelling: by adapter, for objectives that use it, see `fact_tokens.spellings`.
        sharded: the model as processes share it, who must run it alike (see training/step/sharding.py): nothing is
            cached then, and a step is one pass with the adapter and one without, whatever its rows.

    Raises:
        RecipeError: if the layer does not exist, or the adapter does not reach it.
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        hidden_layer: int | bool | None | Mapping[str, int | bool | None] = False,
        *,
        cache: TensorCache | None = None,
        spelling: Mapping[str, Tensor] | None = None,
        sharded: nn.Module | None = None,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model, self.sharded, self.spelling = model, sharded, spelling or {}
        self.device = next(model.parameters()).device
        self.base = BackboneAndHead(model.get_base_model())
        below = {id(module) for module in self.base.backbone.modules()}
        tuned = [module for module in self.base.model.modules() if isinstance(module, BaseTunerLayer)]
        self._above: list[Any] = [module for module in tuned if id(module) not in below]
        self._builder = BatchBuilder(model, self.base.head, pad_id, packs=None if sharded is None else False)
        self.vocab_size = vocabulary(model.get_base_model())
        names, layers = list(model.peft_config), decoder_layers(model)
        self._several = len(names) > 1
        numbers = hidden_layer if isinstance(hidden_layer, Mapping) else dict.fromkeys(names, hidden_layer)
        self._watched = {n: watched_layer(model, number, n) for n, number in numbers.items() if number is not False}
        changed = {name: changed_layers(model, layers, name) for name in names}
        lowest = min((min(numbers) for numbers in changed.values() if numbers), default=0)
        self.adapted_layers = [layers[n] for n in sorted({n for numbers in changed.values() for n in numbers})]
        self._head_only = {name for name, numbers in changed.items() if layers and not numbers}
        self.frozen_layers = layers[:lowest] if lowest and sharded is None else None  # below the first adapted one
        self._skipping_checked = False
        self.reference = ReferenceCache(
            model, self.base, self._builder, cache or TensorCache("", _CACHE_BYTES),
            self.frozen_layers[-1] if self.frozen_layers else None, list(self._watched.values()),
            keep_head=bool(self._head_only), off=sharded is not None,
        )  # fmt: skip
        reach = "head" if self._head_only == set(names) else "layers"  # with layers, each reads the whole head
        size = _LOGITS_BYTES[reach] if self.device.type == "cpu" else _LOGITS_BYTES_ELSEWHERE
        self.microbatch_tokens = max(size // (4 * self.vocab_size), 1)

    @contextmanager
    def step(self, per_adapter: Sequence[StepRows]) -> Iterator[Iterator[Microbatch]]:
        """Yield all target tokens in microbatches; call `backward` on the loss of each before taking the next.

        When the block ends, the gradients that the microbatches left at the hidden states flow on into the layers.
        """
        activations = self._activations(per_adapter)
        if self.reference.splits is False:
            yield self._microbatches(per_adapter, activations, None)
            return
        tensors = [tensor for each in activations for tensor in (each.final, each.hidden) if tensor is not None]
        roots = [tensor for tensor in tensors if tensor.requires_grad]
        leaves = {id(root): root.detach().requires_grad_() for root in roots}
        cut = [
            each._replace(final=leaves.get(id(each.final), each.final), hidden=leaves.get(id(each.hidden), each.hidden))
            for each in activations
        ]
        yield self._microbatches(per_adapter, cut, self.microbatch_tokens)
        reached = [root for root in roots if leaves[id(root)].grad is not None]
        if reached:
            torch.autograd.backward(reached, [leaves[id(root)].grad for root in reached])

    def tokens(
        self, forget: Sequence[Example], retain: Sequence[Example], adapter: str = "default"
    ) -> tuple[Tokens, Tokens]:
        """Return the target tokens of both sides in one microbatch, with their graph."""
        per_adapter = [StepRows(adapter, forget, retain)]
        (microbatch,) = self._microbatches(per_adapter, self._activations(per_adapter), None)
        return microbatch.forget, microbatch.retain

    def _activations(self, per_adapter: Sequence[StepRows]) -> list[Activations]:
        result: dict[int, Activations] = {}
        waiting: dict[int, Cached] = {}
        for n, rows in enumerate(per_adapter):
            cached = self.reference.get(rows.examples())  # finds out, too, whether the model splits
            if cached is not None and rows.adapter in self._head_only:
                result[n] = Activations(_concatenate(cached, FINAL, self.device), None, cached)
                continue
            if waiting and sum(len(e.ids) for m in (*waiting, n) for e in per_adapter[m].examples()) > PASS_TOKENS:
                result |= self._run(per_adapter, waiting)
                waiting = {}
            waiting[n] = cached
        if waiting:
            result |= self._run(per_adapter, waiting)
        return [result[n] for n in range(len(per_adapter))]

    def _run(self, per_adapter: Sequence[StepRows], cached: Mapping[int, Cached]) -> dict[int, Activations]:
        """Run the rows of the adapters that `cached` numbers through the adapted layers, in one forward pass."""
        batches = [self._builder.batch(per_adapter[n].examples()) for n in cached]
        packed = all(batch.positions is not None for batch in batches)
        cached_of = [each or () for each in cached.values()]  # of the rows of each batch
        if not packed and len(batches) > 1:
            batches = [self._builder.padded([example for n in cached for example in per_adapter[n].examples()])]
            cached_of = [[row for each in cached_of for row in each]]
        batch = side_by_side(batches)
        names = [per_adapter[n].adapter for n in cached for _ in range(1 if packed else len(per_adapter[n].examples()))]
        layers = list({self._watched[name] for name in names if name in self._watched})
        reference, reference_hidden = None, {}
        if self.reference.splits is False:
            with torch.no_grad(), self.model.disable_adapter(), _targets_of(layers, batch) as reference_hidden:
                reference = picked_logits(self.sharded or self.model, self.base.head, batch)
        with _targets_of(layers, batch) as hidden, adapter_names(self.model, names if self._several else None):
            if self.reference.splits is False:
                final = picked_logits(self.sharded or self.model, self.base.head, batch)
            else:
                final = self._final_states(cached_of, batches, batch)[predicting(batch)]
        lost = torch.is_grad_enabled() and not final.requires_grad
        if lost and any(p.requires_grad for p in self.base.backbone.parameters()):  # not on the head alone
            name = type(self.base.model).__name__
            raise AdapterError(f"no gradient reaches the adapter's layers in {name}: use a head (adapter: head)")
        result, first = {}, 0
        for n, each in cached.items():
            span = slice(first, first + sum(map(target_count, per_adapter[n].examples())))
            layer = self._watched.get(per_adapter[n].adapter)
            result[n] = Activations(
                final[span],
                None if layer is None else hidden[layer][span],
                each,
                None if reference is None else reference[span],
                None if layer is None or reference is None else reference_hidden[layer][span],
            )
            first = span.stop
        return result

    def _final_states(
        self, cached_of: Sequence[Sequence[Mapping[str, Tensor]]], batches: Sequence[Batch], batch: Batch
    ) -> Tensor:
        """Return the final states of a batch, (B, T, d), skipping the frozen layers where there are any.

        `batches` are the packed batches that are the lines of `batch`, or it alone; `cached_of` belongs to their rows.
        """
        name = self.reference.input_name
        if self.frozen_layers is None or name is None:
            return self.base.states(batch)
        inputs = [pack_states([row[name] for row in rows], part) for rows, part in zip(cached_of, batches, strict=True)]
        states = inputs[0] if len(inputs) == 1 else nn.utils.rnn.pad_sequence([s[0] for s in inputs], batch_first=True)
        if not self._skipping_checked:
            frozen, picked = self.frozen_layers, predicting(batch)

            def skipped() -> Tensor:
                with skipping(frozen, states):
                    return self.base.states(batch)[picked]

            if not agrees("frozen layers skipped", self.model, skipped, lambda: self.base.states(batch)[picked]):
                self.frozen_layers = None
                return self.base.states(batch)
            self._skipping_checked = True
        with skipping(self.frozen_layers, states):
            return self.base.states(batch)

    def _microbatches(
        self, per_adapter: Sequence[StepRows], activations: Sequence[Activations], max_targets: int | None
    ) -> Iterator[Microbatch]:
        for n, (rows, states) in enumerate(zip(per_adapter, activations, strict=True)):
            counts = list(map(target_count, rows.examples()))
            for part in split_microbatches(rows, max_targets):
                if max_targets is not None and not sum(counts[i] for i in (*part.forget, *part.retain)):
                    continue  # rows without targets are there for models that all processes must run alike
                yield self._microbatch(n, rows, states, part)  # no name here: it is let go before the next is made

    def _microbatch(self, number: int, rows: StepRows, states: Activations, part: RowRanges) -> Microbatch:
        refusal = self._tokens(rows, states, part.refusals, numbers=part.paired) if part.refusals else None
        forget = self._tokens(rows, states, part.forget, is_forget=True, refusal=refusal)
        return Microbatch(number, forget, self._tokens(rows, states, part.retain))

    def _tokens(
        self,
        rows: StepRows,
        states: Activations,
        places: range,
        *,
        numbers: Sequence[int] | None = None,
        is_forget: bool = False,
        refusal: Tokens | None = None,
    ) -> Tokens:
        """Return the target tokens of the rows at `places`; `Tokens.rows` calls them by `numbers`, or 0, 1, ..."""
        examples = rows.examples()
        before, examples = examples[: places.start], [examples[i] for i in places]
        counts, first = list(map(target_count, examples)), sum(map(target_count, before))
        span = slice(first, first + sum(counts))
        row_numbers = [n for n, count in zip(numbers or range(len(counts)), counts, strict=True) for _ in range(count)]
        cached = None if states.cached is None else states.cached[places.start : places.stop]
        if cached is None:
            logits, reference = states.final[span], states.reference[span]  # type: ignore[index]
        else:
            logits, reference = self._logits(rows.adapter, cached, states.final[span])
        hidden = {}
        if states.hidden is not None:
            current = states.hidden[span]
            if states.reference_hidden is not None:
                reference_hidden = states.reference_hidden[span]
            elif len(current):
                name = self.reference.output_name(self._watched[rows.adapter])
                reference_hidden = _concatenate(cached or (), name, self.device)
            else:
                reference_hidden = current.detach()
            hidden = {"hidden": current, "reference_hidden": reference_hidden}

        def here(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        facts = here(facts_of(examples), torch.long) if is_forget else None
        return Tokens(
            logits, here(labels_of(examples), torch.long), here(row_numbers, torch.long), reference,
            specific=None if facts is None else facts >= 0, facts=facts,
            spelling=self.spelling.get(rows.adapter) if is_forget else None, refusal=refusal, **hidden,
        )  # fmt: skip

    def _logits(self, adapter: str, cached: Sequence[Mapping[str, Tensor]], states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (n, V) of some rows and their reference."""
        if not len(states):
            return (states.new_zeros(0, self.vocab_size),) * 2
        final = _concatenate(cached, FINAL, self.device)
        if adapter in self._head_only and all(HEAD in row for row in cached):
            bare = _concatenate(cached, HEAD, self.device)
            with torch.no_grad():
                reference = self.base.logits(final, bare)
            return self.base.logits(final, with_delta(self.base.head, adapter, final, bare)), reference
        with adapter_names(self.model, [adapter] if self._several else None):
            logits = self.base.logits(states)
        with torch.no_grad(), self._bare_head():
            return logits, self.base.logits(final)

    @contextmanager
    def _bare_head(self) -> Iterator[None]:
        """Switch off the adapters of all that is above the backbone: the head, and what some models have before it."""
        for module in self._above:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self._above:
                module.enable_adapters(True)


@contextmanager
def _targets_of(layers: Sequence[nn.Module], batch: Batch) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what layers give at a batch's targets, (N, d) each; there when the block ends."""
    at_targets: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        outputs = {layer: stack.enter_context(outputs_of(layer)) for layer in layers}
        yield at_targets
    at_targets |= {layer: tensors[-1][predicting(batch)] for layer, tensors in outputs.items()}


def _concatenate(rows: Sequence[Mapping[str, Tensor]], name: str, device: torch.device) -> Tensor:
    if len(rows) == 1:  # without a copy
        return rows[0][name].to(device)
    return torch.cat([row[name].to(device) for row in rows])
