"""A dense delta on a linear layer, `y = W x + D x`, as the PEFT method `DENSE_HEAD`.

Importing this file registers the method; PEFT can then save and load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from .validate import DENSE


def _add_peft_type() -> None:
    """Add the method to PEFT's closed enum of methods, as its documentation asks third parties to do."""
    member = str.__new__(PeftType, DENSE)
    member._name_, member._value_ = DENSE, DENSE
    type.__setattr__(PeftType, DENSE, member)  # from Python 3.12 on, members are found as attributes
    PeftType._member_names_.append(DENSE)
    PeftType._member_map_[DENSE] = member
    PeftType._value2member_map_[DENSE] = member


@dataclass
class DenseHeadConfig(PeftConfig):  # type: ignore[misc]
    """Config of a dense delta; `target_modules` names the linear layers that get one."""

    target_modules: list[str] | str | None = field(default=None)
    layers_to_transform: None = field(default=None)
    layers_pattern: None = field(default=None)
    exclude_modules: None = field(default=None)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[DENSE]


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
        base, weight = self.base_layer, self.base_layer.weight  # a sharded weight has another shape
        delta = torch.zeros(base.out_features, base.in_features, dtype=weight.dtype, device=weight.device)
        self.dense_head_delta[adapter_name] = nn.Parameter(delta)
        self.set_adapter(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active deltas to the base layer's weight (which must not be shared with the embeddings)."""
        for name in adapter_names or self.active_adapters:
            if name in self.dense_head_delta and name not in self.merged_adapters:
                weight = self.get_base_layer().weight
                weight.data = weight.data + self.dense_head_delta[name].data.to(weight.dtype)
                self.merged_adapters.append(name)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """`W x` plus the active adapters' deltas; with `adapter_names`, row n of x (B, T, in) gets the n-th's."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if adapter_names is not None:
            return torch.stack([self.added(x[n], result[n], [name]) for n, name in enumerate(adapter_names)])
        return self.added(x, result, self.active_adapters)

    def added(self, x: Tensor, result: Tensor, names: list[str]) -> Tensor:
        """Return `result` plus `D x` of each named adapter."""
        for name in names:
            if name in self.dense_head_delta:
                delta = self.dense_head_delta[name]
                result = result + nn.functional.linear(x.to(delta.dtype), delta).to(result.dtype)
        return result


class DenseHeadModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for dense deltas."""

    prefix = "dense_head_"
    tuner_layer_cls = DenseHeadLinear
    target_module_mapping: dict[str, Any] = {}

    def _create_and_replace(self, _: Any, adapter: str, target: Any, name: str, parent: Any, **_kwargs: Any) -> None:
        if isinstance(target, DenseHeadLinear):
            target.update_layer(adapter)
        else:
            self._replace_module(parent, name, DenseHeadLinear(target, adapter), target)


if DENSE not in PeftType.__members__:
    _add_peft_type()
    register_peft_method(
        name=DENSE.lower(), config_cls=DenseHeadConfig, model_cls=DenseHeadModel, prefix=DenseHeadModel.prefix
    )
