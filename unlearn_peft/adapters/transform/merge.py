"""Several adapters into one (`stack`), or into the weights of a base model (`merge`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import AdapterError, OutputError
from ...files.atomic import atomic_folder
from ...models.base import Base
from ...models.layers import head_is_tied, is_transposed
from ..bundle import CONFIG, WEIGHTS
from ..card import write_card
from ..read import read_bundle
from ..trust import Trust
from ..validate import LORA
from ..write import new_bundle
from .low_rank import concatenated, in_order, parts_of, rank_config, weighted

logger = logging.getLogger(__name__)


def stack(
    adapters: Sequence[str | Path],
    output: str | Path,
    strengths: Sequence[float] | None = None,
    *,
    trust: Trust | None = None,
) -> Path:
    """Write one adapter whose effect is the exact sum of several LoRAs for one base: their ranks are concatenated.

    `strengths` are factors on their effects, 1 by default; for `trust` see `read_bundle`. The stack is not signed.

    Raises:
        AdapterError: if one is dense, or their bases differ.
    """
    pairs = in_order(weighted([read_bundle(path, trust=trust) for path in adapters], strengths))
    dense = [str(bundle.path) for bundle, _ in pairs if any(delta.rank is None for delta in bundle.deltas.values())]
    if dense:
        raise AdapterError(f"cannot stack a dense head: {', '.join(dense)}. Attach it beside the stack instead.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, parts in parts_of(pairs).items():
        up, down = concatenated(parts)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.to(down.dtype)  # the wider of the adapters' dtypes
        ranks[name] = down.shape[0]
    manifest = {
        "base": pairs[0][0].manifest.get("base", {}),
        "peft_type": LORA,
        "stack_of": [{"weights_sha256": bundle.digest, "strength": factor} for bundle, factor in pairs],
    }
    base = pairs[0][0].config.get("base_model_name_or_path")
    return write_derived(Path(output), tensors, manifest, ranks, base, rank_config(ranks))


def write_derived(
    output: Path,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    modules: Iterable[str],
    base: str | None,
    ranks: Mapping[str, Any],
) -> Path:
    """Write an adapter that was computed from others, with its card; `ranks` are its config's rank fields, if any."""
    config = {
        "peft_type": manifest["peft_type"], "task_type": "CAUSAL_LM", "inference_mode": True,
        "target_modules": sorted(modules), "base_model_name_or_path": base, **ranks,
    }  # fmt: skip
    manifest = {**manifest, "versions": {"unlearn-peft": version("unlearn-peft")}}
    with new_bundle(output, manifest) as folder:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_card(folder, manifest)
    return output


def merge(
    base: Base,
    adapters: Sequence[str | Path],
    output: str | Path,
    strengths: Sequence[float] | None = None,
    *,
    trust: Trust | None = None,
) -> Path:
    """Write the base with adapters added to its weights, as a plain model folder. Changes `base` itself.

    If a delta is on a tied `lm_head`, the head is untied first and a warning is logged: the delta must not reach the
    input embeddings. The folder then grows by the size of the head.

    Raises:
        AdapterError: if an adapter does not fit the base.
        OutputError: if the output folder is not empty.
    """
    output = Path(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise OutputError(f"the output {output} is not empty: expected a new folder for the merged model")
    if base.quantized:
        raise AdapterError("nothing can be merged into a quantised base: load it without quantize")
    pairs = weighted([read_bundle(path, trust=trust) for path in adapters], strengths, without_base=False)
    for bundle, _ in pairs:
        bundle.check_fits(base.model, base.tokenizer)
    modules = dict(base.model.named_modules())
    head = base.model.get_output_embeddings()
    if head_is_tied(base.model) and any(modules[name] is head for bundle, _ in pairs for name in bundle.deltas):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.model.config.tie_word_embeddings = False
        base.model._tied_weights_keys = {}
        if hasattr(base.model, "all_tied_weights_keys"):
            base.model.all_tied_weights_keys = {}
        logger.warning("lm_head was untied from the input embeddings: the merged model grows by its size")
    for bundle, factor in pairs:
        for name, delta in bundle.deltas.items():
            _add(modules[name], factor * delta.matrix())
    with atomic_folder(output) as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return output


@torch.no_grad()
def _add(module: Any, change: Tensor) -> None:
    if is_transposed(module):
        change = change.T
    elif not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise AdapterError(f"cannot merge into {type(module).__name__}: expected a base that is not quantised")
    weight = module.weight
    weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
