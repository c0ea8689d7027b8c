"""The playground: a page that asks one question under several sets, and shows the answers side by side.

The page gets nothing that the API would not give to the same key: its answers come from `/v1/...`, so a tenant's set
is never taken away. The base alone is seen in two cases only: a tenant that has nothing to forget asks (as it may
anyway), or the server was started with `--playground-base`; the audit log then notes each such request as one.

What is told of adapters: those that the tenant has forgotten, and those that are offered to all. The names of others
would tell what other tenants have forgotten. All that is read from an adapter's folder is taken for hostile.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ...adapters.bundle import CONFIG, CURVES, MANIFEST, WEIGHTS
from ...adapters.card import FIGURES
from ...adapters.read import identity_of, sha256
from ...errors import PolicyError
from ..handler import RequestHandler
from ..policy.policy import AdapterEntry
from ..request import ApiError, Call

PICTURES = (CURVES, FIGURES)  # the second of `unlearn-peft eval`, whose default place is ADAPTER.eval beside it
_PAGE = Path(__file__).parent / "page"
_FILES = {"playground.css": "text/css"} | dict.fromkeys(("playground.js", "server.js", "tokens.js"), "text/javascript")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PICTURE, _MAX_JSON = 8_000_000, 10_000_000  # bytes
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin"
}  # fmt: skip
Respond = Callable[..., Awaitable[Response]]


@dataclass(frozen=True)
class Playground:
    """What the page shows beyond a tenant's own set.

    Args:
        base: let every key see the base's own answers, where nothing is forgotten. For demonstrations only.
        offer: adapters that every key may see and try; where no keys are needed, all are offered.
    """

    base: bool = False
    offer: tuple[str, ...] = ()


def add_playground(app: FastAPI, front: RequestHandler, playground: Playground, respond: Respond) -> None:
    """Add the page and its routes to the server; `respond(front, request, chat=, bare=)` answers as `/v1` does.

    Raises:
        PolicyError: an adapter that is offered is not in the policy.
    """
    if unknown := [name for name in playground.offer if name not in front.policies.current().adapters]:
        raise PolicyError(f"the playground offers '{unknown[0]}', which is not among the policy's adapters")
    front.shows_base = playground.base
    page = (_PAGE / "playground.html").read_text(encoding="utf-8")
    page = page.replace("{keys}", "none" if front.open_tenant is not None else "needed")
    app.get("/playground")(_answer(page, "text/html"))
    for name, kind in _FILES.items():
        app.get(f"/playground/{name}")(_answer((_PAGE / name).read_text(encoding="utf-8"), kind))

    @app.get("/playground/api/adapters")
    async def adapters(request: Request) -> JSONResponse:
        """What this key may see: whose it is, what it has forgotten in any case, the adapters' cards."""
        call = await front.identify(request.headers.get("authorization"))
        own = dict(call.policy.tenants[call.tenant].forget)
        seen = _seen(front, playground, call)
        cards = await asyncio.gather(*(asyncio.to_thread(card, name, entry) for name, entry in seen.items()))
        body = {
            "model": front.engine.model, "tenant": call.tenant, "own": own, "adapters": cards,
            "base": "v1" if not own else "playground/api/base" if playground.base else None,
            "max_tokens": front.limits.max_tokens,
        }  # fmt: skip
        return JSONResponse(body, headers={**_HEADERS, "cache-control": "no-store"})

    @app.get("/playground/api/adapters/{name}/{picture}")
    async def picture(request: Request, name: str, picture: str) -> Response:
        """A picture of an adapter that this key may see."""
        call = await front.identify(request.headers.get("authorization"))
        entry = _seen(front, playground, call).get(name)
        data = None if entry is None else await asyncio.to_thread(read_picture, Path(entry.path), picture)
        if data is None:
            raise ApiError(404, "there is no such picture", code="not_found")
        headers = {**_HEADERS, "cache-control": "no-store", "content-security-policy": "default-src 'none'; sandbox"}
        return Response(data, media_type="image/png", headers=headers)

    if playground.base:

        @app.post("/playground/api/base/chat/completions")
        async def base_chat(request: Request) -> Response:
            return await respond(front, request, chat=True, bare=True)

        @app.post("/playground/api/base/completions")
        async def base_text(request: Request) -> Response:
            return await respond(front, request, chat=False, bare=True)


