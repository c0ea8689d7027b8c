"""Adapted decoder layers, compiled one by one (torch.compile), and as they were afterwards.

Layers come in; they run compiled until `restore`. Only their `forward` is compiled, so that hooks on a layer run as
before. What is compiled for one layer serves all others of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import RecipeError


def compile_layers(layers: Sequence[nn.Module], device: torch.device) -> list[nn.Module]:
    """Compile layers for batches of any size; returns them.

    Raises:
        RecipeError: if this machine cannot compile.
    """
    _try(device)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    return list(layers)


def restore(layers: Sequence[nn.Module]) -> None:
    """Let layers run as they did before they were compiled."""
    for layer in layers:
        layer.__dict__.pop("forward", None)


def _try(device: torch.device) -> None:
    """Compile next to nothing."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler behind it raises
        told = (str(error).strip().splitlines() or ["no details"])[0][:200]
        raise RecipeError(
            f"compile: true does not work on this machine ({type(error).__name__}: {told}). It needs a C++ compiler "
            "on CPUs and Triton with a C compiler on GPUs: install them, or set compile: false"
        ) from error
