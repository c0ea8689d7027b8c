"""Adapters into one file (`stack`), or into a base of their own (`merge`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import AdapterError, OutputError
from ...files.atomic import atomic_folder
from ...models.base import Base
from ...models.layers import head_is_tied
from ..bundle import CONFIG, WEIGHTS
from ..card import write_card
from ..read import read_bundle
from ..trust import Trust
from ..write import new_bundle
from .low_rank import check_set, concatenated, in_order, parts_of, scaled_by_one

logger = logging.getLogger(__name__)


def stack(
    adapters: Sequence[str | Path],
    output: str | Path,
    strengths: Sequence[float] | None = None,
    *,
    trust: Trust | None = None,
) -> Path:
    """Write one adapter whose effect is the exact sum of several: their ranks are concatenated.

    Args:
        adapters: LoRA adapter directories (`lora` and low-rank `head` mix freely) for the same base.
        output: the new adapter directory.
        strengths: factor on each one's effect; 1 each by default.
        trust: whose signatures are taken, and whether one is needed. The stack itself is not signed.

    Raises:
        AdapterError: if one is dense, or their bases differ.
    """
    bundles = [read_bundle(path, trust=trust) for path in adapters]
    check_set(bundles, factors := list(strengths or [1.0] * len(bundles)))
    bundles, factors = in_order(bundles, factors)
    dense = [str(bundle.path) for bundle in bundles if any(delta.down is None for delta in bundle.deltas.values())]
    if dense:
        raise AdapterError(
            f"cannot stack a dense head into one LoRA: {', '.join(dense)}. Attach it beside the stack instead."
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, parts in parts_of(bundles, factors).items():
        up, down = concatenated(parts)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.to(parts[0][0].up.dtype).contiguous()
        ranks[name] = down.shape[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "target_modules": sorted(ranks),
        "base_model_name_or_path": bundles[0].config.get("base_model_name_or_path"), **scaled_by_one(ranks),
    }  # fmt: skip
    manifest = {
        "base": bundles[0].manifest.get("base", {}),
        "peft_type": "LORA",
        "stack_of": [{"weights_sha256": b.digest, "strength": f} for b, f in zip(bundles, factors, strict=True)],
        "versions": {"unlearn-peft": version("unlearn-peft")},
    }
    write_made(Path(output), tensors, config, manifest)
    return Path(output)


def write_made(
    output: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Write an adapter that was made from others, with its card, whole or not at all.

    Raises:
        OutputError: if `output` holds something else than an adapter, or cannot be written.
    """
    with new_bundle(output, manifest) as folder:
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_card(folder, manifest)


def merge(
    base: Base,
    adapters: Sequence[str | Path],
    output: str | Path,
    strengths: Sequence[float] | None = None,
    *,
    trust: Trust | None = None,
) -> Path:
    """Write the base with adapters added to its weights, as a plain model folder. `base` itself is changed: load anew.

    Where a delta meets a tied `lm_head`, the head is untied first (and this is logged): the delta must not
    reach the input embeddings. The folder then grows by the size of the head.

    Raises:
        AdapterError: if an adapter does not fit the base.
        OutputError: if the output folder is not empty.
    """
    output = Path(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise OutputError(f"the output {output} is not empty: expected a new folder for the merged model")
    if base.quantized:
        raise AdapterError("nothing can be merged into a quantised base: load it without quantize")
    bundles = [read_bundle(path, trust=trust) for path in adapters]
    for bundle in bundles:
        bundle.check_fits(base.model, base.tokenizer)
    modules = dict(base.model.named_modules())
    head = base.model.get_output_embeddings()
    if head_is_tied(base.model) and any(modules[name] is head for bundle in bundles for name in bundle.deltas):
        untie(base.model)
        logger.warning(
            "lm_head was tied to the input embeddings: it is untied in the merged model, which grows by its size"
        )
    for bundle, factor in zip(bundles, strengths or [1.0] * len(bundles), strict=True):
        for name, delta in bundle.deltas.items():
            up = delta.up.float()
            change = factor * (up if delta.down is None else delta.scale * up @ delta.down.float())
            _add(modules[name], change)
    with atomic_folder(output) as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return output


def untie(model: Any) -> None:
    """Give `lm_head` a weight of its own, equal to the one that it shared with the embeddings."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = {}
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


@torch.no_grad()
def _add(module: Any, change: Tensor) -> None:
    if type(module).__name__ == "Conv1D":
        change = change.T
    elif not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise AdapterError(f"cannot merge into {type(module).__name__}: expected a base that is not quantised")
    weight = module.weight
    weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
