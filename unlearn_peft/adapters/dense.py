"""A dense delta on a linear layer, `y = W x + D x`, as a PEFT method of its own: `DENSE_HEAD`.

Importing this file registers the method, after which PEFT's own saving and loading work for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

METHOD = "DENSE_HEAD"
PREFIX = "dense_head_"


def _add_peft_type() -> None:
    """PEFT's table of methods is a closed enum; its documentation asks third parties to add their entry."""
    member = str.__new__(PeftType, METHOD)
    member._name_, member._value_ = METHOD, METHOD
    type.__setattr__(PeftType, METHOD, member)  # from Python 3.12 on, members are found as attributes
    PeftType._member_names_.append(METHOD)
    PeftType._member_map_[METHOD] = member
    PeftType._value2member_map_[METHOD] = member


@dataclass
class DenseHeadConfig(PeftConfig):  # type: ignore[misc]
    """Config of a dense delta. `target_modules`: names of the linear layers that get one."""

    target_modules: list[str] | None = field(default=None)
    layers_to_transform: None = field(default=None)
    layers_pattern: None = field(default=None)
    exclude_modules: None = field(default=None)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD]


class DenseHeadLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear layer with one dense delta for each adapter."""

    adapter_layer_names = ("dense_head_delta",)
    base_layer: Any
    active_adapters: Any
    set_adapter: Any
    get_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dense_head_delta = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str) -> None:
        """Add a delta of zeros, (out, in), for `adapter_name`."""
        base, weight = self.base_layer, self.base_layer.weight  # which may be shared out: its own shape is no guide
        delta = torch.zeros(base.out_features, base.in_features, dtype=weight.dtype, device=weight.device)
        self.dense_head_delta[adapter_name] = nn.Parameter(delta)
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the delta, (out, in)."""
        return self.dense_head_delta[adapter_name]  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active deltas to the base layer's weight (which must not be shared with the embeddings)."""
        for name in adapter_names or self.active_adapters:
            if name in self.dense_head_delta and name not in self.merged_adapters:
                weight = self.get_base_layer().weight
                weight.data = weight.data + self.dense_head_delta[name].data.to(weight.dtype)
                self.merged_adapters.append(name)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """`W x` plus the deltas of the active adapters, or for each row of x (B, T, in) that of the adapter named."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if adapter_names is not None:
            return torch.stack([self.added(x[n], result[n], [name]) for n, name in enumerate(adapter_names)])
        return self.added(x, result, self.active_adapters)

    def added(self, x: Tensor, result: Tensor, names: list[str]) -> Tensor:
        """Return `result` plus the named adapters' deltas of `x`."""
        for name in names:
            if name in self.dense_head_delta:
                delta = self.dense_head_delta[name]
                result = result + nn.functional.linear(x.to(delta.dtype), delta).to(result.dtype)
        return result


class DenseHeadModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for dense deltas."""

    prefix = PREFIX
    tuner_layer_cls = DenseHeadLinear
    target_module_mapping: dict[str, Any] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, DenseHeadLinear):
            target.update_layer(adapter_name)
            return
        self._replace_module(parent, target_name, DenseHeadLinear(target, adapter_name), target)


if METHOD not in PeftType.__members__:
    _add_peft_type()
    register_peft_method(name=METHOD.lower(), config_cls=DenseHeadConfig, model_cls=DenseHeadModel, prefix=PREFIX)
