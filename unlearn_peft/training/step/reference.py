"""Reference activations: what the base gives for each row without adapters, computed once and cached.

Rows come in; named tensors go out: the final hidden states at the targets, the input of the first adapted layer, the
output of a layer that an objective watches, and for adapters on the head alone the outputs of the bare head.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...data.batch import Batch, target_count
from ...data.tokenize import Example
from ...files.atomic import atomic_file
from ...models.forward import BackboneAndHead, BatchBuilder, agrees, picked_logits, predicting
from ...models.layers import decoder_layers, outputs_of, patched_forward, returning
from .head import knows_delta

logger = logging.getLogger(__name__)
FINAL, HEAD = "final", "head"  # (n, d) and (n, V), both at the targets
PASS_TOKENS = 4096  # of one forward pass
_FILE_BYTES = 64_000_000
_SEPARATOR = "/"


class ReferenceCache:
    """The reference activations of rows, as far as training needs them.

    `below` is the layer under the first adapted one, if there is any; an objective sees the outputs of `watched`
    layers. `keep_head` keeps the bare head's outputs too, while they fit into memory; `off` keeps nothing at all.
    """

    def __init__(
        self,
        model: Any,
        base: BackboneAndHead,
        builder: BatchBuilder,
        cache: TensorCache,
        below: nn.Module | None,
        watched: Sequence[nn.Module],
        *,
        keep_head: bool,
        off: bool,
    ) -> None:
        self.model, self.base, self.builder, self.cache = model, base, builder, cache
        self.layers = decoder_layers(model)
        self.below, self.watched = below, list(dict.fromkeys(watched))
        self.keep_head = keep_head and knows_delta(base.head)
        # whether backbone and head, run one by one, give what the model gives; None: not compared yet
        self.splits: bool | None = False if off or base.backbone is base.model else None
        # (T, d), whole rows; named by the layer's number, for another layer's input is no use
        self.input_name = None if below is None else f"input of {self.layers.index(below) + 1}"
        self._needs = {FINAL, *map(self.output_name, self.watched)} | ({self.input_name} if self.input_name else set())

    def output_name(self, layer: nn.Module) -> str:
        """Return under which name a watched layer's output is kept."""
        return f"output of {self.layers.index(layer)}"

    def prepare(self, examples: Sequence[Example], *, quiet: bool = True) -> None:
        """Compute what is not cached yet, with a progress bar unless `quiet`.

        Rows are grouped by what they are, not by what is cached: a row's last bits depend on its neighbours in a pass.
        """
        from tqdm import tqdm

        rows = sorted({id(e): e for e in examples}.values(), key=lambda e: len(e.ids))
        with tqdm(total=len(rows), unit="row", desc="reference activations", disable=quiet) as bar:
            while rows and self.splits is not False:
                group = rows[-max(1, PASS_TOKENS // len(rows[-1].ids)) :]
                del rows[-len(group) :]
                if any(self._cached(e) is None for e in group):
                    self._compute(group)
                bar.update(len(group))
        self.cache.flush()

    def get(self, examples: Sequence[Example]) -> list[Mapping[str, Tensor]] | None:
        """Return each row's tensors, computing new ones; None where the model only runs as a whole."""
        if self.splits is False:
            return None
        tensors = {id(e): self._cached(e) for e in examples}
        new = list({id(e): e for e in examples if tensors[id(e)] is None}.values())
        if new:
            computed = self._compute(new)
            if computed is None:
                return None
            tensors |= {id(e): values for e, values in zip(new, computed, strict=True)}
        return [tensors[id(e)] or {} for e in examples]

    @torch.no_grad()
    def _compute(self, examples: Sequence[Example]) -> list[dict[str, Tensor]] | None:
        with self.model.disable_adapter():
            if self.splits is None:
                batch = self.builder.batch(examples[:2])
                self.splits = agrees(
                    "backbone and head apart",
                    self.model,
                    lambda: self.base.logits(self.base.states(batch)[predicting(batch)]),
                    lambda: picked_logits(self.model, self.base.head, batch),
                )
                self.keep_head = self.keep_head and bool(self.splits) and self.base.head_sees_states(batch)
            if not self.splits:
                return None
            batch = self.builder.batch(examples)
            with ExitStack() as stack:
                outputs = {layer: stack.enter_context(outputs_of(layer)) for layer in (*self.watched, self.below)}
                states = self.base.states(batch)
        if self.input_name is not None and not _like_states(outputs[self.below], states):
            self._needs.discard(self.input_name)
            self.input_name = self.below = None  # then all layers run
        counts, picked = [target_count(e) for e in examples], predicting(batch)
        by_name: dict[str, Sequence[Tensor]] = {FINAL: torch.split(states[picked], counts)}
        by_name |= {self.output_name(x): torch.split(outputs[x][-1][picked], counts) for x in self.watched}
        if self.input_name is not None:
            by_name[self.input_name] = unpack_states(outputs[self.below][-1], batch, [len(e.ids) for e in examples])
        head = getattr(self.base.head, "base_layer", self.base.head)
        head_bytes = head.weight.shape[0] * states.element_size() if self.keep_head else 0  # a target's outputs
        result = []
        for n, example in enumerate(examples):
            tensors = {name: values[n].clone() for name, values in by_name.items()}
            if self.keep_head and counts[n] and self.cache.has_room(counts[n] * head_bytes):
                tensors[HEAD] = head(tensors[FINAL])
            self.cache.put(example, tensors)
            result.append(tensors)
        return result

    def _cached(self, example: Example) -> Mapping[str, Tensor] | None:
        tensors = self.cache.get(example)
        return tensors if tensors is not None and self._needs <= tensors.keys() else None


def _like_states(outputs: Sequence[Any], states: Tensor) -> bool:
    """Return whether a layer ran once and gave hidden states such as the model's, (B, T, d)."""
    return len(outputs) == 1 and isinstance(outputs[0], Tensor) and outputs[0].shape == states.shape


class TensorCache:
    """Tensors by row: up to `memory_bytes` in memory, the rest in `folder`, or without one not at all.

    Tensors also depend on what `key` stands for: files with another key are deleted. `part` is this process's number,
    so that several can write beside each other.
    """

    def __init__(self, key: str, memory_bytes: int, folder: Path | None = None, part: int = 0) -> None:
        self.key, self.memory_bytes, self.folder, self.part = key, memory_bytes, folder, part
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._used = 0
        self._waiting: dict[str, dict[str, Tensor]] = {}  # for the next file
        self._waiting_bytes = 0
        self._files: list[Path] = []
        self._mapped: dict[str, tuple[Any, list[str]]] = {}  # row -> open file, names of its tensors
        self.refresh()

    def get(self, example: Example) -> Mapping[str, Tensor] | None:
        """Return a row's tensors, or None."""
        row = row_digest(example)
        for held in (self._memory, self._waiting):
            if row in held:
                return held[row]
        if row not in self._mapped:
            return None
        file, names = self._mapped[row]
        return {name: file.get_tensor(f"{row}{_SEPARATOR}{name}") for name in names}

    def put(self, example: Example, tensors: Mapping[str, Tensor]) -> None:
        """Keep a row's tensors, in memory while there is room."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.has_room(size):
            self._memory[row_digest(example)] = dict(tensors)
            self._used += size
        elif self.folder is not None:
            self._waiting[row_digest(example)] = {name: t.to("cpu").contiguous() for name, t in tensors.items()}
            self._waiting_bytes += size
            if self._waiting_bytes >= _FILE_BYTES:
                self.flush()

    def has_room(self, size: int) -> bool:
        """Return whether so many more bytes fit into memory."""
        return self._used + size <= self.memory_bytes

    def flush(self) -> None:
        """Write what waits for a file, whole or not at all, and map it."""
        if not self._waiting or self.folder is None:
            return
        numbers = [int(path.stem[-5:]) for path in self.folder.glob(f"{self.part:04d}-*.safetensors")]
        path = self.folder / f"{self.part:04d}-{max(numbers, default=-1) + 1:05d}.safetensors"
        tensors = {f"{row}{_SEPARATOR}{name}": t for row, named in self._waiting.items() for name, t in named.items()}
        if not self.folder.exists():
            with suppress(OSError):  # atomic_file explains why
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(path, mode=0o600) as temporary:  # the rows' words can be read back from their states
            save_file(tensors, temporary, metadata={"key": self.key})
        self._waiting, self._waiting_bytes = {}, 0
        self.refresh()

    def refresh(self) -> None:
        """Map new files, other processes' too; those of another key or damaged are deleted."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._files:
                continue
            try:
                file = safe_open(path, framework="pt")
                stale = file.metadata().get("key") != self.key  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, AttributeError):
                stale = True
            if stale:
                logger.info("Deleted %s: it was made for another base, adapter or setting", path.name)
                path.unlink(missing_ok=True)
                continue
            self._files.append(path)
            names: dict[str, list[str]] = {}
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  (safe_open is no mapping)
                row, _, name = key.partition(_SEPARATOR)
                names.setdefault(row, []).append(name)
            self._mapped |= {row: (file, row_names) for row, row_names in names.items()}


def row_digest(example: Example) -> str:
    """Return a digest of a row's tokens and of which of them are targets."""
    content = array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.is_target)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def cache_key(fingerprint: object, *more: object) -> str:
    """Return a `TensorCache`'s key: a digest of all that the tensors depend on besides their rows."""
    return hashlib.sha256(repr((fingerprint, more, torch.__version__)).encode()).hexdigest()


def skipping(layers: Sequence[nn.Module], states: Tensor) -> AbstractContextManager[None]:
    """Run none of the layers inside a `with` block: `states` (B, T, d) are what the last of them gives."""

    def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    return patched_forward({**dict.fromkeys(layers, pass_on), layers[-1]: returning(states)})


def unpack_states(states: Tensor, batch: Batch, lengths: Sequence[int]) -> list[Tensor]:
    """Split a batch's states (B, T, d) into those of its rows, (length, d) each."""
    if batch.positions is None:
        return [row[:length].clone() for row, length in zip(states, lengths, strict=True)]
    line, first = states[0], batch.shared
    parts = torch.split(line[first:], [length - first for length in lengths])
    return [torch.cat([line[:first], part]) for part in parts]


def pack_states(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    """Lay the states of rows out as the batch lays out their tokens, (B, T, d); the reverse of `unpack_states`."""
    if batch.positions is None:
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return torch.cat([rows[0][: batch.shared], *(states[batch.shared :] for states in rows)])[None]
