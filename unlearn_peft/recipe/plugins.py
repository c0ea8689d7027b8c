"""The user's own functions, named `module:function` or `file.py:function` in a local recipe or on the command line.

The module is imported, so its code runs: names from an adapter's directory never come here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import UnlearnError


def load_function(
    name: str, what: str, known: Collection[str] = (), error: type[UnlearnError] = UnlearnError
) -> Callable[..., Any]:
    """Return the function that `module:function` or `file.py:function` names.

    Args:
        name: a file's path in it is relative to the working folder.
        what: the kind of function, for the error, e.g. `objective`.
        known: the package's own names, for the error.
        error: the class to raise.

    Raises:
        UnlearnError: `error`, if there is no such module, file or function.
    """
    place, _, function = name.rpartition(":")
    try:
        module = (
            _load_file(Path(os.path.expanduser(place))) if place.endswith(".py") else importlib.import_module(place)
        )
        result = getattr(module, function)
    except (Exception, SystemExit) as problem:  # whatever the module does while it is imported
        names = f"one of {', '.join(known)}, or " if known else ""
        raise error(
            f"cannot load the {what} '{name}' ({type(problem).__name__}: {problem}): expected {names}'module:function' "
            "or 'file.py:function'"
        ) from problem
    if not callable(result):
        raise error(f"the {what} '{name}' is {type(result).__name__}, expected a function")
    return result  # type: ignore[no-any-return]


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
