"""A set of adapters -> one LoRA that another engine loads. So far for vLLM.

vLLM applies one LoRA a request, so a set becomes one: ranks are concatenated, scalings and strengths folded in. That is
the exact sum while it stays within vLLM's rank limit; beyond it each module keeps its largest singular values, and the
relative error is told and noted in the manifest.

What vLLM does not check, or passes over in silence, is checked here: of a module that its model does not have it reads
the weights and applies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
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
from .low_rank import check_set, concatenated, in_order, parts_of, truncated
from .merge import write_made

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
    """What was written: the folder, its one rank, and what truncation left out."""

    path: Path
    rank: int
    errors: dict[str, float]  # of the truncated modules: Frobenius norm of what is missing / of the whole

    @property
    def worst(self) -> tuple[str, float] | None:
        """The module with the largest error; None: nothing was truncated, the sum is exact."""
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
    """Write one LoRA with the effect of a set of adapters, such that vLLM loads it and applies all of it.

    Every module gets the same rank, the largest that one needs: others are filled up with zeros, which changes nothing.

    Args:
        adapters: adapter directories for one base; dense heads are truncated to a low rank.
        output: the new adapter directory, written whole or not at all.
        strengths: factor on each one's effect; 1 each by default. What has strength 0 is left out.
        max_rank: what vLLM's --max-lora-rank says.
        base: the base as `load_base` takes it; only its config is read. With None, modules are not checked.
        dtype: of the weights; vLLM turns them into its own anyway.
        max_error: refuse to leave more than this out of any module (relative, Frobenius norm); None: no limit.
        trust: whose signatures are taken, and whether one is needed. None: signatures are not looked at.

    Raises:
        AdapterError: telling at once all that vLLM could not load, or would pass over.
        OutputError: if the output cannot be written.
    """
    bundles, factors = _checked(adapters, strengths, max_rank, base, dtype, trust)
    errors: dict[str, float] = {}
    factored: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parts in parts_of(bundles, factors).items():
        up, down = concatenated([(_low_rank(delta), factor) for delta, factor in parts])
        if down.shape[0] > max_rank:
            up, down, errors[name] = truncated(up, down, max_rank)
        factored[name] = up, down
    if max_error is not None and (over := {name: e for name, e in errors.items() if e > max_error}):
        worst = max(over, key=lambda name: over[name])
        raise AdapterError(
            f"rank {max_rank} is too small for this set: {len(over)} modules would lose more than {max_error:g} of "
            f"their change, '{worst}' {over[worst]:.3g} of it. Raise the rank (--max-rank here, --max-lora-rank of "
            "vLLM), or forget less at once."
        )
    rank = max(down.shape[0] for _, down in factored.values())
    tensors = {}
    for name, (up, down) in factored.items():
        empty = rank - down.shape[0]
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, empty)).to(DTYPES[dtype]).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(up, (0, empty)).to(DTYPES[dtype]).contiguous()
    if wild := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterError(f"'{wild[0]}' overflows in {dtype}: use --dtype float32 or bfloat16, or smaller strengths")
    config = _config(factored, rank, bundles[0].config.get("base_model_name_or_path"))
    made = Export(Path(output), rank, errors)
    manifest = _manifest(bundles, factors, made, max_rank, dtype)
    write_made(made.path, tensors, config, manifest)
    return made


def export_nothing(output: str | Path, base: str) -> Export:
    """Write a LoRA for vLLM that changes nothing, all zeros on one linear layer: the empty set, as a set.

    vLLM 0.32.0 gives a row without a LoRA that of the last place on CPUs (its PyTorch kernels take the index -1 as
    Python does), so that a row with nothing to forget needs a LoRA of its own.

    Args:
        output: see `export_vllm`.
        base: the same; it must be given.

    Raises:
        AdapterError: if vLLM takes no LoRA on this base.
        BaseModelError: if its config cannot be read.
        OutputError: if the output cannot be written.
    """
    model = skeleton(base)
    if problems := vllm_problems(model, {}):
        raise AdapterError(problems[0])
    head = model.get_output_embeddings()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head)
    sizes = {"A": (1, layer.in_features), "B": (layer.out_features, 1)}
    tensors = {f"base_model.model.{name}.lora_{side}.weight": torch.zeros(size) for side, size in sizes.items()}
    made = Export(Path(output), 1, {})
    write_made(made.path, tensors, _config([name], 1, base), _manifest([], [], made, 1, "float32"))
    return made


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
        if (rows := deltas[name].up.shape[0]) > LARGEST_HEAD
    ]


def _checked(
    adapters: Sequence[str | Path],
    strengths: Sequence[float] | None,
    max_rank: int,
    base: str | None,
    dtype: str,
    trust: Trust | None,
) -> tuple[list[Bundle], list[float]]:
    """Return the set in order of content, without what has strength 0, or tell all that is wrong with it."""
    problems = []
    if max_rank not in RANKS:
        problems.append(f"the rank limit is {max_rank}: vLLM's --max-lora-rank is one of {', '.join(map(str, RANKS))}")
    if dtype not in DTYPES:
        problems.append(f"unknown dtype '{dtype}': expected {', '.join(DTYPES)}")
    bundles = []
    for path in adapters:
        try:
            bundles.append(read_bundle(path, trust=trust))
        except AdapterError as error:
            problems.append(str(error))
    factors = [float(factor) for factor in strengths or [1.0] * len(adapters)]
    if len(bundles) == len(adapters):
        try:
            check_set(bundles, factors)
        except AdapterError as error:
            problems.append(str(error))
        if not problems and not any(factors):
            problems.append("every strength is 0: this is the base alone, ask vLLM for it by its own name")
    if base is not None:
        try:
            model = skeleton(base)
        except BaseModelError as error:
            problems.append(str(error))
        else:
            for bundle in bundles:
                try:
                    bundle.check_fits(model)
                except AdapterError as error:
                    problems.append(str(error))
                problems += [f"{bundle.path}: {problem}" for problem in vllm_problems(model, bundle.deltas)]
    if problems:
        lines = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in dict.fromkeys(problems))
        raise AdapterError(f"vLLM cannot serve this set:\n{lines}")
    bundles, factors = in_order(bundles, factors)
    pairs = [(bundle, factor) for bundle, factor in zip(bundles, factors, strict=True) if factor]
    return [bundle for bundle, _ in pairs], [factor for _, factor in pairs]


def _low_rank(delta: Delta) -> Delta:
    """A dense delta as a product: itself and the identity."""
    return delta if delta.down is not None else Delta(delta.up, torch.eye(delta.up.shape[1]), delta.scale)


def _config(modules: Iterable[str], rank: int, base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": rank, "lora_alpha": rank,
        "target_modules": sorted(modules), "bias": "none", "base_model_name_or_path": base,
    }  # fmt: skip


def _manifest(
    bundles: Sequence[Bundle], factors: Sequence[float], made: Export, max_rank: int, dtype: str
) -> dict[str, Any]:
    parts = [
        {"weights_sha256": bundle.digest, "identity": bundle.identity, "strength": factor}
        for bundle, factor in zip(bundles, factors, strict=True)
    ]
    worst = made.worst
    return {
        "base": bundles[0].manifest.get("base", {}) if bundles else {},
        "peft_type": "LORA",
        "stack_of": parts,
        "export": {
            "for": "vllm", "rank": made.rank, "max_rank": max_rank, "dtype": dtype,
            "relative_errors": made.errors, "worst": worst and {"module": worst[0], "relative_error": worst[1]},
        },
        "versions": {"unlearn-peft": version("unlearn-peft")},
    }  # fmt: skip
