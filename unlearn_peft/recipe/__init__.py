"""Every setting of a run, in one validated model."""

from ..data.source import DataSpec
from .load import load_recipe
from .schema import HeadSettings, LoraSettings, Recipe

__all__ = ["DataSpec", "HeadSettings", "LoraSettings", "Recipe", "load_recipe"]
