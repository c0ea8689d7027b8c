"""How much memory keys and values may take, where nobody says it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...inference.model_runner import ModelRunner

_CGROUP = Path("/sys/fs/cgroup")  # a container's own limit, in cgroup v2


def context_of(config: Any) -> int:
    """Return how many tokens a model may read and write in one go."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)


def default_kv_bytes(runner: ModelRunner, max_batch: int) -> int:
    """Return what a full batch of the longest rows takes, but at most half of the memory that is free now."""
    needed = max_batch * context_of(runner.model.config) * runner.token_bytes
    return min(needed, free_bytes(runner.model.device) // 2)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that is free; of the machine's, as much as this container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # there is no such limit, or it is "max"
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - used, 0))
    return free
