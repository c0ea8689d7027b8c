"""The keys and values that prompts begin with, kept for the next prompt that begins so, under the same set of adapters.

A trie of blocks of `BLOCK` tokens for each `Owner`. Nothing is found by a digest of tokens: they are compared. What an
owner has stored no other gets, so an answer cannot come from another set, another version of one, or another tenant.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from ...inference.adapter_cache import AdapterLease
from ...inference.model_runner import KVBatch

BLOCK = 32  # tokens


class Owner(NamedTuple):
    """Whose keys and values these are: they depend on the exact set; `salt` keeps tenants apart."""

    salt: str
    adapters: frozenset[tuple[str, str, float]]  # name, sha256 of its files, strength

    @classmethod
    def of(cls, lease: AdapterLease, salt: str) -> Owner:
        """Return the owner of what is computed with a lease's set."""
        return cls(salt, frozenset((part.name, part.sha256, part.strength) for part in lease.applied))


@dataclass(eq=False)
class _Root:
    """Where an owner's prompts begin."""

    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)  # by their tokens


@dataclass(eq=False)
class _Block(_Root):
    """A part of prompts, behind its parent."""

    _: KW_ONLY
    parent: _Root
    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]  # keys and values, (1, H, BLOCK, D) each


class PrefixCache:
    """At most `limit` bytes of keys and values; what was used longest ago goes first. Safe for many threads.

    Args:
        token_bytes: of one token's keys and values, in all layers.
    """

    def __init__(self, token_bytes: int) -> None:
        self._block_bytes, self._limit, self._lock = BLOCK * token_bytes, 0, threading.Lock()
        self._roots: dict[Owner, _Root] = {}
        self._used = OrderedDict[_Block, Owner]()  # the latest used last; a block is used whenever one behind it is

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return len(self._used) * self._block_bytes

    def set_limit(self, limit: int) -> None:
        """Keep at most so many bytes from now on."""
        with self._lock:
            self._limit = limit
            self._make_room(limit)

    def find(self, owner: Owner, ids: Sequence[int], longer_than: int = 0) -> KVBatch | None:
        """Return a batch of one row with what is known of the beginning of `ids`; None unless it has more tokens."""
        with self._lock:
            path = self._known(owner, ids)
            if len(path) * BLOCK <= longer_than:
                return None
            self._note_use(path, owner)
            cache = DynamicCache()
            for n, layers in enumerate(zip(*(block.layers for block in path), strict=True)):
                keys, values = (torch.cat(parts, 2) for parts in zip(*layers, strict=True))
                cache.update(keys, values, n)
        mask = torch.ones(1, len(path) * BLOCK, dtype=torch.long, device=keys.device)
        return KVBatch(cache, mask, mask[:, :1])

    def put(self, owner: Owner, ids: Sequence[int], batch: KVBatch, row: int = 0) -> None:
        """Keep what is new in a row's keys and values, which are those of `ids`, as far as there is room."""
        with self._lock:
            path = self._known(owner, ids)
            self._note_use(path, owner)
            root = self._roots.get(owner) or _Root()
            offset, known = batch.mask.shape[1] - len(ids), len(path) * BLOCK
            last = batch.cache.layers[-1]  # what overflows in a layer is not finite in all that follow
            if not all(states[row, :, offset + known :].isfinite().all() for states in (last.keys, last.values)):
                return
            for begin in range(known, len(ids) - BLOCK + 1, BLOCK):
                if not self._make_room(self._limit - self._block_bytes, path):
                    break
                places = slice(offset + begin, offset + begin + BLOCK)
                layers = [
                    (layer.keys[row : row + 1, :, places].clone(), layer.values[row : row + 1, :, places].clone())
                    for layer in batch.cache.layers
                ]
                key, parent = tuple(ids[begin : begin + BLOCK]), path[-1] if path else root
                parent.children[key] = block = _Block(parent=parent, ids=key, layers=layers)
                self._used[block], self._roots[owner] = owner, root
                path.append(block)
            self._note_use(path, owner)

    def drop(self, stale: Callable[[Owner], bool]) -> None:
        """Forget what these owners have stored."""
        with self._lock:
            gone = {owner for owner in self._roots if stale(owner)}
            for owner in gone:
                del self._roots[owner]
            for block in [block for block, owner in self._used.items() if owner in gone]:
                del self._used[block]

    def _known(self, owner: Owner, ids: Sequence[int]) -> list[_Block]:
        """Return the blocks that a prompt begins with."""
        node, path = self._roots.get(owner), list[_Block]()
        for begin in range(0, len(ids) - BLOCK + 1, BLOCK):
            if node is None or (block := node.children.get(tuple(ids[begin : begin + BLOCK]))) is None:
                break
            path.append(block)
            node = block
        return path

    def _note_use(self, path: Sequence[_Block], owner: Owner) -> None:
        for block in reversed(path):  # a parent after its children, so that they go first
            self._used[block] = owner
            self._used.move_to_end(block)

    def _make_room(self, size: int, keep: Sequence[_Block] = ()) -> bool:
        """Forget what was used longest ago, so that `size` bytes are left; False if that needs one of `keep`."""
        while self.bytes > size:
            block = next(iter(self._used), None)
            if block is None or block in keep:
                return False
            owner = self._used.pop(block)
            del block.parent.children[block.ids]
            if not self._roots[owner].children:
                del self._roots[owner]
        return True
