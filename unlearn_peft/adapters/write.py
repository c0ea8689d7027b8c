"""A new adapter directory, written whole or not at all, and later changes to its manifest."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError, refuse
from ..files.atomic import atomic_file, atomic_folder, check_target
from ..files.untrusted import sha256_of
from .bundle import CONFIG, MANIFEST
from .read import read_json
from .trust import SIGNATURE
from .validate import SCHEMA_VERSION, check_manifest

logger = logging.getLogger(__name__)


@contextmanager
def new_bundle(path: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder for an adapter's files; it becomes `path`, with its manifest, when the block ends."""
    check_output(path)
    with atomic_folder(path, replace=True) as folder:
        yield folder
        files = {file.name: sha256_of(file, sys.maxsize) for file in sorted(folder.iterdir())}
        text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest, "files": files}, indent=2, sort_keys=True)
        (folder / MANIFEST).write_text(text + "\n")


def note_digest(path: Path, name: str) -> None:
    """Update the digest of a file in an adapter's manifest, if it has one, after the file was changed on purpose."""
    if (path / SIGNATURE).exists():
        logger.warning("%s was changed, so the signature of %s no longer holds: sign it again", name, path)
    if not (path / MANIFEST).is_file():
        return
    problems: list[str] = []
    manifest = read_json(path / MANIFEST, {}, problems) or {}
    if problems := problems or check_manifest(manifest):
        refuse(f"the adapter {path} is refused", problems)
    manifest["files"] = {**manifest.get("files", {}), name: sha256_of(path / name, sys.maxsize)}
    with atomic_file(path / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def check_output(path: Path) -> None:
    """Raise an OutputError if `path` is anything but an adapter, a new or an empty folder."""
    check_target(path)
    if path.is_file():
        raise OutputError(f"the output {path} is a file: choose a new folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        some = ", ".join(sorted(file.name for file in path.iterdir())[:3])
        raise OutputError(
            f"the output folder {path} holds something else ({some} ...): expected a new or empty folder, or an "
            "earlier adapter to replace. Choose another with --output."
        )
