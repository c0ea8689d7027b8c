"""An adapter directory: PEFT's two files, a manifest and a card. Read as untrusted, written whole or not at all.

`read_bundle` checks everything that can be checked without a base; `Bundle.check_fits` the rest, against a live
model. Both tell all that is wrong at once, before anything is attached.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import refuse, safe_repr
from ..files.atomic import folder_bytes
from ..models.fingerprint import fingerprint, mismatches
from ..models.layers import submodule

WEIGHTS, CONFIG, MANIFEST, CARD, CURVES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "forget.json",
    "README.md",
    "curves.png",
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear layer: `scale * up @ down`, or a dense `up` alone."""

    up: Tensor  # (out, r); dense: (out, in)
    down: Tensor | None  # (r, in)
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """The rank, or None where the delta is dense."""
        return None if self.down is None else self.down.shape[0]


@dataclass(frozen=True)
class Bundle:
    """An adapter read from disk: its deltas by module name, its PEFT config, its manifest (empty if it has none)."""

    path: Path
    config: dict[str, Any]
    deltas: dict[str, Delta]
    manifest: dict[str, Any]
    digest: str  # sha256 of the weights file
    identity: str  # sha256 over weights file and config: equal if and only if the effect is the same
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 of each file, as it was read; what may be signed
    signature: bytes | None = None  # of all of these, unverified
    signed_by: str | None = None  # the trusted signer's name, if it was read with a `Trust`

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    @property
    def bytes(self) -> int:
        """Size of the whole directory."""
        return folder_bytes(self.path)

    def check_fits(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        allow_different_base: bool = False,
        known: Mapping[str, Any] | None = None,
    ) -> tuple[str, ...]:
        """Check that the adapter was made for this base; `known` is the base's fingerprint, if it is known.

        Returns:
            the parts of the base's fingerprint that differ, which is only ever allowed with `allow_different_base`,
            and logged.

        Raises:
            AdapterError: naming every module that is missing or has another shape, and every part of the
                base's fingerprint that differs (allowed with `allow_different_base`).
        """
        problems, different = self.misfits(model, tokenizer, allow_different_base=allow_different_base, known=known)
        trained_on = self.manifest.get("base", {}).get("name") or self.config.get("base_model_name_or_path")
        if problems:
            refuse(
                f"the adapter {self.path} does not match this base (it was trained on {safe_repr(trained_on)})",
                problems,
                "Load the base that it was trained on, or train an adapter for this one",
            )
        if different:
            logger.warning(
                "UNSAFE: the adapter %s was trained on %s, and this base differs in its %s. It is attached, as "
                "different bases were allowed; nobody has measured what it forgets here, or what else it harms",
                self.path,
                safe_repr(trained_on),
                " and ".join(different),
            )
        return different

    def misfits(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        allow_different_base: bool = False,
        known: Mapping[str, Any] | None = None,
    ) -> tuple[list[str], tuple[str, ...]]:
        """Return what does not fit a base, and the parts in which its fingerprint differs; see `check_fits`."""
        problems = []
        for name, delta in self.deltas.items():
            module = submodule(model, name)
            weight = getattr(module, "weight", None)
            if module is None or weight is None or isinstance(module, nn.Embedding):
                what = "does not exist" if module is None else "is no linear layer"
                problems.append(f"module '{name}' {what} in the base")
                continue
            expected = (
                (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(weight.shape)
            )
            if not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D":
                expected = (weight.shape[1], weight.shape[0])
            found = (delta.up.shape[0], (delta.up if delta.down is None else delta.down).shape[1])
            if found != expected:
                problems.append(f"'{name}' has shape {expected} in the base, the adapter was made for {found}")
        noted = self.manifest.get("base", {}).get("fingerprint", {})
        different = tuple(mismatches(noted, known or fingerprint(model, tokenizer))) if noted else ()
        if not allow_different_base:
            problems += [f"the base's {part} is not the one that the adapter was trained on" for part in different]
        return problems, different
