"""Adapters to and from elsewhere: the Hub, HTTPS mirrors, archives, folders.

A name such as `hub:owner/name@revision` comes in; a checked folder goes out, in the cache or where it is wanted, whole
or not at all. Beside it, `NAME.source.json` says where it is from: of the Hub always the commit, never just a branch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

from ...errors import AdapterError, OutputError, safe_repr
from ...files.atomic import atomic_file, atomic_folder
from ...files.paths import cache_folder
from ...files.untrusted import list_files, sha256_of, strict_json
from ..bundle import Bundle
from ..read import read_bundle
from ..trust import SIGNABLE, Trust
from ..write import check_output
from .archive import MAX_BYTES, allowed, max_file_bytes, unpack
from .download import Expected, check_url, fetch, read
from .sources import Source, parse

NEEDED = SIGNABLE[:2]  # weights and config
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_ANSWER_BYTES = 20_000_000


@dataclass(frozen=True)
class Pulled:
    """A checked adapter's folder, and where it is from. `commit` is of the Hub, `sha256` of an archive."""

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
    """Get an adapter, check all of it, and only then let its folder appear; `.path` is what `attach` takes.

    Args:
        name: `hub:OWNER/NAME[@REVISION]`, `https://...#sha256=...`, an archive (.tar, .tar.gz) or a folder.
        output: the new folder; None: the cache, from which it is taken the next time.
        offline: ask no server. None: as `HF_HUB_OFFLINE` says.
        trust: whose signatures are taken, and whether one is needed.
        insecure: allow HTTP, and archives from a server without a sha256.
        max_bytes: for all files together, looked at before they are downloaded, and while they are.
        endpoint: of the Hub; None: as `HF_ENDPOINT` says.
        token: for the Hub; None: as `hf auth login` left it.

    Raises:
        AdapterError: if it cannot be had, or is refused; nothing is left behind but what a next try can use.
        OutputError: if `output` holds something else than an adapter, or cannot be written.
    """
    source = parse(name)
    if output is not None:
        check_output(Path(output))
    if offline is None:
        offline = _hub_is_offline()
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
    files = {file: sha256_of(place / file) for file in list_files(place) if allowed(file)}
    if source.kind != "folder" and (noted := _noted(place)) not in ({}, files):
        changed = ", ".join(sorted(name for name in noted.keys() | files if noted.get(name) != files.get(name)))
        raise AdapterError(f"{place} is not what was pulled into it ({changed} differs): delete it, and pull again")
    if output is not None:
        bundle = _copy(place, files, Path(output), name, trust)
    shown_name = f"hub:{source.where}" + (f"@{source.revision}" if source.revision else "") if commit else source.where
    pulled = Pulled(
        place if output is None else Path(output), shown_name, bundle.identity, commit, sha256, bundle.signed_by, files
    )
    if source.kind != "folder":
        _note(replace(pulled, path=place))
    if output is not None:
        _note(pulled)
    return pulled


def _from_hub(
    source: Source, home: Path, offline: bool, insecure: bool, most: int, endpoint: str | None, token: str | None
) -> tuple[Path, str]:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    server = (endpoint or constants.ENDPOINT).rstrip("/")
    key = hashlib.sha256(server.encode()).hexdigest()[:8]  # two hubs may have one name for two things
    home = home / f"{source.where.replace('/', '--')}-{key}"
    revision = source.revision or "main"
    known = home / "revisions.json"
    if _COMMIT.fullmatch(revision) and (home / revision).is_dir():
        return home / revision, revision
    if offline:
        commit = _revisions(known).get(revision, "")
        if not (_COMMIT.fullmatch(commit) and (home / commit).is_dir()):
            raise AdapterError(
                f"hub:{source.where}@{revision} is not in the cache ({home}), and no server may be asked: pull it once "
                "without --offline and HF_HUB_OFFLINE"
            )
        return home / commit, commit
    check_url(server, insecure)
    headers = {name: str(value) for name, value in build_hf_headers(token=token).items()}
    commit, wanted = _listed(source, revision, server, headers, insecure, most)
    place = home / commit
    if not place.is_dir():
        downloads = home / f".{commit}.parts"  # outlives an interruption
        _need_room(home, sum(expected.size or 0 for expected in wanted.values()))
        for file, expected in wanted.items():
            url = hf_hub_url(source.where, file, revision=commit, endpoint=server)
            fetch(url, downloads / file, expected, headers=headers, insecure=insecure)
        with atomic_folder(place) as folder:
            try:
                for file in wanted:
                    shutil.copyfile(downloads / file, folder / file)
                _read(folder, f"hub:{source.where}@{commit}", None)
            finally:  # before the folder appears: a kill leaves nothing that nobody would look for again
                shutil.rmtree(downloads, ignore_errors=True)
    with atomic_file(known) as temporary:
        temporary.write_text(json.dumps({**_revisions(known), revision: commit}, indent=2) + "\n")
    return place, commit


