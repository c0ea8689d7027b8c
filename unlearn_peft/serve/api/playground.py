"""The playground: a page that sends one question with several sets of adapters, and shows the answers side by side.

The page gets nothing that the API would not give to the same key: its answers come from `/v1/...`, so a tenant's
adapters always apply. It shows the base alone in two cases only: to a tenant that has nothing to forget, or if the
server was started with `--playground-base`, where the audit log marks each such request.

It shows the adapters that the tenant forgets or may add, and the cards of those that are offered to all: the names of
others would reveal what other tenants forget. Everything that is read from an adapter's folder is untrusted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ...adapters.bundle import CONFIG, CURVES, MANIFEST, WEIGHTS
from ...adapters.card import FIGURES
from ...adapters.read import identity_of
from ...errors import AdapterError, PolicyError
from ...files.untrusted import read_file, sha256_of
from ..handler import RequestHandler
from ..policy.entries import AdapterEntry
from ..request import ApiError, Call, as_api_error
from .access import identify, while_connected

PICTURES = (CURVES, FIGURES)  # the second by `unlearn-peft eval`, which writes to ADAPTER.eval by default
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
T = TypeVar("T")


@dataclass(frozen=True)
class Playground:
    """What the page shows beyond a tenant's own adapters."""

    base: bool = False  # every key may see the base's own answers: for demonstrations only
    offer: tuple[str, ...] = ()  # adapters whose cards every key may see


def add_playground(app: FastAPI, handler: RequestHandler, playground: Playground, respond: Respond) -> None:
    """Add the page and its routes to the app; `respond(handler, request, chat=, base_only=)` answers as `/v1` does.

    Raises:
        PolicyError: an offered adapter is not in the policy.
    """
    if unknown := [name for name in playground.offer if name not in handler.policies.current().adapters]:
        raise PolicyError(f"the playground offers '{unknown[0]}', which is not among the policy's adapters")
    handler.shows_base = playground.base
    page = (_PAGE / "playground.html").read_text(encoding="utf-8")
    page = page.replace("{keys}", "none" if handler.open_tenant is not None else "needed")
    app.get("/playground")(_static(page, "text/html"))
    for name, kind in _FILES.items():
        app.get(f"/playground/{name}")(_static((_PAGE / name).read_text(encoding="utf-8"), kind))

    async def in_turn(request: Request, call: Call, work: Callable[[], T]) -> T:
        """Read files when it is the tenant's turn: where they are many, a flood would keep other requests waiting."""
        try:
            return await while_connected(request, handler.in_turn(call, work))
        except asyncio.TimeoutError as error:
            raise as_api_error(error) from None

    @app.get("/playground/api/adapters")
    async def adapters(request: Request) -> JSONResponse:
        """What this key may see: its tenant, what that forgets in any case and may add, the adapters' cards."""
        call = await identify(handler, request, "playground")
        own, may_add = call.policy.tenants[call.tenant].forget, call.policy.tenants[call.tenant].may_add
        visible = _visible(playground, call)
        cards = await in_turn(request, call, lambda: [card(name, entry) for name, entry in visible.items()])
        body = {
            "model": handler.engine.model, "tenant": call.tenant, "own": own, "may_add": may_add, "adapters": cards,
            "base": "v1" if not own else "playground/api/base" if playground.base else None,
            "max_tokens": handler.limits.max_tokens,
        }  # fmt: skip
        return JSONResponse(body, headers={**_HEADERS, "cache-control": "no-store"})

    @app.get("/playground/api/adapters/{name}/{picture}")
    async def picture(request: Request, name: str, picture: str) -> Response:
        call = await identify(handler, request, "playground")
        entry = _visible(playground, call).get(name)
        data = None
        if entry is not None:
            data = await in_turn(request, call, partial(read_picture, Path(entry.path), picture))
        if data is None:
            raise ApiError(404, "there is no such picture", code="not_found")
        headers = {**_HEADERS, "cache-control": "no-store", "content-security-policy": "default-src 'none'; sandbox"}
        return Response(data, media_type="image/png", headers=headers)

    if playground.base:

        @app.post("/playground/api/base/chat/completions")
        async def base_chat(request: Request) -> Response:
            return await respond(handler, request, chat=True, base_only=True)

        @app.post("/playground/api/base/completions")
        async def base_text(request: Request) -> Response:
            return await respond(handler, request, chat=False, base_only=True)


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
        "metrics": {
            str(_text(key)): figure for key, value in metrics.items() if (figure := _figure(value)) is not None
        },
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
        if place.is_symlink():
            continue
        with suppress(AdapterError):
            if (data := read_file(place, _MAX_PICTURE)).startswith(_PNG):
                return data
    return None


def _visible(playground: Playground, call: Call) -> dict[str, AdapterEntry]:
    """Return the adapters that the caller may see, its own first."""
    known, tenant = call.policy.adapters, call.policy.tenants[call.tenant]
    names = dict.fromkeys((*tenant.forget, *tenant.may_add, *playground.offer))
    return {name: known[name] for name in names if name in known}


def _static(text: str, kind: str) -> Callable[[], Awaitable[Response]]:
    headers = {**_HEADERS, "content-security-policy": _CSP, "cache-control": "no-cache"}

    async def answer() -> Response:
        return Response(text, media_type=kind, headers=headers)

    return answer


def _json(path: Path) -> dict[str, Any]:
    """Return what can be read of a JSON object; not `strict_json`, which would show nothing of a card with one flaw."""
    try:
        return _mapping(json.loads(read_file(path, _MAX_JSON)))
    except (AdapterError, ValueError, RecursionError):
        return {}


def _digest(path: Path) -> str | None:
    """Return the sha256 of the file as it is now; computed again only when it has changed."""
    with suppress(OSError, AdapterError):
        state = path.stat()
        return _sha256(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino)
    return None


@lru_cache(maxsize=1024)
def _sha256(path: Path, *_version: int) -> str:
    return sha256_of(path)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    """Return a text as it can be sent: short, and without halves of characters."""
    return value[:200].encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _figure(value: object) -> float | str | None:
    if isinstance(value, (int, float)):
        return value if -1e300 < value < 1e300 else None
    return _text(value)
