"""An adapter -> the Hub, an archive or a folder, checked before it is sent."""

from __future__ import annotations

from pathlib import Path

from ...errors import AdapterError, safe_repr
from ...files.untrusted import list_files, sha256_of
from ..read import read_bundle
from ..trust import Trust
from ..write import check_output
from .archive import allowed, pack
from .download import check_url
from .pull import Pulled, _copy
from .sources import Source, parse


def push(
    adapter: str | Path,
    name: str,
    *,
    private: bool = True,
    message: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    trust: Trust | None = None,
) -> Pulled:
    """Put an adapter onto the Hub, into an archive or into a folder; it is checked before.

    Args:
        adapter: its directory. Only the files that an adapter may have are sent.
        name: as for `pull`, but no address; of the Hub, the revision is a branch that exists.
        private: for a repository that is made now.
        message: of the commit.
        endpoint: see `pull`.
        token: see `pull`.
        trust: see `pull`.

    Returns:
        where it is now, with the new commit, or the archive's sha256.

    Raises:
        AdapterError: if it is refused, or the Hub refuses it.
        OutputError: if the archive or folder cannot be written.
    """
    target, adapter = parse(name), Path(adapter)
    bundle = read_bundle(adapter, trust=trust)
    files = {file: sha256_of(adapter / file) for file in list_files(adapter) if allowed(file)}
    commit = sha256 = None
    if target.kind == "https":
        raise AdapterError("a mirror is filled by its own means: push into an archive, and put that there")
    if target.kind == "archive":
        pack(adapter, Path(target.where))
        sha256 = sha256_of(Path(target.where))
    elif target.kind == "folder":
        check_output(Path(target.where))
        _copy(adapter, files, Path(target.where), str(adapter), trust)
    else:
        commit = _to_hub(adapter, list(files), target, private, message, endpoint, token)
        name = f"hub:{target.where}@{commit}"
    return Pulled(Path(target.where), name, bundle.identity, commit, sha256, bundle.signed_by, files)


def _to_hub(
    adapter: Path, files: list[str], target: Source, private: bool, message: str | None, endpoint: str | None,
    token: str | None,
) -> str:  # fmt: skip
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=endpoint, token=token)
    check_url(api.endpoint)
    try:
        api.create_repo(target.where, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=target.where, folder_path=adapter, allow_patterns=files, revision=target.revision,
            commit_message=message or "A forget adapter",
        )  # fmt: skip
    except HfHubHTTPError as error:
        why = (str(error).strip().splitlines() or ["no details"])[0]
        raise AdapterError(f"the Hub at {api.endpoint} refused {target.where} ({safe_repr(why, 300)})") from None
    except (OSError, ValueError) as error:  # no network; a card that it does not take
        raise AdapterError(f"cannot push to the Hub at {api.endpoint} ({safe_repr(str(error), 300)})") from None
    return str(done.oid)
