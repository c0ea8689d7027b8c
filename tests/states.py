"""Everything about a base and this process that an operation could leave changed, to be compared before and after."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn


class _Same:
    """Equal only to the same object, which it keeps alive."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __repr__(self) -> str:
        return type(self.thing).__name__


def state_of(base: Any) -> dict[str, Any]:
    """Return the state of a `Base`, its model, its tokenizer and this process, by place."""
    state: dict[str, Any] = {}
    modules = dict(base.model.named_modules(remove_duplicate=False))
    state["modules"] = list(modules)
    for name, module in modules.items():
        state[f"class of {name}"] = _Same(type(module))
        _add(state, f"module {name}", vars(module))
    for name, value in vars(type(base.model)).items():
        state[f"class attribute {name}"] = _Same(value)
    for key in vars(base).keys() - {"model", "fingerprint"}:  # the latter is computed once
        state[f"base {key}"] = _Same(vars(base)[key])
    _add(state, "tokenizer", vars(base.tokenizer))
    state["tokenizer file"] = base.tokenizer.backend_tokenizer.to_str()
    return state | _process()


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return which places differ, and how."""
    places = dict.fromkeys([*before, *(place for place in after if not place.startswith("logger "))])
    none = object()
    return [
        f"{place}: {before.get(place, 'not there')!r} -> {after.get(place, 'not there')!r}"[:300]
        for place in places
        if before.get(place, none) != after.get(place, none)
    ]


def _add(state: dict[str, Any], place: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(data).hexdigest()
        state[place] = _Same(value), value.data_ptr(), value.dtype, value.shape, digest, _Same(value.grad_fn)
        state[f"{place} gradient"] = value.requires_grad, _Same(value.grad)
        _add(state, f"{place} attributes", vars(value), depth + 1)
    elif isinstance(value, nn.Module) or depth > 8:
        state[place] = _Same(value)
    elif isinstance(value, dict):
        state[place] = _Same(value), list(value)
        for key, inner in value.items():
            _add(state, f"{place}.{key}", inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        state[place] = len(value)
        for n, inner in enumerate(value):
            _add(state, f"{place}.{n}", inner, depth + 1)
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        state[place] = _Same(value)  # a config
        _add(state, f"{place} holds", vars(value), depth + 1)
    elif value is None or isinstance(value, (bool, int, float, str, set, frozenset, torch.dtype, torch.device)):
        state[place] = type(value), set(value) if isinstance(value, set) else value
    else:
        state[place] = _Same(value)


def _process() -> dict[str, Any]:
    import transformers

    loggers = [logging.getLogger(), *(x for x in logging.root.manager.loggerDict.values() if hasattr(x, "handlers"))]
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
                          torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                 torch.get_float32_matmul_precision()),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
                      torch.backends.cuda.mem_efficient_sdp_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "torch's random state": hashlib.sha256(torch.get_rng_state().numpy()).hexdigest(),
        "numpy's random state": str(np.random.get_state()),
        "Python's random state": random.getstate(),
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "warnings": list(warnings.filters),
        **{f"logger {x.name}": (x.level, x.disabled, x.propagate, [*map(_Same, x.handlers)]) for x in loggers},
        "transformers": transformers.logging.get_verbosity(),
    }  # fmt: skip
