"""A set of adapters -> one LoRA for vLLM, which applies one LoRA to a request.

Ranks are concatenated, scalings and strengths folded in: the exact sum while it stays within vLLM's rank limit. Beyond
it each module keeps its largest singular values, and the manifest says what that loses. vLLM silently ignores weights
for a module that its model does not have, so module names and shapes are checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError, BaseModelError
from ...files.atomic import folder_bytes
from ...models.base import DTYPES, skeleton
from ..bundle import Bundle, Delta
from ..read import read_bundle
from ..trust import Trust
from ..validate import LORA
from .low_rank import concatenated, in_order, parts_of, truncated, weighted
from .merge import write_derived

# From vLLM 0.32.0: MaxLoRARanks in vllm/config/lora.py, the limit in vllm/lora/layers/logits_processor.py, and of the
# classes in vllm/model_executor/models/registry.py those with `lm_head` among their `embedding_modules`, and those
# without SupportsLoRA. A class in neither list takes LoRA on its layers and not on its head.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LARGEST_HEAD = 258_048  # tokens
TAKES_HEAD = frozenset(
    "Apertus Deci Ernie4_5 Exaone Exaone4 ExaoneMoe FalconH1 Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared "
    "HyperCLOVAX InternLM3 Jamba LLaMA Lfm2 Lfm2Moe Llama Llama4 MiniCPM MiniCPM3 Mixtral Nemotron NemotronH Phi3 "
    "PhiMoE Qwen3 Qwen3Moe Qwen3_5 Qwen3_5Moe Solar TeleChat2 TeleChat3 TeleFLM".split()
)
TAKES_NO_LORA = frozenset(
    "Bloom Cohere2Moe Dbrx DeepseekV32 DeepseekV4 Falcon FalconMamba GPT2 GPTJ Gemma3n KimiLinear Mamba Mamba2 MiMoV2 "
    "Orion StableLm Step1 Zamba2".split()
)


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its one rank, and for each truncated module the `lost_share`."""

    path: Path
    rank: int
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float] | None:
        """The module with the largest error; None: nothing was truncated, and the sum is exact."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None

    @property
    def bytes(self) -> int:
        """Size of the folder."""
        return folder_bytes(self.path)


def export_vllm(
    adapters: Sequence[str | Path],
    output: str | Path,
    strengths: Sequence[float] | None = None,
    *,
    max_rank: int = 64,
    base: str | None = None,
    dtype: str = "float32",
    max_error: float | None = None,
    trust: Trust | None = None,
) -> Export:
    """Write one LoRA with the effect of a set of adapters, so that vLLM loads it and applies all of it.

    Every module gets the largest rank that one needs; the others are padded with zeros, which changes nothing.

    Args:
        adapters: directories, for one base; dense heads are truncated to a low rank.
        output: the new directory, written whole or not at all.
        strengths: factor on each one's effect, 1 by default; those of strength 0 are left out.
        max_rank: vLLM's --max-lora-rank.
        base: as `load_base` takes it; only its config is read. With None, modules are not checked.
        dtype: of the weights; vLLM converts them to its own anyway.
        max_error: the largest share that a module may lose; None: no limit.
        trust: see `read_bundle`.

    Raises:
        AdapterError: naming all problems at once that vLLM would have, or would ignore.
        OutputError: if the output cannot be written.
    """
    pairs = _checked(adapters, strengths, max_rank, base, dtype, trust)
    errors: dict[str, float] = {}
    factored: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parts in parts_of(pairs).items():
        up, down = concatenated(parts)
        if down.shape[0] > max_rank:
            up, down, errors[name] = truncated(up, down, max_rank)
        factored[name] = up, down
    if max_error is not None and (over := {name: e for name, e in errors.items() if e > max_error}):
        worst = max(over, key=over.__getitem__)
        raise AdapterError(
            f"rank {max_rank} is too small for this set: {len(over)} modules would lose more than {max_error:g} of "
            f"their change, '{worst}' {over[worst]:.3g} of it. Raise the rank (--max-rank here, --max-lora-rank of "
            "vLLM), or forget less at once."
        )
    stack_of = [
        {"weights_sha256": bundle.digest, "identity": bundle.identity, "strength": factor} for bundle, factor in pairs
    ]
    manifest = {"base": pairs[0][0].manifest.get("base", {}), "stack_of": stack_of}
    trained_on = pairs[0][0].config.get("base_model_name_or_path")
    return _write(Path(output), factored, errors, max_rank, dtype, trained_on, manifest)


def export_nothing(output: str | Path, base: str) -> Export:
    """Write a LoRA for vLLM that changes nothing, zeros on one linear layer: it stands for the empty set of adapters.

    On CPUs vLLM 0.32.0 gives a row without a LoRA the last loaded one (its PyTorch kernels take the index -1 as Python
    does), so that a row with nothing to forget needs a LoRA, too. An AdapterError says if vLLM takes none on this base.
    """
    model = skeleton(base)
    if problems := vllm_problems(model, {}):
        raise AdapterError(problems[0])
    head = model.get_output_embeddings()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head)
    zeros = torch.zeros(layer.out_features, 1), torch.zeros(1, layer.in_features)
    return _write(Path(output), {name: zeros}, {}, 1, "float32", base, {"base": {}, "stack_of": []})


def vllm_problems(model: Any, deltas: Mapping[str, Delta]) -> list[str]:
    """Return what vLLM's class for this model cannot do with these deltas; `model` may be a skeleton."""
    architecture = type(model).__name__
    family = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if family in TAKES_NO_LORA:
        return [f"vLLM serves {architecture} without LoRA"]
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head and name in deltas]
    if names and family not in TAKES_HEAD:
        return [f"vLLM takes no LoRA on '{names[0]}' of {architecture}: adapt decoder layers (adapter: lora) instead"]
    return [
        f"'{name}' has {rows} tokens, vLLM takes a LoRA on at most {LARGEST_HEAD}"
        for name in names
        if (rows := deltas[name].shape[0]) > LARGEST_HEAD
    ]


