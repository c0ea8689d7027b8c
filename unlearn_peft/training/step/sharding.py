"""A base sharded over processes while it trains: FSDP2 or DeepSpeed ZeRO-3, through Accelerate.

A base and an accelerator come in; a sharded twin of the base goes out, whose layers are gathered one by one as they
run. Adapters go onto the twin afterwards and are whole on each process, being small: their gradients, checkpoints and
files are those of any other run. The base's own modules are never wrapped, so that nothing has to be gathered to leave
it as it was; it waits in main memory.
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
_CONFIGS = {"FSDP": "recipes/accelerate/fsdp2.yaml", "DEEPSPEED": "recipes/accelerate/deepspeed_zero3.yaml"}


def runs_on_cpu(base: Base) -> bool:
    """Return whether training is to run on CPUs: where the base is, but for one that waits there to be sharded."""
    sharded = _requested("FSDP") and torch.cuda.is_available() or _requested("DEEPSPEED")
    return base.device.type == "cpu" and not sharded


def is_sharded(accelerator: Any, base: Base) -> bool:
    """Return whether the launcher's settings shard the base.

    Raises:
        RecipeError: for settings that cannot be used, saying what to set instead.
    """
    way = str(accelerator.distributed_type.value)
    if way == "MULTI_CPU" and _requested("FSDP") and accelerator.is_main_process:
        logger.warning("Accelerate shares no base out between CPUs: each process holds all of it")
    if way == "MEGATRON_LM":
        raise RecipeError(
            f"Megatron-LM cannot train a forget adapter: launch with one of {', '.join(_CONFIGS.values())}"
        )
    if way not in _CONFIGS:
        return False
    if accelerator.mixed_precision == "fp16":
        raise RecipeError("training in float16 loses small gradients: set mixed_precision: no, and dtype: bfloat16")
    if problem := _problem(way, accelerator.state):
        raise RecipeError(f"{problem} (see {_CONFIGS[way]})")
    if base.quantized:
        raise RecipeError(f"a quantised base cannot be sharded by {way}: leave quantize out, or launch without it")
    return True


def shard(accelerator: Any, base: Base) -> Any:
    """Return a twin of the base, sharded over the processes; adapters may go onto it.

    All processes must run it alike from now on: as often, forwards and backwards.
    """
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.model.parameters()}
    twin: Any = copy.deepcopy(base.model, parameters)  # the same tensors in modules of its own
    if accelerator.distributed_type.value == "FSDP":
        unused = torch.optim.SGD(twin.parameters())  # Accelerate takes no model without an optimiser
        twin, _ = accelerator.prepare(twin, unused)
    else:
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 1,  # unused, but must be there
            "bf16": {"enabled": base.model.dtype == torch.bfloat16},
        }
        # at once, weight by weight: what follows moves all that is not sharded yet to each device
        deepspeed.zero.Init(module=twin, config_dict_or_path={**settings, "zero_optimization": {"stage": 3}})
        accelerator.state.deepspeed_plugin.deepspeed_config.update(settings)
        twin = accelerator.prepare(twin).module
    if base.device.type != "cpu":
        base.model.to("cpu")
    return twin


def _requested(way: str) -> bool:
    """Return whether the launcher asks for a way to shard the base."""
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
        return f"ZeRO stage {state.deepspeed_plugin.zero_stage} does not shard a frozen base: set zero_stage: 3"
    if state.deepspeed_plugin.offload_param_device not in (None, "none"):
        return "parameters cannot wait in main memory between steps: set offload_param_device: none"
    return None
