"""The settings of each objective, with their defaults; the functions are in `training/objectives.py`.

To add an objective: a model here, in `_BuiltIns` too, and a function there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from ..data.refusals import REFUSALS
from ..errors import did_you_mean
from ..files.validation import Settings, StrictModel


class StopWhen(StrictModel):
    """Stop as soon as one of these is reached on the forget set."""

    forget_loss: float | None = Field(None, gt=0, description="mean loss of the forget set, nats/token")
    answer_probability: float | None = Field(
        None, gt=0, lt=1, description="mean over rows of exp(-mean token loss), as in TOFU"
    )


class ObjectiveSettings(Settings):
    """The name of an objective, and the guards of the training loop."""

    name: str
    stop_when: StopWhen | None = None
    retain_budget: float | None = Field(
        None,
        gt=0,
        description="nats/token of KL on a held-out part of the retain set; the best step within it is kept",
    )
    scale_back: float | None = Field(
        None,
        gt=0,
        le=1,
        description="for less harm, scale the kept step's delta down, to 0.7 at least, as far as all forget rows that "
        "it has forgotten stay forgotten, and this share of the base's own answers; null, or where stop_when ended the "
        "run: it is saved as trained",
    )


class _BuiltIn(ObjectiveSettings):
    """The package's own objectives refuse unknown keys, and share the default budget."""

    model_config = ConfigDict(extra="forbid")

    retain_budget: float | None = Field(0.08, gt=0)


class _RetainLoss(_BuiltIn):
    """An objective with a choice of retain losses."""

    retain_loss: Literal["kl", "cross_entropy"] = Field(
        "kl", description="kl: KL(current || reference); cross_entropy: go on learning the retain rows"
    )


class _TokenLevel(_RetainLoss):
    """An objective with a term for each single token."""

    forget_tokens: Literal["specific", "all"] = Field(
        "all", description="push all tokens, or those that carry the fact and hold the others to the reference"
    )


class GaKlSettings(_BuiltIn):
    """Gradient ascent on the forget set, KL to the frozen base on the retain set, with guards."""

    name: Literal["ga_kl"] = "ga_kl"
    forget_tokens: Literal["specific", "all"] = Field(
        "specific", description="push away the tokens that carry the fact and hold the others, or push all"
    )
    forget_ceiling: float | None = Field(
        8.0, gt=0, description="nats; no token is pushed beyond this loss, no fact of several tokens beyond twice that"
    )
    hold: bool = Field(True, description="pull a token that overshoots the ceiling back to it")
    kl: Literal["reverse", "forward"] = Field(
        "reverse", description="reverse: KL(current || reference); forward: KL(reference || current)"
    )
    refusals: bool | list[str] = Field(
        False,
        description="abstain: teach the forget rows' questions a refusal as well; true: the package's own sentences, "
        "in English, or a list of yours; then scale_back is null unless it is set",
    )
    scale_back: float | None = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _refusals_as_trained(self) -> GaKlSettings:
        if self.refusals and "scale_back" not in self.model_fields_set:
            self.__dict__["scale_back"] = None  # it stays a field that was not set
        return self

    @field_validator("refusals", mode="before")
    @classmethod
    def _sentences(cls, value: Any) -> Any:
        some = isinstance(value, list) and value and all(isinstance(text, str) and text.strip() for text in value)
        if some or isinstance(value, bool):
            return value
        raise ValueError("expected true, false, or a list of sentences to answer with")


class GradDiffSettings(_TokenLevel):
    """Gradient ascent on the forget set, descent on the retain set. Unbounded: only the budget stops it."""

    name: Literal["grad_diff"] = "grad_diff"
    retain_loss: Literal["kl", "cross_entropy"] = Field("cross_entropy", description="kl makes it plain GA + KL")


class WgaSettings(_TokenLevel):
    """Gradient ascent in which tokens that are already unlikely count less."""

    name: Literal["wga"] = "wga"
    alpha: float = Field(1.0, ge=0, description="a token's weight is p(token) ** alpha; 0: plain ascent")


