"""An adapter directory: PEFT's two files, a manifest and a card. Read as untrusted, written whole or not at all.

`read_bundle` checks everything that can be checked without a base; `Bundle.check_fits` the rest, against a live
model. Both tell all that is wrong at once, before anything is attached.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .adapter_config import DENSE, SCHEMA_VERSION, check_config, check_manifest, of_module
from .base import fingerprint, mismatches
from .errors import AdapterError, OutputError, refuse, shown
from .files import folder_bytes, whole_file, whole_folder
from .layers import submodule
from .packed import floats
from .trust import SIGNATURE, UNSIGNED, Trust
from .untrusted import LARGEST, Weights, list_files, read_file, read_weights, sha256_of, sha256_of_stream, strict_json

WEIGHTS, CONFIG, MANIFEST, CARD, CURVES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "forget.json",
    "README.md",
    "curves.png",
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_COPY_AGAIN = "Copy it again from where it came from, or ask who made it"
logger = logging.getLogger(__name__)
T = TypeVar("T")


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
                f"the adapter {self.path} does not match this base (it was trained on {shown(trained_on)})",
                problems,
                "Load the base that it was trained on, or train an adapter for this one",
            )
        if different:
            logger.warning(
                "UNSAFE: the adapter %s was trained on %s, and this base differs in its %s. It is attached, as "
                "different bases were allowed; nobody has measured what it forgets here, or what else it harms",
                self.path,
                shown(trained_on),
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


def read_bundle(
    path: str | Path, *, trust: Trust | None = None, also: Callable[[Bundle], Sequence[str]] | None = None
) -> Bundle:
    """Read and check an adapter directory: safetensors only, sizes before allocation, all mismatches at once.

    Any LoRA that PEFT wrote will do; a `forget.json` is not needed, but where there is one its digests must hold.
    Each file is read once, and what was checked is what is used, whatever happens to the files meanwhile.

    Args:
        path: the directory.
        trust: whose signatures are taken, and whether one is needed. None: signatures are not looked at.
        also: called where something is wrong, with as much of the adapter as could be read; returns what else is.

    Raises:
        AdapterError: naming everything that is wrong with it.
    """
    path = Path(path)
    names = list_files(path)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if WEIGHTS not in names:
        if pickles:
            raise AdapterError(
                f"{path} holds {', '.join(map(shown, pickles[:3]))}: a pickle can run code when it is read, and is "
                f"refused. Expected {WEIGHTS}: save it again with PEFT's save_pretrained."
            )
        raise AdapterError(f"{path} holds no {WEIGHTS}: expected an adapter as `unlearn-peft train` or PEFT writes it")
    problems = [
        f"{shown(name)} lies beside {WEIGHTS}: a pickle that other programs may read instead, and that can run code"
        for name in pickles
        if name.startswith("adapter_model")
    ]
    files: dict[str, str] = {}
    deltas: dict[str, Delta] = {}
    try:
        weights = read_weights(path / WEIGHTS, problems)
    except AdapterError as error:
        problems.append(str(error))
        weights = Weights({}, "unread")
    files[WEIGHTS] = weights.sha256
    config = _json(path / CONFIG, files, problems)
    manifest = _json(path / MANIFEST, files, problems) if MANIFEST in names else None
    if config is not None:
        problems += (wrong := check_config(config))
        if weights.tensors and not wrong:
            deltas = _deltas(config, weights.tensors, problems)
    if manifest is not None and (wrong := check_manifest(manifest)):
        problems, manifest = problems + wrong, None
    manifest = manifest or {}
    problems += [
        f"{name} is not the file that was saved (its sha256 differs from the one in {MANIFEST}): changed or damaged"
        for name, noted in manifest.get("files", {}).items()
        if name in (WEIGHTS, CONFIG) and files.get(name, noted) != noted
    ]
    signature = signed_by = None
    if SIGNATURE in names:
        signature = _beside(path / SIGNATURE, read_file, problems)
        for name in names:
            if name not in files and name not in UNSIGNED:
                files[name] = _beside(path / name, sha256_of, problems if trust else []) or "unread"
    if trust is not None:
        untrusted, signed_by = trust.problems(files, signature)
        problems += untrusted
    identity = identity_of(files[WEIGHTS], files.get(CONFIG))
    bundle = Bundle(path, config or {}, deltas, manifest, files[WEIGHTS], identity, files, signature, signed_by)
    if problems:
        refuse(f"the adapter {path} is refused", [*problems, *(also(bundle) if also else ())], _COPY_AGAIN)
    return bundle


@contextmanager
def new_bundle(path: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to put an adapter's files into; it becomes `path`, whole, with its manifest.

    Raises:
        OutputError: if `path` holds something else than an adapter, or cannot be written.
    """
    check_output(path)
    with whole_folder(path, replace=True) as folder:
        yield folder
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest, "files": files}, indent=2, sort_keys=True)
        (folder / MANIFEST).write_text(text + "\n")


