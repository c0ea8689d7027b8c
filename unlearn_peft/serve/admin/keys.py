"""Keys of the admin port: a YAML file of names, each with the sha256 of a key, and whether it may write.

ops: {sha256: 9f86..., write: true}
dashboard: {sha256: 60fd...}
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from ...errors import OutputError, PolicyError
from ...files.atomic import atomic_file
from ...files.strict_yaml import read_yaml
from ..policy.entries import Digest, Name
from ..policy.policy import key_digest


class AdminKey(BaseModel, extra="forbid", frozen=True):
    """A key of the admin port; without `write` it may only look."""

    sha256: Digest
    write: bool = False


_FILE = TypeAdapter(dict[Name, AdminKey])


def read_admin_keys(path: Path) -> dict[str, AdminKey]:
    """Return the keys of a file by their names.

    Raises:
        PolicyError: the file cannot be read or is not valid. It quotes none of its values.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        keys = _FILE.validate_python(read_yaml(path) or {})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"] if part != "[key]")
        raise PolicyError(f"{path} is no file of admin keys: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"cannot read the admin keys {path}: {getattr(error, 'strerror', None) or error}") from None
    if len({key.sha256 for key in keys.values()}) < len(keys):
        raise PolicyError(f"{path} is no file of admin keys: two names have one key, so who did what would be unknown")
    return keys


def find_admin_key(path: Path, api_key: str) -> tuple[str, AdminKey] | None:
    """Return the name and entry of a key; None: it is not known. The file is read each time: a change counts at once.

    Raises:
        PolicyError: see `read_admin_keys`.
    """
    digest = key_digest(api_key)
    return next(((name, key) for name, key in read_admin_keys(path).items() if key.sha256 == digest), None)


def make_admin_key(path: Path, name: str, write: bool) -> str:
    """Add a new key to a file, which is made if it does not exist, and return it; a name's older key is replaced.

    Raises:
        PolicyError: the name is none, or the file is not valid.
        OutputError: it cannot be written.
    """
    keys: dict[str, Any] = {}
    if path.exists():
        keys = {each: key.model_dump() for each, key in read_admin_keys(path).items()}
    api_key = f"ua-{secrets.token_urlsafe(32)}"
    keys[name] = {"sha256": key_digest(api_key), "write": write}
    try:
        _FILE.validate_python(keys)
    except ValidationError as error:
        raise PolicyError(error.errors(include_input=False)[0]["msg"].removeprefix("Value error, ")) from None
    try:
        with atomic_file(path, mode=0o600) as temporary:
            temporary.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    return api_key
