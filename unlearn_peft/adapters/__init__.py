"""Kinds of adapter behind one small protocol: settings and a base in, a PEFT config out.

Everything after that (training, saving, loading) is PEFT's own machinery, the same for every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..recipe import HeadSettings, LoraSettings
from .head import head_config, knows_delta, with_delta
from .lora import lora_config

KINDS: dict[str, Callable[[Any, Any], Any]] = {"lora": lora_config, "head": head_config}


def adapter_config(model: Any, settings: LoraSettings | HeadSettings) -> Any:
    """Return the `peft.PeftConfig` that puts an adapter of these settings on `model`.

    Raises:
        AdapterError: if the settings do not fit the model, e.g. a target module that it does not have.
    """
    return KINDS[settings.kind](model, settings)


__all__ = ["KINDS", "adapter_config", "knows_delta", "with_delta"]
