"""The strictness that every settings model shares, and what no setting and no option may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import safe_repr

LARGEST = 2**32  # of any number: seeds of every library, counts that memory can hold, and seconds


def check_value(value: object) -> None:
    """Check a number or text of a recipe or command line; anything else passes.

    Raises:
        ValueError: for NaN, infinity and numbers beyond any use, and, without quoting it, for text that is no UTF-8.
    """
    if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        raise ValueError(f"{safe_repr(value)} is no number up to {LARGEST}")
    if isinstance(value, str) and ("\0" in value or not _encodable(value)):
        raise ValueError("it is no text in UTF-8, or holds a null character")


class Settings(BaseModel):
    """A pydantic model that takes `true` for no number, and refuses what `check_value` does."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_values(cls, values: Any) -> Any:
        problems = []
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            kinds = set(get_args(field.annotation) or [field.annotation])
            try:
                check_value(value := values.get(name))
                if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                    raise ValueError(f"{str(value).lower()} is no number")
            except ValueError as error:
                problems.append(f"'{name}': {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return values


class StrictModel(Settings):
    """A pydantic model that also refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a byte that is no UTF-8 becomes
        return False
    return True