class IhlSettings(_TokenLevel):
    """Inverted hinge loss: the token's probability goes to the next likely token."""

    name: Literal["ihl"] = "ihl"


class UndialSettings(_TokenLevel):
    """Self-distillation to the reference with the token's own logit lowered."""

    name: Literal["undial"] = "undial"
    strength: float = Field(10.0, gt=0, description="by how much the token's reference logit is lowered")
    spellings: bool = Field(
        True, description="lower tokens that differ from it in case and spaces only as well; false: as in the paper"
    )


class NpoSettings(_RetainLoss):
    """Negative preference optimisation: ascent that fades as a row falls below the reference."""

    name: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="per nat of a whole row; towards 0 it is plain ascent")


class SimNpoSettings(_RetainLoss):
    """NPO on a row's mean loss instead of its log-probability against the reference."""

    name: Literal["simnpo"] = "simnpo"
    beta: float = Field(2.5, gt=0, description="per nat/token")
    gamma: float = Field(0.0, ge=0, description="margin: a row's pull fades around a mean loss of gamma / beta")


class DpoSettings(_RetainLoss):
    """Direct preference optimisation: a refusal is preferred to the forget row's own answer."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="per nat of a whole row")
    refusals: list[Annotated[str, Field(pattern=r"\S")]] | None = Field(
        None, min_length=1, description="what to answer instead; None: the package's own sentences, in English"
    )


class RmuSettings(_BuiltIn):
    """Representation misdirection: forget rows' hidden states at a layer are steered to a random vector."""

    name: Literal["rmu"] = "rmu"
    forget_tokens: Literal["specific", "all"] = Field(
        "all", description="steer all tokens, or those that carry the fact and hold the others to the reference"
    )
    retain_loss: Literal["hidden", "kl", "cross_entropy"] = Field(
        "hidden", description="hidden: hidden states stay as the reference's; or as with the other objectives"
    )
    steering_coefficient: float = Field(
        300.0,
        gt=0,
        description="length of the vector, near that of the layer's hidden states: 315 in the demo's layer 22",
    )
    hidden_layer: int | None = Field(
        None, ge=0, description="its output is looked at, counted from 0; None: the middle one of the adapted layers"
    )
    seed: int = Field(0, ge=0, description="of the vector's direction")


class CustomObjectiveSettings(ObjectiveSettings):
    """The user's own objective, `module:function` or `file.py:function`, with any settings.

    A field `refusals` adds refusals to the rows, a field `hidden_layer` (null or a number) adds hidden states.
    """

    model_config = ConfigDict(extra="allow")

    @field_validator("name")
    @classmethod
    def _names_a_function(cls, name: str) -> str:
        if ":" not in name:
            raise ValueError(
                f"unknown objective '{name}'{did_you_mean(name, [*SETTINGS, *ALIASES])}; "
                f"known: {', '.join(SETTINGS)}, or your own as 'module:function' or 'file.py:function'"
            )
        return name


_BuiltIns = (
    GaKlSettings | GradDiffSettings | WgaSettings | IhlSettings | UndialSettings | NpoSettings | SimNpoSettings
    | DpoSettings | RmuSettings
)  # fmt: skip
SETTINGS: dict[str, type[ObjectiveSettings]] = {m.model_fields["name"].default: m for m in get_args(_BuiltIns)}
ALIASES = {"idk_dpo": "dpo"}  # names in other projects; manifests and messages have ours


def refusals_of(objective: ObjectiveSettings) -> Sequence[str] | None:
    """Return the sentences that an objective teaches: its own, or the package's; None: it teaches none.

    Any objective's with a field `refusals` that is not false, a user's own too.
    """
    refusals = getattr(objective, "refusals", False)
    return None if refusals is False else (refusals if isinstance(refusals, list) else None) or REFUSALS


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "built_in" if isinstance(name, str) and name in SETTINGS else "custom"


Objective = Annotated[
    Annotated[_BuiltIns, Field(discriminator="name"), Tag("built_in")]
    | Annotated[CustomObjectiveSettings, Tag("custom")],
    Discriminator(_kind),
]
