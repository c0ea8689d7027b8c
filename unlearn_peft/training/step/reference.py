"""What the frozen base gives for each row, computed once in one pass without adapters, and kept in a cache.

Rows come in; named tensors go out: the final hidden states at the targets, the input of the first adapted layer, the
output of a layer that an objective watches, and for adapters on the head alone what the bare head gives.
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

from ...data.batch import Batch
from ...data.tokenize import Example
from ...files.atomic import atomic_file
from ...models.forward import BackboneAndHead, BatchBuilder, alike, picked_logits, predicting
from ...models.layers import decoder_layers, outputs_of, patched_forward, returning
from .head import knows_delta
from .microbatches import target_count

FINAL, HEAD = "final", "head"  # (n, d) and (n, V), both at the targets
_RUN_TOKENS = 4096  # of one forward pass


class ReferenceCache:
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
        halves: BackboneAndHead,
        rows: BatchBuilder,
        cache: TensorCache,
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
            kept[self.input] = unpack_states(seen[self.below][-1], batch, [len(e.ids) for e in examples])
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


logger = logging.getLogger(__name__)
_SHARD_BYTES = 64_000_000
_SEPARATOR = "/"


class TensorCache:
    """Tensors by row.

    Args:
        key: what else the tensors depend on; files with another key are deleted.
        memory_bytes: how much is held in memory.
        folder: where the rest goes; None: what does not fit is not kept, and is computed again when needed.
        part: this process's number, so that several can write beside each other.
    """

    def __init__(self, key: str, memory_bytes: int, folder: Path | None = None, part: int = 0) -> None:
        self.key, self.memory_bytes, self.folder, self.part = key, memory_bytes, folder, part
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._used = 0
        self._waiting: dict[str, dict[str, Tensor]] = {}  # for the next file
        self._files: list[Path] = []
        self._mapped: dict[str, tuple[object, list[str]]] = {}  # row -> open file, names of its tensors
        self.look()

    def get(self, example: Example) -> Mapping[str, Tensor] | None:
        """Return what was kept for a row, or None."""
        row = row_digest(example)
        if row in self._memory:
            return self._memory[row]
        if row in self._waiting:
            return self._waiting[row]
        if row in self._mapped:
            file, names = self._mapped[row]
            return {name: file.get_tensor(f"{row}{_SEPARATOR}{name}") for name in names}  # type: ignore[attr-defined]
        return None

    def put(self, example: Example, tensors: Mapping[str, Tensor]) -> None:
        """Keep a row's tensors, in memory while the budget lasts."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.has_room(size):
            self._memory[row_digest(example)] = dict(tensors)
            self._used += size
        elif self.folder is not None:
            self._waiting[row_digest(example)] = {name: t.to("cpu").contiguous() for name, t in tensors.items()}
            if sum(t.nbytes for kept in self._waiting.values() for t in kept.values()) >= _SHARD_BYTES:
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
        tensors = {f"{row}{_SEPARATOR}{name}": t for row, kept in self._waiting.items() for name, t in kept.items()}
        if not self.folder.exists():
            with suppress(OSError):  # whole_file tells why
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(path, mode=0o600) as temporary:  # the rows' words can be read back from their states
            save_file(tensors, temporary, metadata={"key": self.key})
        self._waiting = {}
        self.look()

    def look(self) -> None:
        """Take in the files that are there, other processes' too; those of another key or damaged are deleted."""
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
            for full in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  (safe_open is no mapping)
                row, _, name = full.partition(_SEPARATOR)
                names.setdefault(row, []).append(name)
            self._mapped |= {row: (file, found) for row, found in names.items()}


def row_digest(example: Example) -> str:
    """Return a digest of a row's tokens and of which of them are targets."""
    shape = array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.is_target)
    return hashlib.blake2b(shape, digest_size=16).hexdigest()


def states_key(fingerprint: object, *more: object) -> str:
    """Return the key of a cache: a digest of all that the kept tensors depend on besides their rows."""
    return hashlib.sha256(repr((fingerprint, more, torch.__version__)).encode()).hexdigest()


class Trunk:
    """The lowest layers of a model, which no adapter touches."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    def patched_forward(self, states: Tensor) -> AbstractContextManager[None]:
        """Let `states` (B, T, d) be what the last of the layers gives, inside a `with` block."""

        def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

        return patched_forward({**dict.fromkeys(self.layers, pass_on), self.layers[-1]: returning(states)})


def unpack_states(states: Tensor, batch: Batch, lengths: Sequence[int]) -> list[Tensor]:
    """Cut a batch's states (B, T, d) into those of its rows, (length, d) each."""
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
