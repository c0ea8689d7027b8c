"""A live model is left as it was found: what can be set on it is recorded, and put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put back, when a `with` block ends in any way, what was set on a model inside it, and torch's random state.

    Each module's attributes are put back (training flags, hooks, patched forward passes, modules and buffers that were
    replaced), what its configs hold, and which parameters have gradients. What tensors hold is not copied: nothing may
    write to it.
    """
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    contents = _contents(model)
    devices = {parameter.device for parameter, _, _ in gradients if parameter.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str), device_type=kind):
            yield
    finally:
        for container, before in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        for parameter, flag, gradient in gradients:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _contents(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return each dict, list and set that a model's modules and configs hold, as it is, with a copy of it."""
    from transformers import GenerationConfig, PreTrainedConfig

    found: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [module.__dict__ for module in model.modules()]
    for container in waiting:  # grows meanwhile
        if id(container) in found:
            continue
        found[id(container)] = container, copy.copy(container)
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, (GenerationConfig, PreTrainedConfig)):
                waiting.append(vars(value))
            elif isinstance(value, (dict, list, set)):
                waiting.append(value)
    return list(found.values())
