"""One file from an untrusted HTTPS server: bounded, resumed where it broke off, and checked before it gets its name.

A URL and what is `Expected` come in; a whole file goes out, or one error. An unfinished download stays as `.part` and
is resumed by Range; one that does not match what is expected is deleted. The HTTP library bounds the time of each read;
how long all may take is bounded here, by a smallest rate and a time for the response's head.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from ...errors import AdapterError, safe_repr
from ...files.atomic import flush

_MAX_REDIRECTS = 5
_TRIES = 3
_LOCAL = ("localhost", "127.0.0.1", "::1")
_BLOCK = 1 << 20
_HEAD_SECONDS = 90.0  # to connect, and until a response's head is there
_WINDOW_SECONDS = 30.0  # in each of which a body must come at
_MIN_RATE = 1000  # bytes/s


class Expected(NamedTuple):
    """What a file must be; None: not known. `git` is git's digest of a blob, which the Hub gives for small files."""

    max_bytes: int
    size: int | None = None
    sha256: str | None = None
    git: str | None = None


def check_url(url: str, insecure: bool = False) -> None:
    """Raise an AdapterError for what is not HTTPS; HTTP is for this machine, or with `insecure`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise AdapterError(f"{safe_repr(url)} is no address ({error}): expected https://...") from None
    if parts.username or parts.password:
        raise AdapterError("an address with a password in it would be seen in logs: leave it out")
    if not host or parts.scheme not in ("http", "https"):
        raise AdapterError(f"{safe_repr(url)} is no address of a web server: expected https://...")
    if parts.scheme == "http" and host not in _LOCAL and not insecure:
        raise AdapterError(
            f"{safe_repr(url)} is not HTTPS: others on the way could read and change it. Use https://, or --insecure"
        )


def fetch(
    url: str, target: Path, expected: Expected, *, headers: Mapping[str, str] | None = None, insecure: bool = False
) -> str:
    """Download into `target`, a new file that appears only when everything matches; returns the sha256.

    An AdapterError names what does not. `headers` are sent to the first host only: they may hold a token.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with FileLock(f"{part}.lock", timeout=600):
            if target.exists():
                return _check(target, url, expected)
            _resume(part, url, expected, headers or {}, insecure)
            digest = _check(part, url, expected)
            flush(part)
            os.replace(part, target)
            return digest
    except Timeout:
        raise AdapterError(f"another process has been downloading {safe_repr(url)} for ten minutes") from None


def read(
    url: str, max_bytes: int, *, headers: Mapping[str, str] | None = None, insecure: bool = False
) -> tuple[int, bytes]:
    """Return a response's status and body, of at most `max_bytes`."""
    web = _library()
    try:
        with _response(web, url, headers or {}, insecure) as response:
            return response.status_code, b"".join(_blocks(response, max_bytes))
    except web.HTTPError as error:
        raise AdapterError(_unreachable(url, error)) from None


def _resume(part: Path, url: str, expected: Expected, headers: Mapping[str, str], insecure: bool) -> None:
    """Add to `part` until it is whole, resuming where a connection broke off."""
    web = _library()
    why = f"{_shown(url)} cannot be resumed"
    for _ in range(_TRIES):
        have = part.stat().st_size if part.exists() else 0
        if expected.size is not None and have == expected.size:
            return
        if have > (expected.size or expected.max_bytes):
            part.unlink()
            have = 0
        ranged = {**headers, "Range": f"bytes={have}-"} if have else headers
        try:
            with _response(web, url, ranged, insecure) as response:
                status = response.status_code
                if status == 416 and have:  # the file is shorter than what is here: begin anew
                    part.unlink()
                    continue
                if status not in (200, 206):
                    raise AdapterError(f"{_shown(url)} answered with status {status}, expected a file")
                if status == 206 and not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
                    raise AdapterError(f"{_shown(url)} sent another part than was asked for")
                have = have if status == 206 else 0
                with part.open("ab" if status == 206 else "wb") as output:
                    for block in _blocks(response, (expected.size or expected.max_bytes) - have):
                        output.write(block)
            return
        except web.HTTPError as error:
            why = _unreachable(url, error)
    raise AdapterError(f"{why}; what has come is kept, the same command goes on from there")


