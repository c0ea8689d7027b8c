"""An adapter from the Hub, an HTTPS mirror, an archive or a folder -> a checked folder, whole or not at all.

`NAME.source.json` beside the folder says where it is from; for the Hub by the commit, never only by a branch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import AdapterError, OutputError, safe_repr
from ...files.atomic import atomic_file, atomic_folder
from ...files.paths import cache_folder
from ...files.untrusted import list_files, sha256_of, strict_json
from ..bundle import Bundle
from ..read import read_bundle
from ..trust import NEEDED, Trust
from ..write import check_output
from .archive import MAX_BYTES, allowed, max_file_bytes, unpack
from .download import Expected, check_url, fetch, read
from .sources import Source, parse

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_RESPONSE_BYTES = 20_000_000


@dataclass(frozen=True)
class Pulled:
    """A checked adapter's folder, and where it is from. `commit` is the Hub's, `sha256` an archive's."""

    path: Path
    source: str
    identity: str
    commit: str | None = None
    sha256: str | None = None
    signed_by: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256


def pull(
    name: str,
    output: str | Path | None = None,
    *,
    offline: bool | None = None,
    trust: Trust | None = None,
    insecure: bool = False,
    max_bytes: int = MAX_BYTES,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pulled:
    """Get an adapter and check it before its folder appears; `attach` takes the `.path` of what is returned.

    Args:
        name: `hub:OWNER/NAME[@REVISION]`, `https://...#sha256=...`, an archive (.tar, .tar.gz) or a folder.
        output: the new folder; None: in the cache, which serves later calls.
        offline: ask no server. None: see `HF_HUB_OFFLINE`.
        trust: see `read_bundle`.
        insecure: allow HTTP, and archives from a server without a sha256.
        max_bytes: for all files together, checked before and during a download.
        endpoint: of the Hub; None: see `HF_ENDPOINT`.
        token: for the Hub; None: that of `hf auth login`.

    Raises:
        AdapterError: if it cannot be downloaded, or is refused; all that is left is what the next try can use.
        OutputError: if `output` holds something else than an adapter, or cannot be written.
    """
    source = parse(name)
    if output is not None:
        check_output(Path(output))
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    home = cache_folder() / "adapters"
    commit = sha256 = None
    if source.kind == "hub":
        place, commit = _from_hub(source, home, offline, insecure, max_bytes, endpoint, token)
    elif source.kind == "https":
        place, sha256 = _from_https(source, home, offline, insecure, max_bytes)
    elif source.kind == "archive":
        place, sha256 = _from_archive(Path(source.where), home, max_bytes)
    else:
        place = Path(source.where)
    bundle = _read(place, name, trust)
    files = digests(place)
    noted = _json_or_empty(_source_file(place)).get("files")  # as they were pulled into the cache
    if source.kind != "folder" and isinstance(noted, dict) and noted not in ({}, files):
        changed = ", ".join(sorted(name for name in noted.keys() | files if noted.get(name) != files.get(name)))
        raise AdapterError(f"{place} is not what was pulled into it ({changed} differs): delete it, and pull again")
    if output is not None:
        bundle = copy_adapter(place, files, Path(output), name, trust)
    origin = name.removesuffix("@") if commit else source.where
    pulled = Pulled(Path(output or place), origin, bundle.identity, commit, sha256, bundle.signed_by, files)
    if source.kind != "folder":
        _write_source(replace(pulled, path=place))
    if output is not None:
        _write_source(pulled)
    return pulled


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file in a folder that an adapter may have."""
    return {name: sha256_of(folder / name) for name in list_files(folder) if allowed(name)}


def copy_adapter(place: Path, files: Iterable[str], output: Path, name: str, trust: Trust | None) -> Bundle:
    """Copy an adapter's files into a new folder, which appears once they were read; errors call it `name`."""
    with atomic_folder(output, replace=True) as folder:
        for file in files:
            shutil.copyfile(place / file, folder / file)
        bundle = _read(folder, name, trust)
        _source_file(output).unlink(missing_ok=True)  # at no moment may it describe another adapter
        return bundle


def _from_hub(
    source: Source, home: Path, offline: bool, insecure: bool, max_bytes: int, endpoint: str | None, token: str | None
) -> tuple[Path, str]:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    server = (endpoint or constants.ENDPOINT).rstrip("/")
    key = hashlib.sha256(server.encode()).hexdigest()[:8]  # the same name may mean another adapter on another Hub
    home = home / f"{source.where.replace('/', '--')}-{key}"
    revision = source.revision or "main"
    known = home / "revisions.json"
    if _COMMIT.fullmatch(revision) and (home / revision).is_dir():
        return home / revision, revision
    if offline:
        commit = str(_json_or_empty(known).get(revision))
        if not (_COMMIT.fullmatch(commit) and (home / commit).is_dir()):
            raise AdapterError(
                f"hub:{source.where}@{revision} is not in the cache ({home}), and no server may be asked: pull it once "
                "without --offline and HF_HUB_OFFLINE"
            )
        return home / commit, commit
    check_url(server, insecure)
    headers = {name: str(value) for name, value in build_hf_headers(token=token).items()}
    commit, listing = _listed(source, revision, server, headers, insecure, max_bytes)
    place = home / commit
    if not place.is_dir():
        downloads = home / f".{commit}.parts"  # outlives an interruption
        home.mkdir(parents=True, exist_ok=True)
        needed = 2 * sum(expected.size or 0 for expected in listing.values())
        if (free := shutil.disk_usage(home).free) < needed:
            raise OutputError(f"{home} has {free / 1e6:.0f} MB left, the adapter needs {needed / 1e6:.0f}: free some")
        for file, expected in listing.items():
            url = hf_hub_url(source.where, file, revision=commit, endpoint=server)
            fetch(url, downloads / file, expected, headers=headers, insecure=insecure)
        with atomic_folder(place) as folder:
            try:
                for file in listing:
                    shutil.copyfile(downloads / file, folder / file)
                _read(folder, f"hub:{source.where}@{commit}", None)
            finally:  # before the folder appears: after a kill nobody would delete them
                shutil.rmtree(downloads, ignore_errors=True)
    if revision != commit:  # for a branch or tag; a commit's next pull comes no further than its folder
        with atomic_file(known) as temporary:
            temporary.write_text(json.dumps({**_json_or_empty(known), revision: commit}, indent=2) + "\n")
    return place, commit


def _listed(
    source: Source, revision: str, server: str, headers: dict[str, str], insecure: bool, max_bytes: int
) -> tuple[str, dict[str, Expected]]:
    """Ask the Hub for a revision's commit and files; refuse too many bytes before they are downloaded."""
    name = f"hub:{source.where}@{revision}"
    url = f"{server}/api/models/{source.where}/revision/{quote(revision, safe='')}?blobs=true"
    status, body = read(url, _MAX_RESPONSE_BYTES, headers=headers, insecure=insecure)
    if status in (401, 403):
        raise AdapterError(f"{name} does not exist, or you may not read it (status {status}): `hf auth login` signs in")
    if status == 404:
        raise AdapterError(f"{name} is not on the Hub at {server}: check the owner, the name and the revision")
    if status != 200:
        raise AdapterError(f"the Hub at {server} answered with status {status} for {name}: try again later")
    try:
        answer = strict_json(body)
        commit = answer["sha"]
        if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise ValueError("it gives no commit")
        if _COMMIT.fullmatch(revision) and commit != revision:
            raise ValueError(f"it gives commit {commit} for another one")
        listing = {}
        for entry in answer["siblings"]:
            file = entry["rfilename"]
            if not (isinstance(file, str) and allowed(file)):
                continue  # not downloaded: code, pickles, checkpoints, names with paths
            large = entry.get("lfs") or {}
            size, sha256, git = large.get("size", entry.get("size")), large.get("sha256"), entry.get("blobId")
            if type(size) is not int or size < 0 or (sha256 is None and git is None):
                raise ValueError(f"it gives no size or no digest for {file}")
            if file in listing:
                raise ValueError(f"it names {file} twice")
            listing[file] = Expected(max_file_bytes(file, max_bytes), size, sha256, None if sha256 else git)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the Hub at {server} gave no usable answer for {name} ({error})") from None
    if missing := [file for file in NEEDED if file not in listing]:
        raise AdapterError(f"{name} holds no {' and no '.join(missing)}: expected an adapter as PEFT writes it")
    total = 0
    for file, expected in listing.items():
        total += expected.size or 0
        if (expected.size or 0) > expected.max_bytes or total > max_bytes:
            raise AdapterError(
                f"{name} is too large: {file} has {expected.size:,} bytes, expected at most {expected.max_bytes:,}, "
                f"and {max_bytes:,} for all (--max-size)"
            )
    return commit, listing


def _from_https(source: Source, home: Path, offline: bool, insecure: bool, max_bytes: int) -> tuple[Path, str]:
    url, sha256 = source.where, source.sha256
    archive = home / ".downloads" / (sha256 or hashlib.sha256(url.encode()).hexdigest()) / "adapter.tar.gz"
    if sha256 and (home / f"sha256-{sha256}").is_dir():
        archive.unlink(missing_ok=True)  # left by a process that was killed
        return home / f"sha256-{sha256}", sha256
    if sha256 is None and not insecure:
        raise AdapterError(
            f"{safe_repr(url)} has no digest: add the one that its author gave you, {url}#sha256=..., or --insecure to "
            "take whatever comes"
        )
    if offline:
        raise AdapterError(f"{safe_repr(url)} is not in the cache, and no server may be asked (--offline)")
    check_url(url, insecure)
    archive.unlink(missing_ok=True)
    try:
        fetch(url, archive, Expected(max_bytes, sha256=sha256), insecure=insecure)
        return _from_archive(archive, home, max_bytes)
    finally:
        archive.unlink(missing_ok=True)


def _from_archive(archive: Path, home: Path, max_bytes: int) -> tuple[Path, str]:
    sha256 = sha256_of(archive)
    place = home / f"sha256-{sha256}"
    if not place.is_dir():
        with atomic_folder(place) as folder:
            unpack(archive, folder, max_bytes)
            _read(folder, archive.name, None)
    return place, sha256


def _read(place: Path, name: str, trust: Trust | None) -> Bundle:
    """Read an adapter; errors call it by `name`."""
    try:
        return read_bundle(place, trust=trust)
    except AdapterError as error:
        raise AdapterError(str(error).replace(f"the adapter {place}", f"the adapter {name}")) from None


def _write_source(pulled: Pulled) -> None:
    """Write beside a folder where it is from. Not into it: a signature covers all that is there."""
    facts = {**asdict(pulled), "path": pulled.path.absolute().name, "pulled": datetime.now(timezone.utc).isoformat()}
    with atomic_file(_source_file(pulled.path)) as temporary:
        temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _source_file(place: Path) -> Path:
    path = place.absolute()
    return path.with_name(f"{path.name}.source.json")


def _json_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object that this module wrote into the cache; empty if it is missing or damaged."""
    try:
        return strict_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
