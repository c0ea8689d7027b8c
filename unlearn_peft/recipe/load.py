"""YAML and overrides -> a validated `Recipe`, or one error that names every unknown key and wrong value."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..data.formats import file_format
from ..errors import RecipeError, did_you_mean, safe_repr
from ..files.strict_yaml import parse_yaml, read_yaml
from .objectives import SETTINGS
from .schema import DATA_FIELDS, Recipe

_TAGS = (
    "lora",
    "head",
    "built_in",
    "custom",
    "spec",
    "rows",
    "auto",
    *SETTINGS,
)  # in the locations of pydantic's errors


_SHORTHAND = {"adapter": "kind", "objective": "name", **dict.fromkeys(DATA_FIELDS, "path")}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **fields: Any) -> Recipe:
    """Read a YAML recipe, apply overrides, and validate the result.

    Args:
        path: the YAML file. Data paths inside it are relative to its folder.
        overrides: `key=value` or `key.inner=value`, the value in YAML. Data paths here are relative to the working
            folder.
        fields: further overrides as Python values; None means "not given".

    Raises:
        RecipeError: if the file cannot be read; or naming all fields that are unknown or out of range.
    """
    path = Path(path)
    values = _read_yaml(path)
    for key in DATA_FIELDS:
        if key in values and (key, values[key]) != ("retain", "auto"):
            values[key] = _relative_to(path.parent, values[key])
    objective = values.get("objective")
    if isinstance(objective, str):
        objective = values["objective"] = {"name": objective}
    if isinstance(objective, dict) and ".py:" in str(objective.get("name")):
        objective["name"] = str(path.parent.absolute() / os.path.expanduser(objective["name"]))
    if isinstance(values.get("base"), str) and values["base"].startswith(("./", "../")):
        values["base"] = os.path.join(path.parent, values["base"])
    for override in overrides:
        _apply(values, override)
    values.update({key: value for key, value in fields.items() if value is not None})
    return make_recipe(values, origin=str(path))


def make_recipe(values: Mapping[str, Any], origin: str = "the recipe") -> Recipe:
    """Validate a mapping as a recipe.

    Raises:
        RecipeError: naming every unknown key (with the nearest known one) and every value out of range.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(dict(item)) for item in error.errors()]
        raise RecipeError(f"{origin} cannot be used:\n" + "\n".join(f"  - {p}" for p in problems)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path, _rows_as_text)
    except FileNotFoundError:
        example = "recipes/harry_potter.yaml"
        raise RecipeError(f"no recipe at {path}: give the path of a YAML file, e.g. {example}") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        expected = "expected a mapping of fields such as 'forget: rows.jsonl'"
        raise RecipeError(f"{path} holds {type(values).__name__}, {expected}")
    return values


def _rows_as_text(node: Any) -> Any:
    """Make each scalar of rows in the recipe a text: the answer `no`, `1997-06-26` or `007` is what it says."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            waiting, seen = [value] if key.value in DATA_FIELDS and isinstance(value, yaml.SequenceNode) else [], set()
            while waiting:
                inner = waiting.pop()
                if inner in seen:  # an alias may stand in itself
                    continue
                seen.add(inner)
                if isinstance(inner, yaml.ScalarNode):
                    inner.tag = "tag:yaml.org,2002:str"
                    continue
                waiting += inner.value if isinstance(inner, yaml.SequenceNode) else [item for _, item in inner.value]
    return node


def _relative_to(folder: Path, source: Any) -> Any:
    """Resolve a data path against the recipe's folder; what exists there or looks like a file is a path."""
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        return {**source, "path": _relative_to(folder, source["path"])}
    if isinstance(source, str):
        candidate = folder / os.path.expanduser(source)
        is_file = os.path.exists(candidate) or file_format(candidate)
        return str(candidate) if is_file else source
    return source


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"cannot read the override '{override}': expected key=value, e.g. retain_weight=10")
    *outer, last = key.strip().split(".")
    place = values
    for name in outer:
        inner = place.get(name)
        if isinstance(inner, str):  # the shorthand: adapter: lora, forget: rows.jsonl
            inner = {_SHORTHAND.get(name, "name"): inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise RecipeError(f"cannot set '{key}': '{name}' holds a {type(inner).__name__}, not named settings")
        place[name] = inner
        place = inner
    try:
        place[last] = parse_yaml(text)
    except ValueError:
        raise RecipeError(f"cannot read the value of the override '{key}': it is not valid YAML") from None


def _describe(item: dict[str, Any]) -> str:
    parts = [str(part) for part in item["loc"] if part not in _TAGS]
    name = ".".join(parts)
    if item["type"] == "extra_forbidden":
        near = did_you_mean(parts[-1], _known_keys(item["loc"][:-1]))
        if not near and item["loc"][0] in DATA_FIELDS:  # it may be a row's text
            return f"unknown key in '{item['loc'][0]}': expected a path, a list of rows, or a mapping with 'path'"
        return f"unknown key '{name}'{near}"
    if item["type"] == "missing":
        return f"'{name}' is missing"
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"'{name}': {message}" if name and f"'{name}" not in message else message
    if item["type"] == "union_tag_invalid":
        kind = item["ctx"]["tag"]
        return f"unknown adapter kind '{kind}'{did_you_mean(kind, ['lora', 'head'])}; known: lora, head"
    value = "a list or mapping" if isinstance(item["input"], (dict, list)) else safe_repr(item["input"])
    if item["loc"] and (item["loc"][0] in DATA_FIELDS or "refusals" in item["loc"]):  # it may hold a row's text
        value = f"a {type(item['input']).__name__}"
    return f"'{name}' is {value}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Return the field names of the settings that an error's location leads to."""
    models: list[type[BaseModel]] = [Recipe]
    for part in map(str, location):
        if part in SETTINGS:
            models = [SETTINGS[part]]
        elif part not in _TAGS:
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_in(field.annotation)]
    return [key for model in models for key in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []
