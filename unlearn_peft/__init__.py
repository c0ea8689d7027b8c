"""Make a language model forget on demand, without touching its weights.

Train a forget adapter with `unlearn`, put it on a live model with `attach`, take it off with `detach`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.hub.pull import pull as pull
    from .adapters.hub.push import push as push
    from .adapters.read import read_bundle as read_bundle
    from .adapters.transform.merge import merge as merge
    from .adapters.transform.merge import stack as stack
    from .adapters.trust import Trust as Trust
    from .errors import UnlearnError as UnlearnError
    from .inference.attach import attach as attach
    from .inference.attach import attached as attached
    from .inference.attach import detach as detach
    from .inference.attach import forgetting as forgetting
    from .inference.attach import swap as swap
    from .inference.bank import Bank as Bank
    from .inference.generate import answers as answers
    from .models.base import Base as Base
    from .models.base import load_base as load_base
    from .recipe.load import load_recipe as load_recipe
    from .recipe.schema import Recipe as Recipe
    from .subjects.forget import Forgotten as Forgotten
    from .subjects.forget import forget as forget
    from .training.run import Adapter as Adapter
    from .training.run import unlearn as unlearn
    from .training.run import unlearn_many as unlearn_many
    from .training.tokens import Terms as Terms
    from .training.tokens import Tokens as Tokens
    from .training.tokens import kl_divergence as kl_divergence

# name -> file, in reading order; imported when first used, so that `unlearn-peft --help` answers at once
_PUBLIC = {
    "unlearn": "training.run",
    "unlearn_many": "training.run",
    "Adapter": "training.run",
    "forget": "subjects.forget",
    "Forgotten": "subjects.forget",
    "Recipe": "recipe.schema",
    "load_recipe": "recipe.load",
    "Base": "models.base",
    "load_base": "models.base",
    "attach": "inference.attach",
    "detach": "inference.attach",
    "swap": "inference.attach",
    "attached": "inference.attach",
    "forgetting": "inference.attach",
    "Bank": "inference.bank",
    "answers": "inference.generate",
    "stack": "adapters.transform.merge",
    "merge": "adapters.transform.merge",
    "read_bundle": "adapters.read",
    "pull": "adapters.hub.pull",
    "push": "adapters.hub.push",
    "Trust": "adapters.trust",
    "Tokens": "training.tokens",
    "Terms": "training.tokens",
    "kl_divergence": "training.tokens",
    "UnlearnError": "errors",
}
__all__ = list(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unlearn_peft' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