def _check(path: Path, url: str, expected: Expected) -> str:
    """Return a file's sha256; delete the file if it is not what was expected."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    for name, value, promised in (
        ("size", size, expected.size),
        ("sha256", sha256.hexdigest(), expected.sha256),
        ("git digest", git.hexdigest(), expected.git),
    ):
        if promised not in (None, value):
            path.unlink()
            raise AdapterError(
                f"{_shown(url)} is not the file that was promised: its {name} is {value}, expected {promised}. It was "
                "deleted"
            )
    return sha256.hexdigest()


@contextmanager
def _response(web: Any, url: str, headers: Mapping[str, str], insecure: bool) -> Iterator[Any]:
    """Yield a response whose body is still to come; each redirect is checked before it is followed."""
    sent = {"Accept-Encoding": "identity", **headers}
    with web.Client(follow_redirects=False, timeout=web.Timeout(60, connect=15)) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            check_url(url, insecure)
            with _opened(web, client, url, sent) as response:
                if response.status_code not in (301, 302, 303, 307, 308):
                    yield response
                    return
                location = _target(url, response.headers.get("location", ""))
            if urlsplit(url).scheme == "https" and urlsplit(location).scheme != "https":
                raise AdapterError(f"{_shown(url)} redirects to {_shown(location)}, which is not HTTPS")
            if urlsplit(location).netloc != urlsplit(url).netloc:
                sent = {name: value for name, value in sent.items() if name.lower() in ("accept-encoding", "range")}
            url = location
    raise AdapterError(f"{_shown(url)} redirects more than {_MAX_REDIRECTS} times")


@contextmanager
def _opened(web: Any, client: Any, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Yield a response whose head is there; closed afterwards."""
    result: Queue[Any] = Queue()

    def send() -> None:
        try:
            result.put(client.send(client.build_request("GET", url, headers=headers), stream=True))
        except Exception as error:
            result.put(error)

    Thread(target=send, daemon=True).start()  # the library has no bound on a head that comes byte by byte
    try:
        response = result.get(timeout=_HEAD_SECONDS)
    except Empty:
        raise AdapterError(
            f"{_shown(url)} sent no whole head of a response within {_HEAD_SECONDS:g} s: try again later, or elsewhere"
        ) from None
    if isinstance(response, (ValueError, web.InvalidURL)):
        why = safe_repr(str(response))
        raise AdapterError(f"{_shown(url)} is no address, or redirects to what is no address ({why}): check the name")
    if isinstance(response, Exception):
        raise response
    try:
        yield response
    finally:
        response.close()


def _target(url: str, location: str) -> str:
    """Return where a redirect leads, not checked yet."""
    try:
        if not location.strip():
            raise ValueError("it names no address")
        return urljoin(url, location)
    except ValueError as error:
        raise AdapterError(
            f"{_shown(url)} redirects to {_shown(location)}, which is no address ({error}): its server is at fault"
        ) from None


def _blocks(response: Any, max_bytes: int) -> Iterator[bytes]:
    """Yield a body's bytes as they were sent."""
    url = _shown(str(response.url))
    if response.headers.get("content-encoding", "identity") != "identity":
        raise AdapterError(f"{url} is sent compressed though that was not asked for")
    promised = response.headers.get("content-length", "")
    if promised.isdigit() and int(promised) > max_bytes:
        raise AdapterError(f"{url} has {int(promised):,} bytes (still to come), expected at most {max_bytes:,}")
    received, began = 0, time.monotonic()  # in this window
    for block in response.iter_raw():  # as it arrives, so that a broken download keeps all of it
        max_bytes -= len(block)
        if max_bytes < 0:
            raise AdapterError(f"{url} sends more bytes than expected: stopped")
        yield block
        received, seconds = received + len(block), time.monotonic() - began
        if seconds >= _WINDOW_SECONDS:
            if received < _MIN_RATE * seconds:
                raise AdapterError(
                    f"{url} sends {received / seconds:.0f} bytes/s, expected at least {_MIN_RATE:,} over "
                    f"{_WINDOW_SECONDS:g} s: stopped. Try again later, or another server or network"
                )
            received, began = 0, time.monotonic()


def _library() -> Any:
    """Return the HTTP library that huggingface_hub itself uses: httpx, or its successor in newer releases."""
    for name in ("httpx", "httpx2"):
        with suppress(ImportError):
            return importlib.import_module(name)
    raise AdapterError("downloads need httpx: pip install httpx")


def _shown(url: str) -> str:
    """Return a URL for messages: without its query, which may hold signatures and tokens."""
    return safe_repr(url.partition("?")[0])


def _unreachable(url: str, error: Exception) -> str:
    return f"{_shown(url)} cannot be reached, or broke off ({type(error).__name__}: {safe_repr(str(error))})"