def card(name: str, entry: AdapterEntry) -> dict[str, Any]:
    """Return what is shown of an adapter: digest, ranks, figures, names of pictures. Never its path."""
    folder = Path(entry.path)
    config, manifest = _json(folder / CONFIG), _json(folder / MANIFEST)
    ranks = [config.get("r"), *_mapping(config.get("rank_pattern")).values()]
    targets, recipe = config.get("target_modules"), _mapping(manifest.get("recipe"))
    metrics, weights, settings = _mapping(manifest.get("metrics")), _digest(folder / WEIGHTS), _digest(folder / CONFIG)
    digest = None if weights is None or settings is None else identity_of(weights, settings)
    return {
        "name": name,
        "sha256": digest,
        "as_policy": None if entry.sha256 is None or digest is None else entry.sha256 == digest,
        "kind": _text(config.get("peft_type")),
        "ranks": sorted({rank for rank in ranks if type(rank) is int and 0 < rank < 1_000_000}),
        "targets": sorted(filter(None, map(_text, targets)))[:32] if isinstance(targets, list) else [],
        "base": _text(_mapping(manifest.get("base")).get("name")) or _text(config.get("base_model_name_or_path")),
        "objective": _text(_mapping(recipe.get("objective")).get("name")),
        "metrics": {str(_text(key)): shown for key, value in metrics.items() if (shown := _figure(value)) is not None},
        "pictures": [picture for picture in PICTURES if read_picture(folder, picture) is not None],
    }


def read_picture(folder: Path, name: str) -> bytes | None:
    """Return a PNG of an adapter, or None if it has none by that name. Links are not followed."""
    if name not in PICTURES:
        return None
    places = [folder / name]
    if name == FIGURES:
        places.append(folder.with_name(f"{folder.name}.eval") / name)
    for place in places:
        data = _read(place, _MAX_PICTURE)
        if data is not None and data.startswith(_PNG):
            return data
    return None


def _seen(front: RequestHandler, playground: Playground, call: Call) -> dict[str, AdapterEntry]:
    """Return the adapters that may be shown to the caller, its own first."""
    known = call.policy.adapters
    offered = known if front.open_tenant is not None else playground.offer
    names = dict.fromkeys((*call.policy.tenants[call.tenant].forget, *offered))
    return {name: known[name] for name in names if name in known}


def _answer(text: str, kind: str) -> Callable[[], Awaitable[Response]]:
    headers = {**_HEADERS, "content-security-policy": _CSP, "cache-control": "no-cache"}

    async def answer() -> Response:
        return Response(text, media_type=kind, headers=headers)

    return answer


def _read(path: Path, most: int, *, links: bool = False) -> bytes | None:
    """Return a file's bytes; None if it is not there, not a plain file, or larger than `most`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
        try:
            state = os.fstat(file)
            if not stat.S_ISREG(state.st_mode) or state.st_size > most:
                return None
            with os.fdopen(file, "rb", closefd=False) as stream:
                data = stream.read(most + 1)
        finally:
            os.close(file)
    except OSError:
        return None
    return data if len(data) <= most else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(_read(path, _MAX_JSON, links=True) or b"null"))  # the Hub's cache is made of links
    except (ValueError, RecursionError):
        return {}


def _digest(path: Path) -> str | None:
    """Return the sha256 of the file as it is now; computed anew only when it has changed."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            return None
        return _sha256(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino)
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _sha256(path: Path, *_: int) -> str:
    return sha256(path)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    """Return a text as it can be sent: short, and without halves of characters."""
    return value[:200].encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _figure(value: object) -> float | str | None:
    if isinstance(value, (int, float)):
        return value if -1e300 < value < 1e300 else None
    return _text(value)
