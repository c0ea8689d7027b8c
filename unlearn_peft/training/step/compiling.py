"""torch.compile for adapted decoder layers, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from ...errors import RecipeError
from ...models.layers import patched_forward


def compiled(layers: Sequence[nn.Module], device: torch.device) -> AbstractContextManager[None]:
    """Run layers compiled, for batches of any size, inside a `with` block.

    Only a layer's `forward` is compiled, so that hooks on it run as before, and layers of a kind share the code.

    Raises:
        RecipeError: if this machine cannot compile.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler behind it raises
        message = (str(error).strip().splitlines() or ["no details"])[0][:200]
        raise RecipeError(
            f"compile: true does not work on this machine ({type(error).__name__}: {message}). It needs a C++ compiler "
            "on CPUs and Triton with a C compiler on GPUs: install them, or set compile: false"
        ) from error
    return patched_forward({layer: torch.compile(layer.forward, dynamic=True) for layer in layers})
