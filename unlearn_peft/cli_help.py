"""`unlearn-peft --help`, in half the time: it lists commands, and needs neither their parameters nor all of rich."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from typer.models import CommandInfo

_UNUSED = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}  # typer imports them, our help has neither


def show_help(app: typer.Typer) -> None:
    """Print what `app` prints for --help, and end: to be called where that is the whole command line."""
    _import_rich()
    _bare(app)(["--help"])


def _import_rich() -> None:
    """Import what typer prints help with, but for the modules (and their own imports) that go unused."""
    unused = {module: name for module, name in _UNUSED.items() if module not in sys.modules}
    for module, name in unused.items():
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, type(name, (), {}))
    with suppress(Exception):  # another version of typer may want more: then it imports all, by itself
        import typer.rich_utils  # noqa: F401
    for module in unused:
        del sys.modules[module]


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
