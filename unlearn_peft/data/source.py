"""Where rows come from: a file, a Hub data set, or a list in Python."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from ..files.validation import StrictModel

Row = dict[str, Any]


class DataSpec(StrictModel):
    """Where rows come from: a jsonl, csv or parquet file, or a Hub data set."""

    path: str
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str = "train"
    columns: dict[str, str] = Field(
        default_factory=dict, description="ours -> theirs, e.g. {prompt: question, completion: answer}"
    )


Rows = list[Row]
DataSource = Annotated[
    Annotated[DataSpec, Tag("spec")] | Annotated[Rows, Tag("rows")],
    Discriminator(lambda value: "rows" if isinstance(value, list) else "spec"),
]
