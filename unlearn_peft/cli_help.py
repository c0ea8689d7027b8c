"""`unlearn-peft --help`, quickly: it lists commands, and does not need their parameters."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from typer.models import CommandInfo


def show_help(app: typer.Typer) -> None:
    """Print what `app` prints for --help, and end: to be called where that is the whole command line."""
    _bare(app)(["--help"])


def _bare(app: typer.Typer) -> typer.Typer:
    """Return a copy whose commands have names and help alone: to build their parameters takes long."""
    bare = copy.copy(app)
    bare.registered_commands = [_without_parameters(command) for command in app.registered_commands]
    bare.registered_groups = [copy.copy(group) for group in app.registered_groups]
    for group in bare.registered_groups:
        if group.typer_instance:
            group.typer_instance = _bare(group.typer_instance)
    return bare


def _without_parameters(command: CommandInfo) -> CommandInfo:
    def nothing() -> None: ...

    if command.callback:
        nothing.__name__, nothing.__doc__ = command.callback.__name__, command.callback.__doc__
    bare = copy.copy(command)
    bare.callback = nothing
    return bare