def _checked(
    adapters: Sequence[str | Path], strengths: Sequence[float] | None, max_rank: int, base: str | None, dtype: str,
    trust: Trust | None,
) -> list[tuple[Bundle, float]]:  # fmt: skip
    """Return the set sorted by content, without what has strength 0, or raise all problems at once."""
    problems: list[str] = []
    if max_rank not in RANKS:
        problems.append(f"the rank limit is {max_rank}: vLLM's --max-lora-rank is one of {', '.join(map(str, RANKS))}")
    if dtype not in DTYPES:
        problems.append(f"unknown dtype '{dtype}': expected {', '.join(DTYPES)}")
    bundles: list[Bundle] = []
    pairs: list[tuple[Bundle, float]] = []
    for path in adapters:
        with _added_to(problems):
            bundles.append(read_bundle(path, trust=trust))
    if len(bundles) == len(adapters):
        with _added_to(problems):
            pairs = weighted(bundles, strengths, without_base=base is None)
        if not problems and not any(factor for _, factor in pairs):
            problems.append("every strength is 0: this is the base alone, ask vLLM for it by its own name")
    if base is not None:
        with _added_to(problems):
            model = skeleton(base)
            for bundle in bundles:
                with _added_to(problems):
                    bundle.check_fits(model)
                problems += [f"{bundle.path}: {problem}" for problem in vllm_problems(model, bundle.deltas)]
    if problems:
        lines = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in dict.fromkeys(problems))
        raise AdapterError(f"vLLM cannot serve this set:\n{lines}")
    return in_order(pair for pair in pairs if pair[1])


@contextmanager
def _added_to(problems: list[str]) -> Iterator[None]:
    """Add an error's text to `problems` instead of raising it."""
    try:
        yield
    except (AdapterError, BaseModelError) as error:
        problems.append(str(error))


def _write(
    output: Path, factored: Mapping[str, tuple[Tensor, Tensor]], errors: dict[str, float], max_rank: int, dtype: str,
    base: str | None, manifest: Mapping[str, Any],
) -> Export:  # fmt: skip
    """Write a LoRA from `up (out, r)` and `down (r, in)` by module name, all padded to the largest r."""
    rank = max(down.shape[0] for _, down in factored.values())
    tensors = {}
    for name, (up, down) in factored.items():
        padding, key = rank - down.shape[0], f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, padding)).to(DTYPES[dtype])
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(up, (0, padding)).to(DTYPES[dtype])
    if wild := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterError(f"'{wild[0]}' overflows in {dtype}: use --dtype float32 or bfloat16, or smaller strengths")
    result = Export(output, rank, errors)
    details = {
        "for": "vllm", "rank": rank, "max_rank": max_rank, "dtype": dtype, "relative_errors": errors,
        "worst": result.worst and dict(zip(("module", "relative_error"), result.worst, strict=True)),
    }  # fmt: skip
    manifest = {**manifest, "peft_type": LORA, "export": details}
    write_derived(output, tensors, manifest, factored, base, {"r": rank, "lora_alpha": rank, "bias": "none"})
    return result
