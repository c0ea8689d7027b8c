"""Write reference/cli.md and reference/recipe.md from the code: no option and no field is typed by hand.

    python docs/generate.py

`make docs` does it before each build. The pages are kept in git, so that they can be read on GitHub;
tests/test_docs.py fails where they are not what the code says.
"""

import inspect
import json
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import typer  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from unlearn_peft.cli import app  # noqa: E402
from unlearn_peft.recipe import objectives as objective_settings  # noqa: E402
from unlearn_peft.recipe import schema as recipe  # noqa: E402

MADE = "<!-- written by docs/generate.py: change the code, not this page -->\n"


def main():
    """Write both pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages():
    """Return the text of each page, by its path in docs/."""
    return {"reference/cli.md": cli_page(), "reference/recipe.md": recipe_page()}


# --- the command line -------------------------------------------------------------------------------------------------


def cli_page():
    """Return a section for each command, in the order of the terminal's."""
    root = typer.main.get_command(app)
    parts = [f"# Command line\n\n{MADE}\n`unlearn-peft COMMAND --help` says the same in the terminal."]
    for name, command in root.commands.items():
        parts += section(f"unlearn-peft {name}", command)
    return "\n\n".join(parts) + "\n"


def section(name, command, level=2):
    """Return a command's heading, usage, help, arguments and options; then those of its own commands."""
    shown = [p for p in command.params if p.name != "help" and not p.hidden]
    given = [called(one) + "..." * (one.nargs == -1) for one in shown if one.param_type_name == "argument"]
    usage = " ".join([name, *given, "[OPTION]..."]) if shown else f"{name} COMMAND"
    parts = [f"{'#' * level} {name}", f"`{usage}`", *paragraphs(command.help or "")]
    if shown:
        parts.append("| argument or option | default | meaning |\n|---|---|---|\n" + "\n".join(map(parameter, shown)))
    for inner, one in getattr(command, "commands", {}).items():
        parts += section(f"{name} {inner}", one, level + 1)
    return parts


def parameter(one):
    """Return the table's line for an argument or option."""
    names = [*one.opts, *one.secondary_opts] if one.param_type_name == "option" else [called(one)]
    told = getattr(one, "help", None) or ""
    if one.multiple and "repeat" not in told:
        told += " Repeatable."
    if variable := one.envvar:
        told += f" Also: `${variable}`."
    default = f"`{getattr(one.default, 'value', one.default)}`"
    if one.required:
        default = "required"
    elif one.default is None or isinstance(one.default, bool):
        default = "on" if one.default else ""
    kind = one.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        told += f" One of `{'`, `'.join(choice.value for choice in kind)}`."
    return line(", ".join(f"`{name}`" for name in names), default, told.strip())


def called(argument):
    """Return an argument's name as usage and table have it."""
    return argument.metavar or argument.name.upper()


def paragraphs(text):
    """Return a command's help as Markdown: indented paragraphs and commands are code."""
    parts, code = [], []

    def flush():
        if code:
            parts.append("```\n" + "\n".join(code) + "\n```")
            code.clear()

    for part in inspect.cleandoc(text).split("\n\n"):
        if part.startswith("  ") or part.startswith("unlearn-peft "):
            code.append(inspect.cleandoc(part))
        elif part.strip():
            flush()
            parts.append(part.strip())
    flush()
    return parts


# --- recipes ----------------------------------------------------------------------------------------------------------

SOURCES = {"forget": "rows", "retain": "rows or `auto`", "probes": "rows", "neighbours": "rows"}
LINKED = {"adapter": "[kind](#adapter)", "objective": "[name](#objective)", "stop_when": "[conditions](#stop_when)"}


def recipe_page():
    """Return a table for each model that a recipe is made of."""
    own = objective_settings.CustomObjectiveSettings
    shared = set(objective_settings.ObjectiveSettings.model_fields) - {"name"}
    parts = [
        f"# Recipes\n\n{MADE.strip()}",
        "A recipe is a flat YAML file; `unlearn(...)` takes the same fields as keywords, and on the command line "
        "`--set field=value` overrides one (`--set adapter.r=16`). Unknown fields are refused. Only `forget` must be "
        "given.",
        inspect.getdoc(recipe.Recipe),
        table(recipe.Recipe),
        "## Rows",
        f"{inspect.getdoc(recipe.DataSpec)} A text stands for its `path`; a list in place of it holds the rows "
        "themselves. Paths in a recipe start at its folder.",
        table(recipe.DataSpec),
        "## adapter",
        "A text stands for the kind alone: `adapter: lora`.",
    ]
    for model in (recipe.LoraSettings, recipe.HeadSettings):
        parts += [f"### kind: {model.model_fields['kind'].default}", inspect.getdoc(model), table(model, {"kind"})]
    parts += [
        "## objective",
        "A text stands for the name alone: `objective: npo`. Each has the two guards; what each does, with its source: "
        "[design](../design.md#other-objectives).",
        table(objective_settings.ObjectiveSettings, {"name"}),
        "### stop_when",
        inspect.getdoc(objective_settings.StopWhen),
        table(objective_settings.StopWhen),
    ]
    for name, model in objective_settings.SETTINGS.items():
        also = [f"`{alias}`" for alias, meant in objective_settings.ALIASES.items() if meant == name]
        budget = model.model_fields["retain_budget"].default
        parts += [
            f"### name: {name}",
            inspect.getdoc(model) + (f" Also called {', '.join(also)}." if also else ""),
            f"`retain_budget` is {budget} unless given.",
            table(model, {"name", *shared}),
        ]
    parts += ["### an objective of your own", inspect.getdoc(own)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(model, without=()):
    """Return a line for each field: name, type with its bounds, default, description."""
    lines = []
    for name, field in model.model_fields.items():
        if name in without:
            continue
        kind = SOURCES.get(name) or LINKED.get(name) or shown(field.annotation)
        bounds = [
            f"{sign} {value:g}"
            for limit in field.metadata
            for word, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if (value := getattr(limit, word, None)) is not None
        ]
        lines.append(line(f"`{name}`", ", ".join([kind, *bounds]), default_of(field), field.description or ""))
    return "| field | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(lines) if lines else ""


def default_of(field):
    """Return a field's default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = getattr(value, "kind", None) or value.name
    return "`" + (value if isinstance(value, str) else json.dumps(value)) + "`"


def shown(annotation: Any) -> str:
    """Return a type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else shown(one) for one in arguments)
    if origin is Annotated:
        return shown(arguments[0])
    if origin is list:
        return f"list of {shown(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, str(annotation))


def line(*cells):
    """Return a line of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    main()
