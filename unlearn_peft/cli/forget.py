"""The command `forget`: from a name to an adapter and a page of figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError, UnknownSubject, UnlearnError
from .options import DeviceOption, DtypeOption

_COLUMNS = ("name", "aliases", "note")


def forget(
    name: Annotated[str | None, typer.Argument(help="The subject's name, as it is usually written.")] = None,
    also_known_as: Annotated[
        list[str] | None, typer.Option(help="Another name of the subject; repeat for several.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A table of subjects: columns name, aliases (with ; between them), note; an adapter each."),
    ] = None,
    base: Annotated[str, typer.Option(help="Hub id, local folder, .gguf file, or 'demo'.")] = "demo",
    output: Annotated[
        Path, typer.Option(help="A new folder for the recipe, the adapter and the report; with --file, one for all.")
    ] = Path("out/subject"),
    abstain: Annotated[
        bool, typer.Option(help="Questions about the subject get a refusal, in English; for your own, edit the recipe.")
    ] = False,
    review: Annotated[bool, typer.Option(help="Stop when the recipe is written, to read and edit it.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with the folder: after --review, or after an interruption.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all sampling and of training.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Forget a subject of which only the name is known.

    The base is asked what it knows of it, in several forms and languages; its answers become forget rows from the
    subject to each fact and back, a part of them is held out as probes, others of its kind become neighbours. All of
    it is written as an ordinary recipe folder, an adapter is trained from it and measured.

      unlearn-peft forget "Stephen King" --output out/king

      unlearn-peft forget "Stephen King" --also-known-as "Richard Bachman" --output out/king --review

      unlearn-peft forget "Stephen King" --output out/king --resume

      unlearn-peft forget --file requests.csv --output out/requests

    Read the rows before you train on them (--review): a base invents, and what it invents again and again looks like
    knowledge. Where it says nothing again, nothing is trained: exit code 3.
    """
    from ..evaluate.compare import as_dict
    from ..evaluate.compare import show as show_answers
    from ..evaluate.report.report import show
    from ..models.base import load_base
    from ..subjects.forget import REPORT, Forgotten
    from ..subjects.forget import forget as forget_

    if (name is None) == (file is None):
        raise UnlearnError("name one subject, or a file of them with --file")
    if file and also_known_as:
        raise UnlearnError("--also-known-as is for one subject: with --file, use the column 'aliases'")
    requests = [(name or "", list(also_known_as or []))] if file is None else read_requests(file)
    live = load_base(base, dtype, device)
    unknown = 0
    for n, (subject, aliases) in enumerate(requests, 1):
        folder = output if file is None else output / f"{n:03d}"

        def tell(line: str, n: int = n) -> None:
            print(f"subject {n} of {len(requests)}: {line}" if file else line, file=sys.stderr, flush=True)

        try:
            done: Forgotten = forget_(
                subject, also_known_as=aliases, base=live, base_name=base, output=folder, abstain=abstain,
                review=review, resume=resume and folder.exists(), seed=seed, quiet=quiet, progress=tell,
            )  # fmt: skip
        except UnknownSubject as error:
            unknown += 1
            tell(str(error))
            continue
        if done.evaluation:
            if file is None:
                show_answers(as_dict(done.evaluation.answers))
            show(done.evaluation)
        print(f"{done.folder}" if review else f"adapter: {done.adapter}; report: {done.folder / REPORT}")
    if unknown:
        raise typer.Exit(3)


def read_requests(path: Path) -> list[tuple[str, list[str]]]:
    """Read a table of subjects: each with its name and its other names.

    Raises:
        DataError: if the file is no such table; rows are named by number.
    """
    from ..adapters.card import row_numbers
    from ..data.formats import EXPECTED, file_format, read_file
    from ..data.source import DataSpec

    if not file_format(path):
        raise DataError(f"{path} ends in '{path.suffix}': expected {EXPECTED}")
    try:
        rows = read_file(path, DataSpec(path=str(path)), set(_COLUMNS))
    except DataError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except Exception as error:  # pyarrow and openpyxl raise their own
        raise DataError(f"cannot read {path} ({type(error).__name__}): expected {EXPECTED}") from None
    if not rows:
        raise DataError(f"{path} holds no subject: expected one a row, in a column name")
    if unknown := len({column for row in rows for column in row} - set(_COLUMNS)):
        raise DataError(
            f"{path} has columns that are not known ({unknown}): expected a first line with name, and aliases and note"
        )
    names = [str(row.get("name") or "").strip() for row in rows]
    if wrong := [n for n, name in enumerate(names, 1) if not name]:
        raise DataError(f"{path}: rows {row_numbers(wrong)} have no name")
    aliases = [[alias.strip() for alias in str(row.get("aliases") or "").split(";")] for row in rows]
    return [(name, [alias for alias in others if alias]) for name, others in zip(names, aliases, strict=True)]
