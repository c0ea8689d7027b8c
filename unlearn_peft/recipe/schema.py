"""A recipe: all settings of a training run, with every default, in one flat, validated model.

The settings of each objective are in `objectives.py`; YAML is read by `load.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from ..data.prompt import parse_format
from ..data.source import DataSource, DataSpec, Rows
from ..files.validation import Settings, StrictModel
from .lora_fields import lora_problems
from .objectives import ALIASES, GaKlSettings, Objective

DATA_FIELDS = ("forget", "retain", "probes", "neighbours")


class LoraSettings(Settings):
    """LoRA (Hu et al. 2021, arXiv:2106.09685).

    Of `peft.LoraConfig` may also be given: exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
    alpha_pattern, use_rslora, lora_dropout, and init_lora_weights (true, gaussian or orthogonal). Its other fields
    change more than what is added to the outputs of linear layers, and are refused.
    """

    model_config = ConfigDict(extra="allow")

    kind: Literal["lora"] = "lora"
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(16, gt=0, description="the delta is scaled by lora_alpha / r")
    target_modules: str | list[str] = Field("all-linear", description="linear layers to adapt")
    layers: Literal["upper_half", "all"] = Field("upper_half", description="or name layers by layers_to_transform")


class HeadSettings(StrictModel):
    """A delta on `lm_head` alone: low-rank (an ordinary PEFT LoRA) or dense (as in the original experiment)."""

    kind: Literal["head"] = "head"
    form: Literal["low_rank", "dense"] = "low_rank"
    r: int = Field(8, ge=1, description="rank of the low-rank form")
    lora_alpha: float = Field(16, gt=0, description="the low-rank delta is scaled by lora_alpha / r")


RetainSource = Annotated[
    Annotated[DataSpec, Tag("spec")] | Annotated[Rows, Tag("rows")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "rows" if isinstance(value, list) else "auto" if value == "auto" else "spec"),
]
AdapterSettings = Annotated[LoraSettings | HeadSettings, Field(discriminator="kind")]


class Recipe(StrictModel):
    """All settings of one run. Batch sizes are rows per optimiser step, over all processes together."""

    base: str = Field("demo", description="Hub id, local folder, .gguf file, or 'demo'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantize: Literal["int8", "llm_int8", "nf4"] | None = Field(
        None, description="quantize the frozen base; needs unlearn-peft[quantized]"
    )
    adapter: AdapterSettings = Field(default_factory=LoraSettings)
    forget: DataSource
    retain: RetainSource = Field("auto", description="rows that must stay; auto: self-generated answers of the base")
    probes: DataSource | None = Field(None, description="rows with `prompt` and `leak` words; never trained on")
    neighbours: DataSource | None = Field(None, description="rows that must survive; never trained on")
    objective: Objective = Field(default_factory=GaKlSettings)
    retain_weight: float = Field(20.0, ge=0)
    steps: int | None = Field(
        None, ge=1, description="at most: stop_when may end the run earlier; null: 45, or more for many forget rows"
    )
    visits: int = Field(2, ge=1, description="how often each forget row is trained on, at least, where steps is null")
    learning_rate: float = Field(8e-4, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(5, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: float | None = Field(1.0, gt=0)
    forget_batch: int | None = Field(
        None, ge=1, description="null: 8, or up to 32 for many forget rows where steps is null, too"
    )
    own_answers: int = Field(
        3,
        ge=0,
        description="answers sampled from the base to a forget prompt; those that name a fact are forgotten too",
    )
    widen: bool = Field(
        False,
        description="ask the base in more wordings and languages about what the forget rows are about, and back from "
        "their facts; answers that name a fact, or the subject, are forgotten like own_answers",
    )
    retain_batch: int = Field(16, ge=1)
    retain_answers: int = Field(
        0, ge=0, description="answers of the base to a retain prompt, retained beside it: greedy, then sampled"
    )
    fact_answers: int = Field(
        0,
        ge=0,
        description="answers of the base to questions about the facts of the forget rows alone, retained where they "
        "name none of the subjects: greedy, then sampled",
    )
    stand_in_answers: bool = Field(
        True, description="what the base says of made-up names in the subject's place is retained beside the retain set"
    )
    anchor_batch: int = Field(
        4, ge=0, description="the package's own rows of general knowledge, retained beside the retain set; 0: none"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="microbatches that a step's rows are split into")
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="compile the adapted layers with torch.compile")
    max_length: int = Field(
        512,
        ge=2,
        description="tokens; a longer row is cut into windows that overlap, plain text to forget into windows of 128",
    )
    train_on: Literal["completion", "all"] = "completion"
    chat_template: bool = Field(True, description="use the model's chat template for prompt/completion rows")
    prompt_format: str | None = Field(
        None,
        description="how to ask, in place of a chat template: text with {prompt} and {completion}; "
        r"by default, for a base without a template, `Question: {prompt}\nAnswer: {completion}`",
    )
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the retain set that the budget is measured on")
    eval_every: int | None = Field(
        None, ge=1, description="steps; null: 5 where evaluations choose the step (retain_budget, stop_when), else 15"
    )
    checkpoint_every: int = Field(20, ge=1)
    cache_gb: float = Field(
        1.0, ge=0, description="memory for the base's reference activations, computed once; the rest goes to disk"
    )
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = Field(0, ge=0)
    output: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, values: Any) -> Any:
        """Expand `adapter: lora` to `{kind: lora}` and `objective: x` to `{name: x}`, aliases to our name."""
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
        """Take a string as a path or Hub id, a string in a list as a `text` row, and no retain set as `auto`."""
        if info.field_name == "retain" and value in (None, "auto"):
            return "auto"
        if isinstance(value, (str, Path)):
            return {"path": str(value)}
        if isinstance(value, Sequence):
            return [{"text": row} if isinstance(row, str) else row for row in value]
        return value

    @field_validator("output")
    @classmethod
    def _expand_home(cls, value: str | None) -> str | None:
        return value and os.path.expanduser(value)

    @model_validator(mode="after")
    def _check_prompt_format(self) -> Recipe:
        if self.prompt_format is not None:
            parse_format(self.prompt_format)
            if not self.chat_template:
                raise ValueError("prompt_format is used in place of the chat template: leave out chat_template: false")
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> Recipe:
        if isinstance(self.adapter, LoraSettings) and self.adapter.model_extra:
            if problems := lora_problems(self.adapter.model_extra):
                raise ValueError("; ".join(problems))
        if isinstance(self.adapter, HeadSettings) and getattr(self.objective, "hidden_layer", False) is not False:
            raise ValueError(
                f"the objective '{self.objective.name}' works on the output of a decoder layer, which a head adapter "
                "never changes: use adapter: lora, or another objective"
            )
        return self

    @model_validator(mode="after")
    def _check_widen(self) -> Recipe:
        pushes_facts = getattr(self.objective, "forget_tokens", "all") == "specific"
        if self.widen and not (self.own_answers and pushes_facts):
            raise ValueError(
                "widen adds to the base's own answers, of which only fact tokens are forgotten: it needs own_answers "
                "of at least 1 and objective.forget_tokens: specific"
            )
        return self

    @property
    def makes_retain(self) -> bool:
        """Whether the retain set is made of self-generated answers, see training/examples/auto_retain.py."""
        return self.retain == "auto" and self.retain_weight > 0
