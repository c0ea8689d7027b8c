"""A recipe: all that a run depends on, in one flat, validated model. Every default of the package lives here.

The objectives' settings are a file of their own, `objective_settings.py`.

YAML text or keyword arguments come in; a `Recipe` goes out to data, adapters, objectives and training.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import RecipeError, did_you_mean
from .files.validation import _Strict
from .objective_settings import ALIASES, SETTINGS, GaKlSettings, Objective

DATA_FIELDS = ("forget", "retain", "probes", "neighbours")


class LoraSettings(BaseModel):
    """LoRA (Hu et al. 2021, arXiv:2106.09685). Any further field of `peft.LoraConfig` may be given by name."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["lora"] = "lora"
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(16, gt=0, description="the delta is scaled by lora_alpha / r")
    target_modules: str | list[str] = Field("all-linear", description="linear layers to adapt")
    layers: Literal["upper_half", "all"] = Field("upper_half", description="or name them by layers_to_transform")


class HeadSettings(_Strict):
    """A delta on `lm_head` alone: low-rank (an ordinary PEFT LoRA) or dense (the original experiment's way)."""

    kind: Literal["head"] = "head"
    form: Literal["low_rank", "dense"] = "low_rank"
    r: int = Field(8, ge=1, description="rank of the low-rank form")
    lora_alpha: float = Field(16, gt=0, description="the low-rank delta is scaled by lora_alpha / r")


class DataSpec(_Strict):
    """Where rows come from: a jsonl, csv or parquet file, or a Hub data set."""

    path: str
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str = "train"
    columns: dict[str, str] = Field(
        default_factory=dict, description="ours -> theirs, e.g. {prompt: question, completion: answer}"
    )


Rows = list[dict[str, Any]]
DataSource = Annotated[
    Annotated[DataSpec, Tag("spec")] | Annotated[Rows, Tag("rows")],
    Discriminator(lambda value: "rows" if isinstance(value, list) else "spec"),
]
RetainSource = Annotated[
    Annotated[DataSpec, Tag("spec")] | Annotated[Rows, Tag("rows")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "rows" if isinstance(value, list) else "auto" if value == "auto" else "spec"),
]
AdapterSettings = Annotated[LoraSettings | HeadSettings, Field(discriminator="kind")]


