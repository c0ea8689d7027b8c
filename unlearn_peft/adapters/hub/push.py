"""An adapter -> the Hub, an archive or a folder; it is checked before it is sent."""

from __future__ import annotations

from pathlib import Path

from ...errors import AdapterError, first_line, safe_repr
from ...files.untrusted import sha256_of
from ..read import read_bundle
from ..trust import Trust
from ..write import check_output
from .archive import pack
from .download import check_url
from .pull import Pulled, copy_adapter, digests
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
    """Check an adapter, put it onto the Hub, into an archive or into a folder, and return where it is now.

    Only the files that an adapter may have are sent. `name`, `endpoint`, `token` and `trust` are as for `pull`, but the
    name is no URL, and its revision is a branch that exists. `private` is for a repository that is created now.

    Raises:
        AdapterError: if it is refused, here or by the Hub.
        OutputError: if the archive or folder cannot be written.
    """
    target, adapter = parse(name), Path(adapter)
    bundle = read_bundle(adapter, trust=trust)
    files = digests(adapter)
    commit = sha256 = None
    if target.kind == "https":
        raise AdapterError("cannot push to a web server: push into an archive, and upload that")
    if target.kind == "archive":
        pack(adapter, Path(target.where))
        sha256 = sha256_of(Path(target.where))
    elif target.kind == "folder":
        check_output(Path(target.where))
        copy_adapter(adapter, files, Path(target.where), str(adapter), trust)
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
        why = safe_repr(first_line(error), 300)
        raise AdapterError(f"the Hub at {api.endpoint} refused {target.where} ({why})") from None
    except (OSError, ValueError) as error:  # no network; a card that it does not take
        raise AdapterError(f"cannot push to the Hub at {api.endpoint} ({safe_repr(str(error), 300)})") from None
    return str(done.oid)
