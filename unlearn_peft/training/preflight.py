"""A recipe's adapter is tried on the base before any work: put on, saved, read and taken off again, untrained.

A recipe and a base come in; an error goes out for what training would end in, or a reader refuse.
"""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.bundle import Bundle, Delta
from ..adapters.read import deltas_of
from ..adapters.validate import check_config, of_module
from ..errors import AdapterError, RecipeError, first_line, refuse
from ..models.base import Base
from ..models.restore import left_as_found
from ..recipe.schema import Recipe
from .adapter_config import adapter_config
from .step.layers import watched_layer


def check_trainable(base: Base, recipe: Recipe) -> None:
    """Refuse a recipe whose adapter cannot be put on the base, or could not be read and attached once it was trained.

    Raises:
        AdapterError: if PEFT refuses the adapter's settings, or the adapter would do more than add B A x to linear
            layers' outputs, which is all that is stacked, served and taken off exactly.
        RecipeError: if the base or the objective does not go with it.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    if base.model.dtype == torch.float16:
        raise RecipeError("training in float16 loses small gradients: choose dtype bfloat16 or float32")
    config = adapter_config(base.model, recipe.adapter)
    saved, deltas = _saved(config), {}
    if not (problems := check_config(saved)):
        with left_as_found(base.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in training
            try:
                model = get_peft_model(base.model, config, low_cpu_mem_usage=True)
                tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
            except Exception as error:  # whatever PEFT raises for settings that it does not like
                reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder="...")
                raise AdapterError(f"PEFT refuses these adapter settings: {reason}") from error
            saved = _saved(config)  # PEFT may have changed it
            if not (problems := check_config(saved)):
                deltas = deltas_of(saved, tensors, problems)
                problems = [*_more_than_deltas(model, deltas), *problems]
            if (number := getattr(recipe.objective, "hidden_layer", False)) is not False:
                watched_layer(model, number)
        problems += Bundle(Path(), saved, deltas, {}, "", "").misfits(base.model, None, True, None)[0]
        problems += _unused_patterns(saved, deltas)
    if problems:
        refuse(
            "the adapter of this recipe is refused before it is trained, for it could not be read and attached",
            problems,
            "Change the recipe's adapter settings",
        )


def _saved(config: Any) -> dict[str, Any]:
    """Return a PEFT config as a reader would find it."""
    try:
        return json.loads(json.dumps(config.to_dict(), default=list, sort_keys=True))  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:  # what is no set, either
        raise AdapterError(f"these adapter settings cannot be saved: {first_line(error)}") from error


def _more_than_deltas(model: Any, deltas: Mapping[str, Delta]) -> Iterator[str]:
    """Tell where PEFT's layers compute something else than what a reader takes their tensors for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and name not in deltas:
            yield f"target_modules finds '{name}', expected linear layers"
        for variant in getattr(layer, "lora_variant", {}).values():
            yield f"'{name}' is a {type(variant).__name__} of PEFT, expected a plain LoRA"
        scale = getattr(layer, "scaling", {}).get("default") if name in deltas else None
        if scale is not None and not math.isclose(scale, deltas[name].scale, rel_tol=1e-6):
            yield (
                f"'{name}' is scaled by {scale:g}, its saved config says {deltas[name].scale:g}: of the keys of "
                "alpha_pattern, which are saved in alphabetical order, the first that matches counts"
            )


def _unused_patterns(config: Mapping[str, Any], deltas: Mapping[str, Delta]) -> Iterator[str]:
    for field in ("rank_pattern", "alpha_pattern"):
        for name in config.get(field) or {}:
            if not any(of_module({name: True}, module, False) for module in deltas):
                yield f"'{field}' names '{name}', which is none of the adapted modules"
