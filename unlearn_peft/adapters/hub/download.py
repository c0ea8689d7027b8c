"""One file from an HTTPS server that may be anybody's: bounded, resumed, and checked before it has a name.

A URL, a limit and a digest come in; a whole file goes out, or one error. What came before an interruption stays beside
as `.part`, and is gone on with by Range; a digest that does not hold throws it away.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from ...errors import AdapterError, safe_repr
from ...files.atomic import flush

_MAX_REDIRECTS = 5
_TRIES = 3
_LOCAL = ("localhost", "127.0.0.1", "::1")
_BLOCK = 1 << 20


class Expected(NamedTuple):
    """What a file must be. `git` is git's digest of a blob, which the Hub gives for small files; None: not known."""

    most: int  # bytes
    size: int | None = None
    sha256: str | None = None
    git: str | None = None


def check_url(url: str, insecure: bool = False) -> None:
    """Refuse what is not HTTPS; HTTP is for this machine, or with `insecure`.

    Raises:
        AdapterError: saying what it is.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise AdapterError(f"{safe_repr(url)} is no address") from None
    if parts.username or parts.password:
        raise AdapterError("an address with a password in it would be seen in logs: leave it out")
    if not host or parts.scheme not in ("http", "https"):
        raise AdapterError(f"{safe_repr(url)} is no address of a web server: expected https://...")
    if parts.scheme == "http" and host not in _LOCAL and not insecure:
        raise AdapterError(
            f"{safe_repr(url)} is not HTTPS: others on the way could read and change it. Use https://, or --insecure"
        )


def fetch(
    url: str,
    target: Path,
    expected: Expected,
    *,
    headers: Mapping[str, str] | None = None,
    insecure: bool = False,
) -> str:
    """Download into `target`, which is there only when everything holds; returns the sha256.

    Args:
        url: https, or http on this machine.
        target: a new file. What is downloaded already is in `target.part`.
        expected: what it must be.
        headers: sent to the first host only, e.g. with a token.
        insecure: allow http.

    Raises:
        AdapterError: naming what did not hold.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with FileLock(f"{part}.lock", timeout=600):
            if not target.exists():
                _into(part, url, expected, headers or {}, insecure)
                digest = _checked(part, url, expected)
                flush(part)
                os.replace(part, target)
                return digest
            return _checked(target, url, expected)
    except Timeout:
        raise AdapterError(
            f"another process has been downloading {safe_repr(url)} for ten minutes: wait for it"
        ) from None


def read(url: str, most: int, *, headers: Mapping[str, str] | None = None, insecure: bool = False) -> tuple[int, bytes]:
    """Return an answer's status and body.

    Raises:
        AdapterError: if it is larger than `most` bytes, or does not come.
    """
    web = _library()
    try:
        with _answer(web, url, headers or {}, insecure) as answer:
            return answer.status_code, b"".join(_blocks(answer, most))
    except web.HTTPError as error:
        raise AdapterError(_unreachable(url, error)) from None


def _into(part: Path, url: str, expected: Expected, headers: Mapping[str, str], insecure: bool) -> None:
    """Add to `part` until it is whole; a connection that breaks is tried again where it broke."""
    web = _library()
    told: Exception | None = None
    for _ in range(_TRIES):
        have = part.stat().st_size if part.exists() else 0
        if expected.size is not None and have == expected.size:
            return
        if have > (expected.size or expected.most):
            part.unlink()
            have = 0
        begun = {**headers, "Range": f"bytes={have}-"} if have else dict(headers)
        try:
            with _answer(web, url, begun, insecure) as answer:
                if answer.status_code == 416:  # it is shorter than what is here: begin anew
                    part.unlink()
                    continue
                if answer.status_code not in (200, 206):
                    raise AdapterError(
                        f"{safe_repr(_bare(url))} answered with status {answer.status_code}, expected a file"
                    )
                goes_on = answer.status_code == 206 and answer.headers.get("content-range", "").startswith(
                    f"bytes {have}-"
                )
                if answer.status_code == 206 and not goes_on:
                    raise AdapterError(f"{safe_repr(_bare(url))} sent another part than was asked for")
                have = have if goes_on else 0
                with part.open("ab" if goes_on else "wb") as output:
                    for block in _blocks(answer, (expected.size or expected.most) - have):
                        output.write(block)
            return
        except web.HTTPError as error:
            told = error
    why = _unreachable(url, told) if told else f"{safe_repr(_bare(url))} cannot be resumed"
    raise AdapterError(f"{why}; what has come is kept, the same command goes on from there")


def _checked(path: Path, url: str, expected: Expected) -> str:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    wrong = None
    if expected.size is not None and size != expected.size:
        wrong = f"it has {size:,} bytes, expected {expected.size:,}"
    elif expected.sha256 is not None and sha256.hexdigest() != expected.sha256:
        wrong = f"its sha256 is {sha256.hexdigest()}, expected {expected.sha256}"
    elif expected.git is not None and git.hexdigest() != expected.git:
        wrong = f"its git digest is {git.hexdigest()}, expected {expected.git}"
    if wrong:
        path.unlink()
        raise AdapterError(f"{safe_repr(_bare(url))} is not the file that was promised: {wrong}. It was thrown away")
    return sha256.hexdigest()


@contextmanager
def _answer(web: Any, url: str, headers: Mapping[str, str], insecure: bool) -> Iterator[Any]:
    """Yield a response whose body is still to come; each redirect is looked at before it is followed."""
    sent = {"Accept-Encoding": "identity", **headers}
    with web.Client(follow_redirects=False, timeout=web.Timeout(60, connect=15)) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            check_url(url, insecure)
            with client.stream("GET", url, headers=sent) as answer:
                if answer.status_code not in (301, 302, 303, 307, 308):
                    yield answer
                    return
                after = urljoin(url, answer.headers.get("location", ""))
            if urlsplit(url).scheme == "https" and urlsplit(after).scheme != "https":
                raise AdapterError(
                    f"{safe_repr(_bare(url))} redirects to {safe_repr(_bare(after))}, which is not HTTPS"
                )
            if urlsplit(after).netloc != urlsplit(url).netloc:
                sent = {name: value for name, value in sent.items() if name.lower() in ("accept-encoding", "range")}
            url = after
    raise AdapterError(f"{safe_repr(_bare(url))} redirects more than {_MAX_REDIRECTS} times")


def _blocks(answer: Any, most: int) -> Iterator[bytes]:
    """Yield a body as it was sent, up to a number of bytes."""
    where = safe_repr(_bare(str(answer.url)))
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise AdapterError(f"{where} is sent compressed though that was not asked for")
    promised = answer.headers.get("content-length", "")
    if promised.isdigit() and int(promised) > most:
        raise AdapterError(f"{where} has {int(promised):,} bytes (still to come), expected at most {most:,}")
    for block in answer.iter_raw():  # as it comes: what has come is to be kept
        most -= len(block)
        if most < 0:
            raise AdapterError(f"{where} sends more bytes than expected: stopped")
        yield block


def _library() -> Any:
    """Return the HTTP library that huggingface_hub itself uses: httpx, or its successor in newer releases."""
    for name in ("httpx", "httpx2"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise AdapterError("downloads need httpx: pip install httpx")


def _bare(url: str) -> str:
    """A URL without its query, in which signatures and tokens stand."""
    return url.partition("?")[0]


def _unreachable(url: str, error: Exception) -> str:
    return f"{safe_repr(_bare(url))} cannot be reached, or broke off ({type(error).__name__}: {safe_repr(str(error))})"