def _listed(
    source: Source, revision: str, server: str, headers: dict[str, str], insecure: bool, most: int
) -> tuple[str, dict[str, Expected]]:
    """Ask the Hub which commit a revision is, and what its files are; refuse too much before it is downloaded."""
    told = f"hub:{source.where}@{revision}"
    url = f"{server}/api/models/{source.where}/revision/{quote(revision, safe='')}?blobs=true"
    status, body = read(url, _MAX_ANSWER_BYTES, headers=headers, insecure=insecure)
    if status in (401, 403):
        raise AdapterError(f"{told} is not there, or not for you (status {status}): `hf auth login` signs in")
    if status == 404:
        raise AdapterError(f"{told} is not on the Hub at {server}: see the owner, the name and the revision")
    if status != 200:
        raise AdapterError(f"the Hub at {server} answered with status {status} for {told}: try again later")
    try:
        answer = strict_json(body)
        commit = answer["sha"]
        if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise ValueError("its commit is none")
        if _COMMIT.fullmatch(revision) and commit != revision:
            raise ValueError(f"it gives commit {commit} for another one")
        wanted = {}
        for entry in answer["siblings"]:
            file = entry["rfilename"]
            if not (isinstance(file, str) and allowed(file)):
                continue  # not downloaded: code, pickles, checkpoints, names with paths
            large = entry.get("lfs") or {}
            size, sha256, git = large.get("size", entry.get("size")), large.get("sha256"), entry.get("blobId")
            if type(size) is not int or size < 0 or (sha256 is None and git is None):
                raise ValueError(f"it gives no size or no digest for {file}")
            if file in wanted:
                raise ValueError(f"it names {file} twice")
            wanted[file] = Expected(max_file_bytes(file, most), size, sha256, None if sha256 else git)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the Hub at {server} gave no usable answer for {told} ({error})") from None
    if missing := [file for file in NEEDED if file not in wanted]:
        raise AdapterError(f"{told} holds no {' and no '.join(missing)}: expected an adapter as PEFT writes it")
    total = 0
    for file, expected in wanted.items():
        total += expected.size or 0
        if (expected.size or 0) > expected.most or total > most:
            raise AdapterError(
                f"{told} is too large: {file} has {expected.size:,} bytes, expected at most {expected.most:,}, and "
                f"{most:,} for all (--max-size)"
            )
    return commit, wanted


def _from_https(source: Source, home: Path, offline: bool, insecure: bool, most: int) -> tuple[Path, str]:
    url, sha256 = source.where, source.sha256
    archive = home / ".downloads" / (sha256 or hashlib.sha256(url.encode()).hexdigest()) / "adapter.tar.gz"
    if sha256 and (home / f"sha256-{sha256}").is_dir():
        archive.unlink(missing_ok=True)  # of one that was killed
        return home / f"sha256-{sha256}", sha256
    if sha256 is None and not insecure:
        raise AdapterError(
            f"{safe_repr(url)} has no digest: say which file you mean, {url}#sha256=..., as whoever made it told you "
            "by another way; or --insecure to take whatever comes"
        )
    if offline:
        raise AdapterError(f"{safe_repr(url)} is not in the cache, and no server may be asked (--offline)")
    check_url(url, insecure)
    archive.unlink(missing_ok=True)
    try:
        fetch(url, archive, Expected(most, sha256=sha256), insecure=insecure)
        return _from_archive(archive, home, most)
    finally:
        archive.unlink(missing_ok=True)


def _from_archive(archive: Path, home: Path, most: int) -> tuple[Path, str]:
    sha256 = sha256_of(archive)
    place = home / f"sha256-{sha256}"
    if not place.is_dir():
        with atomic_folder(place) as folder:
            unpack(archive, folder, most)
            _read(folder, archive.name, None)
    return place, sha256


def _read(place: Path, name: str, trust: Trust | None) -> Bundle:
    """Read an adapter, and call it by the name that was asked for."""
    try:
        return read_bundle(place, trust=trust)
    except AdapterError as error:
        raise AdapterError(str(error).replace(f"the adapter {place}", f"the adapter {name}")) from None


def _copy(place: Path, files: dict[str, str], output: Path, name: str, trust: Trust | None) -> Bundle:
    with atomic_folder(output, replace=True) as folder:
        for file in files:
            shutil.copyfile(place / file, folder / file)
        bundle = _read(folder, name, trust)
        _note_of(output).unlink(missing_ok=True)  # at no moment does it tell of another adapter
        return bundle


def _noted(place: Path) -> dict[str, str]:
    """Return the digests of the files that were pulled into a folder of the cache; empty if they are not known."""
    try:
        files = strict_json(_note_of(place).read_bytes())["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _note(pulled: Pulled) -> None:
    """Write down beside a folder where it is from. Not in it: a signature covers all that is there."""
    facts = {**asdict(pulled), "path": pulled.path.absolute().name, "pulled": datetime.now(timezone.utc).isoformat()}
    with atomic_file(_note_of(pulled.path)) as temporary:
        temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _note_of(place: Path) -> Path:
    path = place.absolute()
    return path.with_name(f"{path.name}.source.json")


def _revisions(path: Path) -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in strict_json(path.read_bytes()).items()}
    except (OSError, ValueError):
        return {}


def _need_room(place: Path, size: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < 2 * size:
        raise OutputError(f"{place} has {free / 1e6:.0f} MB left, the adapter needs {2 * size / 1e6:.0f}: free some")


def _hub_is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
