"""Where rows come from: a file, a Hub data set, or a list in Python."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from ..files.validation import StrictModel

Row = dict[str, Any]


class DataSpec(StrictModel):
    """Where rows come from: a jsonl, json, csv, tsv, xlsx or parquet file, or a Hub data set."""

    path: str
    name: str | None = Field(None, description="configuration of a Hub data set, or sheet of an xlsx file")
    split: str = "train"
    encoding: str | None = Field(None, description="of a text file that is not UTF-8, 16 or 32, e.g. cp1252")
    columns: dict[str, str] = Field(
        default_factory=dict, description="ours -> theirs, e.g. {prompt: question, completion: answer}"
    )

    @field_validator("path")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return os.path.expanduser(value)


Rows = list[Row]
DataSource = Annotated[
    Annotated[DataSpec, Tag("spec")] | Annotated[Rows, Tag("rows")],
    Discriminator(lambda value: "rows" if isinstance(value, list) else "spec"),
]
