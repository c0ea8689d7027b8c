"""Write reference/cli.md and reference/recipe.md from the commands and settings in the code.

    python docs/generate.py

`make docs` runs it before each build. The pages are in git, so that they can be read on GitHub;
tests/test_docs.py fails where they are out of date.
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
    """Return a section for each command, in the order of `unlearn-peft --help`."""
    root = typer.main.get_command(app)
    parts = [f"# Command line\n\n{MADE}\n`unlearn-peft COMMAND --help` says the same in the terminal."]
    for name, command in root.commands.items():
        parts += section(f"unlearn-peft {name}", command)
    return "\n\n".join(parts) + "\n"


def section(name, command, level=2):
    """Return a command's heading, usage, help, arguments and options; then those of its own commands."""
    parameters = [p for p in command.params if p.name != "help" and not p.hidden]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    names = [display_name(argument) + "..." * (argument.nargs == -1) for argument in arguments]
    usage = " ".join([name, *names, "[OPTION]..."]) if parameters else f"{name} COMMAND"
    parts = [f"{'#' * level} {name}", f"`{usage}`", *paragraphs(command.help or "")]
    if parameters:
        lines = [parameter_line(parameter) for parameter in parameters]
        parts.append("| argument or option | default | meaning |\n|---|---|---|\n" + "\n".join(lines))
    for inner, subcommand in getattr(command, "commands", {}).items():
        parts += section(f"{name} {inner}", subcommand, level + 1)
    return parts


def parameter_line(parameter):
    """Return the table's line for an argument or option."""
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [display_name(parameter)]
    meaning = getattr(parameter, "help", None) or ""
    if parameter.multiple and "repeat" not in meaning:
        meaning += " Repeatable."
    if variable := parameter.envvar:
        meaning += f" Also: `${variable}`."
    default = f"`{getattr(parameter.default, 'value', parameter.default)}`"
    if parameter.required:
        default = "required"
    elif parameter.default is None or isinstance(parameter.default, bool):
        default = "on" if parameter.default else ""
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        meaning += f" One of `{'`, `'.join(choice.value for choice in kind)}`."
    return line(", ".join(f"`{name}`" for name in names), default, meaning.strip())


def display_name(argument):
    """Return an argument's name as in the usage line."""
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
    custom = objective_settings.CustomObjectiveSettings
    shared = set(objective_settings.ObjectiveSettings.model_fields) - {"name"}
    parts = [
        f"# Recipes\n\n{MADE.strip()}",
        "A recipe is a flat YAML file; `unlearn(...)` takes the same fields as keywords, and on the command line "
        "`--set field=value` overrides one (`--set adapter.r=16`). Unknown fields are refused. Only `forget` is "
        "required.",
        inspect.getdoc(recipe.Recipe),
        table(recipe.Recipe),
        "## Rows",
        f"{inspect.getdoc(recipe.DataSpec)} A string is short for `path`; a list contains the rows "
        "themselves. Relative paths start at the recipe's folder.",
        table(recipe.DataSpec),
        "## adapter",
        "A string is short for the kind: `adapter: lora`.",
    ]
    for model in (recipe.LoraSettings, recipe.HeadSettings):
        parts += [f"### kind: {model.model_fields['kind'].default}", inspect.getdoc(model), table(model, {"kind"})]
    parts += [
        "## objective",
        "A string is short for the name: `objective: npo`. All have these guards. What each does, with its source: "
        "[design](../design.md#other-objectives).",
        table(objective_settings.ObjectiveSettings, {"name"}),
        "### stop_when",
        inspect.getdoc(objective_settings.StopWhen),
        table(objective_settings.StopWhen),
    ]
    for name, model in objective_settings.SETTINGS.items():
        also = [f"`{alias}`" for alias, full_name in objective_settings.ALIASES.items() if full_name == name]
        defaults = [(name, model.model_fields[name].default) for name in ("retain_budget", "scale_back")]
        given = " and ".join(f"`{name}` is {value}" for name, value in defaults if value is not None)
        parts += [
            f"### name: {name}",
            inspect.getdoc(model) + (f" Also called {', '.join(also)}." if also else ""),
            f"{given} unless given.",
            table(model, {"name", *shared}),
        ]
    parts += ["### name: module:function", inspect.getdoc(custom)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(model, without=()):
    """Return a line for each field: name, type with its bounds, default, description."""
    lines = []
    for name, field in model.model_fields.items():
        if name in without:
            continue
        kind = SOURCES.get(name) or LINKED.get(name) or yaml_type(field.annotation)
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


def yaml_type(annotation: Any) -> str:
    """Return a type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else yaml_type(part) for part in arguments)
    if origin is Annotated:
        return yaml_type(arguments[0])
    if origin is list:
        return f"list of {yaml_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(annotation, str(annotation))


def line(*cells):
    """Return a line of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    main()