def note_digest(path: Path, name: str) -> None:
    """Note in an adapter's manifest, if it has one, that a file beside the weights and config was changed on purpose.

    Raises:
        AdapterError: if the manifest cannot be read.
        OutputError: if it cannot be written.
    """
    if (path / SIGNATURE).exists():
        logger.warning("%s was changed, so the signature of %s no longer holds: sign it again", name, path)
    if not (path / MANIFEST).is_file():
        return
    problems: list[str] = []
    manifest = _json(path / MANIFEST, {}, problems) or {}
    if problems := problems or check_manifest(manifest):
        refuse(f"the adapter {path} is refused", problems)
    manifest["files"] = {**manifest.get("files", {}), name: sha256(path / name)}
    with whole_file(path / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def check_output(path: Path) -> None:
    """Refuse to write an adapter over something that is none.

    Raises:
        OutputError: saying what lies there.
    """
    if path.is_file():
        raise OutputError(f"the output {path} is a file: choose a new folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        some = ", ".join(sorted(file.name for file in path.iterdir())[:3])
        raise OutputError(
            f"the output folder {path} holds something else ({some} ...): expected a new or empty folder, or an "
            "earlier adapter to replace. Choose another with --output."
        )


def identity_of(weights: str, config: str | None) -> str:
    """Return `Bundle.identity` from the sha256 of the two files."""
    return hashlib.sha256(f"{weights} {config}".encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return sha256_of_stream(stream)


def _json(path: Path, files: dict[str, str], problems: list[str]) -> dict[str, Any] | None:
    """Read a JSON file, and note its sha256 in `files`; what is wrong with it goes to `problems`."""
    try:
        data = read_file(path)
        files[path.name] = hashlib.sha256(data).hexdigest()
        return strict_json(data)
    except AdapterError as error:
        problems.append(str(error))
    except ValueError as error:
        problems.append(f"{path.name} is not readable JSON ({error})")
    return None


def _beside(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    try:
        return read(path)
    except AdapterError as error:
        problems.append(str(error))
    return None


def _deltas(config: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Delta]:
    tensors = floats(config["peft_type"], tensors, problems)
    if not config["peft_type"].startswith(DENSE):
        return _lora_deltas(config, tensors, problems)
    deltas = {}
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight").removesuffix(".dense_head_delta").removeprefix("base_model.model.")
        if tensor.dim() != 2 or not key.removesuffix(".weight").endswith(".dense_head_delta"):
            problems.append(f"tensor '{key}' is no dense delta of two dimensions")
        deltas[module] = Delta(tensor, None)
    if len(deltas) < len(tensors):
        problems.append("two tensors are for the same module")
    return deltas


def _lora_deltas(config: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Delta]:
    deltas = {}
    for key in sorted(tensors):
        if key.endswith(".lora_B.weight"):
            if key.removesuffix(".lora_B.weight") + ".lora_A.weight" not in tensors:
                problems.append(f"'{key}' has no lora_A beside it")
            continue
        if not key.endswith(".lora_A.weight"):
            problems.append(f"tensor '{key}' is no LoRA weight")
            continue
        stem, down = key.removesuffix(".lora_A.weight"), tensors[key]
        module, up = stem.removeprefix("base_model.model."), tensors.get(stem + ".lora_B.weight")
        if up is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape) if up is not None else None}"
            problems.append(f"'{module}': lora_A and lora_B have shapes {shapes}, expected (r, in) and (out, r)")
            continue
        if up.dtype != down.dtype:
            problems.append(f"'{module}': lora_A is {down.dtype}, lora_B {up.dtype}, expected one dtype")
        expected = of_module(config.get("rank_pattern"), module, config.get("r", 8))
        if down.shape[0] != expected:
            problems.append(f"'{module}' has rank {down.shape[0]}, its config says {expected}")
        alpha = float(of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        scale = alpha / (down.shape[0] ** 0.5 if config.get("use_rslora") else down.shape[0])
        if abs(scale) > LARGEST:
            problems.append(f"'{module}' is scaled by {scale:.3g}, expected at most {LARGEST:g}: see its lora_alpha")
        if module in deltas:
            problems.append(f"two tensors are for the module '{module}'")
        deltas[module] = Delta(up, down, scale)
    return deltas
