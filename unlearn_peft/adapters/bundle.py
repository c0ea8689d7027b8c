"""A LoRA or dense adapter in memory (`Bundle`), and whether it fits a base model. `read.py` makes it from a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from ..errors import refuse, safe_repr
from ..files.atomic import folder_bytes
from ..files.weights import TensorDigest
from ..models.fingerprint import fingerprint, mismatches
from ..models.layers import is_transposed, submodule
from .names import weight_name
from .quantized import PackedMatrix

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "forget.json"
CARD, CURVES = "README.md", "curves.png"
_UNCOMPARED = "nothing here can say whether they are as the base has them, or were trained"
_LEAVE_OUT = "Save it again with PEFT's save_pretrained(..., save_embedding_layers=False)"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear layer's weight: `scale * up @ down`, or a dense `up` alone."""

    up: Tensor  # (out, r); dense: (out, in)
    down: Tensor | None  # (r, in)
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """The rank, or None where the delta is dense."""
        return None if self.down is None else self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight that it is added to."""
        return self.up.shape[0], (self.up if self.down is None else self.down).shape[1]

    def matrix(self) -> Tensor:
        """Return the whole delta (out, in), multiplied out in float32."""
        up, down = self.up.float(), self.down
        return up * self.scale if down is None else (self.scale * up) @ down.float()


class PackedDelta(Delta):
    """A delta that stays packed: `up` and `down` are unpacked each time that they are read."""

    def __init__(self, up: PackedMatrix, down: PackedMatrix | None, scale: float = 1.0) -> None:
        for name, value in (("_up", up), ("_down", down), ("scale", scale)):
            object.__setattr__(self, name, value)

    _up: PackedMatrix
    _down: PackedMatrix | None

    @property
    def up(self) -> Tensor:
        """See `Delta`; a new tensor in float32."""
        return self._up.unpack()

    @property
    def down(self) -> Tensor | None:
        """See `Delta`; a new tensor in float32."""
        return None if self._down is None else self._down.unpack()

    @property
    def rank(self) -> int | None:
        """See `Delta`."""
        return None if self._down is None else self._down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """See `Delta`."""
        return self._up.shape[0], (self._down or self._up).shape[1]


@dataclass(frozen=True)
class Bundle:
    """An adapter read from disk: its deltas by module name, its PEFT config, its manifest (empty if it has none)."""

    path: Path
    config: dict[str, Any]
    deltas: dict[str, Delta]
    manifest: dict[str, Any]
    digest: str  # sha256 of the weights file
    identity: str  # sha256 over weights file and config: equal if and only if the effect is the same
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 of each file as it was read
    signature: bytes | None = None  # covers `files`; not verified
    signed_by: str | None = None  # the trusted signer's name, if it was read with a `Trust`
    base_weights: Mapping[str, TensorDigest] = field(default_factory=dict)  # what its file has of a base, by its name

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    @property
    def prompt_format(self) -> str | None:
        """How it was trained to be asked, see `data.prompt`; None: by the base's template or the default."""
        return prompt_format_of(self.manifest)

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
        """Check that the adapter was made for this base; `known` is the base's fingerprint, where it was taken before.

        Returns:
            the parts of the base's fingerprint that differ: none without `allow_different_base`, which logs them.

        Raises:
            AdapterError: naming every module that is missing or has another shape, and every part of the
                fingerprint that differs.
        """
        problems, different = self.misfits(model, tokenizer, allow_different_base, known)
        if problems:
            self.refuse_for_base(problems)
        if different:
            logger.warning(
                "UNSAFE: the adapter %s was trained on %s, and this base differs in its %s. It is attached, because "
                "different bases were allowed. What it forgets here, and what else it harms, was never measured",
                self.path,
                self._trained_on,
                " and ".join(different),
            )
        if self.base_weights:
            logger.info("the adapter %s %s: equal to this base's, and left out", self.path, self.carried)
        return different

    def refuse_for_base(self, problems: Sequence[str]) -> NoReturn:
        """Raise an AdapterError that says why the adapter does not match a base."""
        refuse(
            f"the adapter {self.path} does not match this base (it was trained on {self._trained_on})",
            problems,
            "Load the base that it was trained on, or train an adapter for this one",
        )

    @property
    def _trained_on(self) -> str:
        return safe_repr(self.manifest.get("base", {}).get("name") or self.config.get("base_model_name_or_path"))

    @property
    def carried(self) -> str:
        """What its file holds of a base, in words."""
        names = list(dict.fromkeys(map(weight_name, self.base_weights)))
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        return f"carries {len(names)} base weight{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"

    def check_without_base(self) -> None:
        """Refuse weights of a base where there is no base to compare them with.

        Raises:
            AdapterError: if the adapter's file holds any.
        """
        if self.base_weights:
            refuse(f"the adapter {self.path} {self.carried}", [_UNCOMPARED], _LEAVE_OUT)

    def misfits(
        self, model: Any, tokenizer: Any | None, allow_different_base: bool, known: Mapping[str, Any] | None
    ) -> tuple[list[str], tuple[str, ...]]:
        """Return the problems that `check_fits` would raise, and what it would return."""
        problems = misplaced(model, self.deltas)
        noted = self.manifest.get("base", {}).get("fingerprint", {})
        different = tuple(mismatches(noted, known or fingerprint(model, tokenizer))) if noted else ()
        if not allow_different_base:
            problems += [f"the base's {part} is not the one that the adapter was trained on" for part in different]
        problems += filter(None, (_unlike(model, key, kept) for key, kept in self.base_weights.items()))
        return problems, different


def misplaced(model: Any, deltas: Mapping[str, Delta]) -> list[str]:
    """Return which deltas a base has no place for, by their shapes alone."""
    problems = []
    for name, delta in deltas.items():
        module = submodule(model, name)
        weight = getattr(module, "weight", None)
        if module is None or weight is None or isinstance(module, nn.Embedding):
            what = "does not exist" if module is None else "is no linear layer"
            problems.append(f"module '{name}' {what} in the base")
            continue
        if isinstance(module, nn.Linear):  # a quantised one stores its weight in another shape
            expected = module.out_features, module.in_features
        else:
            expected = tuple(weight.T.shape if is_transposed(module) else weight.shape)
        if delta.shape != expected:
            problems.append(f"'{name}' has shape {expected} in the base, the adapter was made for {delta.shape}")
    return problems


def prompt_format_of(manifest: Mapping[str, Any]) -> str | None:
    """Return the prompt format that a manifest records; None: it was asked by the base's template or the default."""
    recipe = manifest.get("recipe")
    text = recipe.get("prompt_format") if isinstance(recipe, dict) else None
    return text if isinstance(text, str) else None


def _unlike(model: Any, key: str, kept: TensorDigest) -> str | None:
    """Say why a copy of a base weight cannot be left out; None if it is what the base has."""
    name = weight_name(key)
    module, _, last = name.rpartition(".")
    weight = getattr(submodule(model, module) if module else model, last, None)
    if not isinstance(weight, Tensor):
        return f"it holds '{key}', which is no LoRA, and no weight of this base"
    comparable = not weight.is_meta and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not comparable or not kept.dtype.is_floating_point:
        return f"it holds '{key}', and it or '{name}' of this base is quantised or not loaded. {_LEAVE_OUT}"
    if tuple(weight.shape) != kept.shape:
        return (
            f"it holds '{key}' of shape {kept.shape}, '{name}' of this base has {tuple(weight.shape)}: load the base "
            "as it was trained on, with as many tokens"
        )
    if not kept.equals(weight):
        return f"it holds '{key}', which was trained, or is of another base: it differs from '{name}' of this base"
    return None
