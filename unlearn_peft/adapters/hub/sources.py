"""The name of an adapter that is somewhere else -> where it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import AdapterError, safe_repr
from .archive import ENDINGS

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,95}/[A-Za-z0-9][A-Za-z0-9._\-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-/]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """Where an adapter is: `kind` is hub, https, archive or folder."""

    kind: str
    where: str  # owner/name, URL or path
    revision: str | None = None
    sha256: str | None = None


def parse(name: str) -> Source:
    """Parse `hub:owner/name@revision`, `https://...#sha256=...`, or the path of an archive or a folder."""
    if name.startswith("hub:"):
        repository, _, revision = name.removeprefix("hub:").partition("@")
        if not _REPOSITORY.fullmatch(repository) or ".." in repository:
            raise AdapterError(f"{safe_repr(name)} names no repository of the Hub: expected hub:owner/name@revision")
        if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise AdapterError(f"{safe_repr(revision)} is no revision: expected a commit, a tag or a branch")
        return Source("hub", repository, revision or None)
    if name.startswith(("https://", "http://")):
        url, _, fragment = name.partition("#")
        sha256 = fragment.removeprefix("sha256=").lower() if fragment else None
        if sha256 is not None and not (fragment.startswith("sha256=") and _SHA256.fullmatch(sha256)):
            raise AdapterError(f"{safe_repr(fragment)} is no digest: expected #sha256= and 64 hexadecimal digits")
        return Source("https", url, sha256=sha256)
    if ":" in name.split("/")[0] and not Path(name).exists():
        raise AdapterError(f"{safe_repr(name)} is unknown: expected hub:..., https://..., an archive or a folder")
    return Source("archive" if name.endswith(ENDINGS) and not Path(name).is_dir() else "folder", name)
