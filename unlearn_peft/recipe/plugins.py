"""Functions of the user's own: `module:function` or `file.py:function`, named in a local recipe or on the command line.

A name comes in, a function goes out. What it names is imported, so it runs: names from an adapter's directory never
come here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UnlearnError


def load_function(
    name: str, what: str, known: Iterable[str] = (), error: type[UnlearnError] = UnlearnError
) -> Callable[..., Any]:
    """Return the function that `module:function` or `file.py:function` leads to.

    Args:
        name: the path; a file's is relative to the working folder.
        what: it is to be, for the message, e.g. `objective`.
        known: names of the package's own, for the message.
        error: to be raised.

    Raises:
        UnlearnError: `error`, if there is no such module, file or function.
    """
    place, _, function = name.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, function)
    except (ImportError, AttributeError, OSError, ValueError) as problem:
        own = "".join(f"{one}, " for one in known)
        raise error(
            f"cannot load the {what} '{name}' ({type(problem).__name__}: {problem}): expected "
            f"{f'one of {own}or ' if own else ''}'module:function' or 'file.py:function'"
        ) from problem
    if not callable(found):
        raise error(f"the {what} '{name}' is {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]


def _load_file(path: Path) -> Any:
    name = f"unlearn_peft_user:{path.absolute()}"  # no importable name, so it takes no other module's place
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for the module that they are in
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
