"""A base that no process holds as a whole while it trains: FSDP2 or DeepSpeed ZeRO-3, through Accelerate.

A base and an accelerator come in; a twin of the base goes out, whose layers the processes share out between them and
gather one by one as they run. Only the frozen base is shared out. Adapters go onto the twin afterwards and are whole on
each process, being small: their gradients, checkpoints and files are those of any other run. The base's own modules
are never wrapped, so that nothing has to be gathered to leave it as it was; it waits in main memory.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
from torch import nn

from ...errors import RecipeError
from ...models.base import Base

logger = logging.getLogger(__name__)
_HOW = {"FSDP": "recipes/accelerate/fsdp2.yaml", "DEEPSPEED": "recipes/accelerate/deepspeed_zero3.yaml"}


def runs_on_cpu(base: Base) -> bool:
    """Return whether training is to run on CPUs: where the base is, but for one that waits there to be shared out."""
    shared = _asked("FSDP") and torch.cuda.is_available() or _asked("DEEPSPEED")
    return base.device.type == "cpu" and not shared


def is_shared(accelerator: Any, base: Base) -> bool:
    """Return whether the launcher's settings share the base out.

    Raises:
        RecipeError: for settings that cannot be used, saying what to set instead.
    """
    way = str(accelerator.distributed_type.value)
    if way == "MULTI_CPU" and _asked("FSDP") and accelerator.is_main_process:
        logger.warning("Accelerate shares no base out between CPUs: each process holds all of it")
    if way == "MEGATRON_LM":
        raise RecipeError(f"Megatron-LM cannot train a forget adapter: launch with one of {', '.join(_HOW.values())}")
    if way not in _HOW:
        return False
    if accelerator.mixed_precision == "fp16":
        raise RecipeError("training in float16 loses small gradients: set mixed_precision: no, and dtype: bfloat16")
    if problem := _problem(way, accelerator.state):
        raise RecipeError(f"{problem} (see {_HOW[way]})")
    if base.quantized:
        raise RecipeError(f"a quantised base cannot be shared out by {way}: leave quantize out, or launch without it")
    return True


def share_out(accelerator: Any, base: Base) -> Any:
    """Return a twin of the base, shared out between the processes; adapters may go onto it.

    All processes must run it alike from now on: as often, forwards and backwards.
    """
    twin = _twin(base.model)
    if accelerator.distributed_type.value == "FSDP":
        unused = torch.optim.SGD(twin.parameters())  # Accelerate takes no model without an optimiser
        twin, _ = accelerator.prepare(twin, unused)
    else:
        import deepspeed

        needed = {
            "train_micro_batch_size_per_gpu": 1,  # unused, but must be there
            "bf16": {"enabled": base.model.dtype == torch.bfloat16},
        }
        # at once, weight by weight: what follows moves all that is not shared out yet to each device
        deepspeed.zero.Init(module=twin, config_dict_or_path={**needed, "zero_optimization": {"stage": 3}})
        accelerator.state.deepspeed_plugin.deepspeed_config.update(needed)
        twin = accelerator.prepare(twin).module
    if base.device.type != "cpu":
        base.model.to("cpu")
    return twin


def _asked(way: str) -> bool:
    """Return whether the launcher asks for a way to share the base out."""
    return os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"


def _problem(way: str, state: Any) -> str | None:
    if way == "FSDP":
        from torch.distributed.fsdp import CPUOffloadPolicy

        if state.fsdp_plugin.fsdp_version != 2:
            return f"FSDP version {state.fsdp_plugin.fsdp_version} is not supported: set fsdp_version: 2"
        if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            return "parameters cannot wait in main memory between steps: set fsdp_offload_params: false"
        if state.fsdp_plugin.activation_checkpointing:
            return (
                "fsdp_activation_checkpointing would rename the adapter's weights: set it to false, and "
                "gradient_checkpointing: true in the recipe"
            )
        return None
    if state.deepspeed_plugin.zero_stage != 3:
        return f"ZeRO stage {state.deepspeed_plugin.zero_stage} shares no frozen base out: set zero_stage: 3"
    if state.deepspeed_plugin.offload_param_device not in (None, "none"):
        return "parameters cannot wait in main memory between steps: set offload_param_device: none"
    return None


def _twin(model: nn.Module) -> Any:
    """Return a model of the same tensors in modules of its own."""
    own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, own)