class Recipe(_Strict):
    """All settings of one run. Batch sizes are rows per optimiser step, over all processes together."""

    base: str = Field("demo", description="Hub id, local folder, .gguf file, or 'demo'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantize: Literal["int8", "llm_int8", "nf4"] | None = Field(
        None, description="bits a weight of the frozen base; needs unlearn-peft[quantized]"
    )
    adapter: AdapterSettings = Field(default_factory=LoraSettings)
    forget: DataSource
    retain: RetainSource = Field("auto", description="rows that must stay; auto: the base's own answers")
    probes: DataSource | None = Field(None, description="rows with `prompt` and `leak` words; never trained on")
    neighbours: DataSource | None = Field(None, description="rows that must survive; never trained on")
    objective: Objective = Field(default_factory=GaKlSettings)
    retain_weight: float = Field(15.0, ge=0)
    steps: int = Field(45, ge=1, description="at the most: stop_when may end the run before")
    learning_rate: float = Field(8e-4, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(5, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: float | None = Field(1.0, gt=0)
    forget_batch: int = Field(8, ge=1)
    own_answers: int = Field(
        3, ge=0, description="of the base to each forget prompt, sampled: what names a fact is forgotten too; 0: none"
    )
    retain_batch: int = Field(8, ge=1)
    retain_answers: int = Field(
        0, ge=0, description="of the base to each retain prompt, held beside the rows: its first choice, then samples"
    )
    anchor_batch: int = Field(
        4, ge=0, description="of the package's own rows on the wide world, held beside the retain set; 0: none"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts in which a step's rows are processed")
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="compile the adapted layers with torch.compile, and undo it afterwards")
    max_length: int = Field(512, ge=2, description="tokens; longer rows are cut, and counted")
    train_on: Literal["completion", "all"] = "completion"
    chat_template: bool = Field(True, description="use the model's chat template for prompt/completion rows")
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the retain set that the budget is measured on")
    eval_every: int = Field(5, ge=1)
    checkpoint_every: int = Field(20, ge=1)
    cache_gb: float = Field(
        1.0, ge=0, description="memory for what the frozen base gives, computed once; what is over goes to disk"
    )
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = Field(0, ge=0)
    output: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, values: Any) -> Any:
        """`adapter: lora` stands for `adapter: {kind: lora}`; `objective: x` for `{name: x}`, in our name."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for key, inner in (("adapter", "kind"), ("objective", "name")):
            if isinstance(values.get(key), str):
                values[key] = {inner: values[key]}
            elif isinstance(values.get(key), Mapping):
                default = "lora" if key == "adapter" else "ga_kl"
                values[key] = {inner: default, **values[key]}
        match values.get("objective"):
            case {"name": str(name)} if name in ALIASES:
                values["objective"]["name"] = ALIASES[name]
        return values

    @field_validator(*DATA_FIELDS, mode="before")
    @classmethod
    def _as_source(cls, value: Any, info: ValidationInfo) -> Any:
        """A string is a path or Hub id; a list holds rows, where a bare string is a `text` row; no retain is `auto`."""
        if info.field_name == "retain" and value in (None, "auto"):
            return "auto"
        if isinstance(value, (str, Path)):
            return {"path": str(value)}
        if isinstance(value, Sequence):
            return [{"text": row} if isinstance(row, str) else row for row in value]
        return value

    @model_validator(mode="after")
    def _check_adapter(self) -> Recipe:
        if isinstance(self.adapter, LoraSettings) and self.adapter.model_extra:
            from peft import LoraConfig

            known = {*LoraConfig.__dataclass_fields__, "kind"}
            for key in self.adapter.model_extra:
                if key not in known:
                    raise ValueError(f"unknown key 'adapter.{key}'{did_you_mean(key, known)}")
        if isinstance(self.adapter, HeadSettings) and getattr(self.objective, "hidden_layer", False) is not False:
            raise ValueError(
                f"the objective '{self.objective.name}' works on the output of a decoder layer, which a head adapter "
                "never changes: use adapter: lora, or another objective"
            )
        return self

    @property
    def makes_retain(self) -> bool:
        """Whether the retain set is to be made from the base's own answers, see auto_retain.py."""
        return self.retain == "auto" and self.retain_weight > 0


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **fields: Any) -> Recipe:
    """Read a YAML recipe, apply overrides, and validate the whole.

    Args:
        path: the YAML file. Data paths inside it are relative to its folder.
        overrides: `key=value` or `key.inner=value`, the value written as YAML. Data paths here are relative
            to the working folder.
        fields: further overrides as Python values; None means "not given".

    Raises:
        RecipeError: if the file cannot be read or any field is unknown or out of range; all are told at once.
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
        objective["name"] = str(path.parent.absolute() / objective["name"])
    if isinstance(values.get("base"), str) and values["base"].startswith(("./", "../")):
        values["base"] = str(path.parent / values["base"])
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"no recipe at {path}: give the path of a YAML file, e.g. recipes/harry_potter.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = re.sub(
            r"'[^']{2,}'", "'...'", str(getattr(error, "problem", "unreadable"))
        )  # may quote an inline row
        raise RecipeError(f"{path} is not valid YAML{where}: {problem}") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path} holds {type(values).__name__}, expected a mapping of fields such as 'forget: rows.jsonl'"
        )
    return values


def _relative_to(folder: Path, source: Any) -> Any:
    """Resolve a data path against the recipe's folder; what exists there or looks like a file is a path."""
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        return {**source, "path": _relative_to(folder, source["path"])}
    if isinstance(source, str):
        candidate = folder / source
        is_file = candidate.exists() or Path(source).suffix in (".jsonl", ".json", ".csv", ".parquet")
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
        if isinstance(inner, str):  # the shorthand: adapter: lora
            inner = {"kind" if name == "adapter" else "name": inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise RecipeError(f"cannot set '{key}': '{name}' holds a {type(inner).__name__}, not named settings")
        place[name] = inner
        place = inner
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"cannot read the value of the override '{key}': it is not valid YAML") from None


_TAGS = (
    "lora",
    "head",
    "custom",
    "spec",
    "rows",
    "auto",
    *SETTINGS,
)  # pydantic names the member of a union in the path


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
        found = item["ctx"]["tag"]
        return f"unknown adapter kind '{found}'{did_you_mean(found, ['lora', 'head'])}; known: lora, head"
    found = "a list or mapping" if isinstance(item["input"], (dict, list)) else repr(item["input"])
    if item["loc"] and (item["loc"][0] in DATA_FIELDS or "refusals" in item["loc"]):  # it may hold a row's text
        found = f"a {type(item['input']).__name__}"
    return f"'{name}' is {found}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Return the field names of the settings model that an error's location leads to."""
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
