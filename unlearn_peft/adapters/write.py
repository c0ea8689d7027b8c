"""A new adapter directory, written whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError, refuse
from ..files.atomic import atomic_file, atomic_folder
from .bundle import CONFIG, MANIFEST
from .read import _json, sha256
from .trust import SIGNATURE
from .validate import SCHEMA_VERSION, check_manifest

logger = logging.getLogger(__name__)


@contextmanager
def new_bundle(path: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to put an adapter's files into; it becomes `path`, whole, with its manifest.

    Raises:
        OutputError: if `path` holds something else than an adapter, or cannot be written.
    """
    check_output(path)
    with atomic_folder(path, replace=True) as folder:
        yield folder
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest, "files": files}, indent=2, sort_keys=True)
        (folder / MANIFEST).write_text(text + "\n")


def note_digest(path: Path, name: str) -> None:
    """Note in an adapter's manifest, if it has one, that a file beside the weights and config was changed on purpose.

    Raises:
        AdapterError: if the manifest cannot be read.
        OutputError: if it cannot be written.
    """
    if (path / SIGNATURE).exists():
        logger.warning("%s was changed, so the signature of %s no longer holds: sign it again", name, path)
    if not (path / MANIFEST).is_file():
        return
    problems: list[str] = []
    manifest = _json(path / MANIFEST, {}, problems) or {}
    if problems := problems or check_manifest(manifest):
        refuse(f"the adapter {path} is refused", problems)
    manifest["files"] = {**manifest.get("files", {}), name: sha256(path / name)}
    with atomic_file(path / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def check_output(path: Path) -> None:
    """Refuse to write an adapter over something that is none.

    Raises:
        OutputError: saying what lies there.
    """
    if path.is_file():
        raise OutputError(f"the output {path} is a file: choose a new folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        some = ", ".join(sorted(file.name for file in path.iterdir())[:3])
        raise OutputError(
            f"the output folder {path} holds something else ({some} ...): expected a new or empty folder, or an "
            "earlier adapter to replace. Choose another with --output."
        )
