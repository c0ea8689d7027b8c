"""What `unlearn-peft tenant` does, over HTTP on a port of its own: a thin face of `PolicyStore`, as the command is.

Each change is in the store's history (who: `admin:` and the key's name), in the transaction that makes it. With an
audit log, a line is there before a change is made, and one after it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from ...errors import AdapterError, DataError, OutputError, PolicyError
from ..audit import AuditLog
from ..canary import check_adapter, idle_note
from ..policy.edits import UnknownName, summary
from ..policy.policy import key_digest
from ..policy.store import PolicyStore
from ..request import ApiError
from .bodies import (
    Done,
    KeySettings,
    NewAdapter,
    NewKey,
    NewTenant,
    PrefixCache,
    Quotas,
    Registered,
    Strength,
    TrustedKeys,
)
from .keys import find_admin_key

logger = logging.getLogger(__name__)
_MAX_BODY = 65_536  # bytes
_OPEN = ("/healthz", "/openapi.json")  # without a key
_READS = ("GET", "HEAD")

Why = Annotated[str, Query(max_length=2000, description="The reason, for the history.")]


def create_admin_app(store: PolicyStore, keys: Path, audit: AuditLog | None = None) -> FastAPI:
    """Return the admin port as an ASGI app; `keys` is read again at each request (see `keys.py`)."""
    app = FastAPI(
        title="unlearn-peft admin", docs_url=None, redoc_url=None, redirect_slashes=False,
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the document; `_Guard` has let in who has a key
    )  # fmt: skip

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Any) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def wrong_route(_: Request, error: Any) -> Response:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def wrong_values(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:64] for part in first["loc"][1:]) or "body"
        message = f"{where}: {first['msg'].removeprefix('Value error, ')}"
        return JSONResponse(ApiError(400, message, param=where, code="invalid_value").body, 400)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    async def look(read: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(_translated, read)

    async def change(request: Request, action: str, *arguments: Any, why: str, **facts: Any) -> Any:
        """Make one of `PolicyStore`'s changes; returns what it returns."""
        name = request.scope["admin"]
        line = {"id": f"adm-{uuid.uuid4().hex}", "key": name, "action": action, **facts}

        def make() -> Any:
            _record(audit, "admin", line)
            status = 500
            try:
                result = _translated(lambda: getattr(store, action)(*arguments, who=f"admin:{name}", why=why))
                status = 200
                return result
            except ApiError as error:
                status = error.status
                raise
            finally:
                _record(audit, "admin_finished", {**line, "status": status}, made=True)

        return await asyncio.to_thread(make)

    @app.get("/v1/tenants")
    async def tenants(after: str = "", limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> dict[str, Any]:
        """Names of tenants, sorted; `next` is the `after` of the next page."""
        names = await look(lambda: store.tenant_names(after, limit + 1))
        return {"tenants": names[:limit], "next": names[limit - 1] if len(names) > limit else None}

    @app.post("/v1/tenants", status_code=201)
    async def add(request: Request, body: NewTenant) -> Done:
        """Add a tenant that forgets nothing and has no key yet."""
        return Done(revision=await change(request, "add", body.name, why=body.why, tenant=body.name))

    @app.get("/v1/tenants/{tenant}")
    async def show(tenant: str) -> dict[str, Any]:
        """What a tenant forgets and may add, its quotas, the keys that it trusts, its API keys by their sha256."""
        return {"tenant": tenant, **await look(lambda: summary(store.tenant(tenant), store.key_uses(tenant)))}

    @app.delete("/v1/tenants/{tenant}")
    async def remove(request: Request, tenant: str, why: Why = "") -> Done:
        """Remove a tenant and its keys."""
        return Done(revision=await change(request, "remove", tenant, why=why, tenant=tenant))

    def strengths(part: str, action: str, undo: str, what: str) -> None:
        async def put(request: Request, tenant: str, adapter: str, body: Strength) -> Done:
            arguments = (tenant, adapter, body.strength)
            return Done(
                revision=await change(request, action, *arguments, why=body.why, tenant=tenant, adapter=adapter)
            )

        async def delete(request: Request, tenant: str, adapter: str, why: Why = "") -> Done:
            return Done(revision=await change(request, undo, tenant, adapter, why=why, tenant=tenant, adapter=adapter))

        path = f"/v1/tenants/{{tenant}}/{part}/{{adapter}}"
        app.put(path, name=action, description=f"{what}, or change the strength.")(put)
        app.delete(path, name=undo, description=f"Undo that: {what[0].lower()}{what[1:]}.")(delete)

    strengths("forget", "forget", "unforget", "Make a tenant forget an adapter")
    strengths("may-add", "allow", "disallow", "Let a tenant's requests add an adapter, up to a strength")

    @app.post("/v1/tenants/{tenant}/keys", status_code=201)
    async def add_key(request: Request, response: Response, tenant: str, body: KeySettings) -> NewKey:
        """Make an API key. To rotate: make one, give it to the tenant, then delete the old one."""
        settings = body.model_dump(exclude={"why"}, exclude_none=True)
        key = await change(request, "add_key", tenant, settings, why=body.why, tenant=tenant, settings=settings)
        response.headers["cache-control"] = "no-store"
        return NewKey(key=key, sha256=key_digest(key))

    @app.delete("/v1/tenants/{tenant}/keys/{key}")
    async def revoke_key(request: Request, tenant: str, key: str, why: Why = "") -> Done:
        """Revoke an API key, by its name or 8 or more digits of its sha256."""
        return Done(revision=await change(request, "revoke_key", tenant, key, why=why, tenant=tenant))

    @app.patch("/v1/tenants/{tenant}/quotas")
    async def quota(request: Request, tenant: str, body: Quotas) -> Done:
        """Limit a tenant's requests and tokens in a second, minute, hour or day; beyond that it gets 429."""
        quotas = body.model_dump(exclude={"why"}, exclude_unset=True)
        return Done(revision=await change(request, "quota", tenant, quotas, why=body.why, tenant=tenant, quotas=quotas))

    @app.put("/v1/tenants/{tenant}/prefix-cache")
    async def prefix_cache(request: Request, tenant: str, body: PrefixCache) -> Done:
        """Keep what a tenant's prompts begin with for its next ones, or not."""
        facts = {"tenant": tenant, "prefix_cache": body.on}
        return Done(revision=await change(request, "prefix_cache", tenant, body.on, why=body.why, **facts))

    @app.post("/v1/tenants/{tenant}/trusted-keys")
    async def trust(request: Request, tenant: str, body: TrustedKeys) -> Done:
        """Apply adapters for a tenant only if one of these keys, or one that it trusts already, has signed them."""
        return Done(revision=await change(request, "trust", tenant, body.keys, why=body.why, tenant=tenant))

    @app.delete("/v1/tenants/{tenant}/trusted-keys/{key}")
    async def untrust(request: Request, tenant: str, key: str, why: Why = "") -> Done:
        """Trust a key no longer; not the last one."""
        return Done(revision=await change(request, "untrust", tenant, key, why=why, tenant=tenant))

    @app.delete("/v1/tenants/{tenant}/trusted-keys")
    async def untrust_all(request: Request, tenant: str, why: Why = "") -> Done:
        """Remove all keys that a tenant trusts: its adapters then need no signature."""
        return Done(revision=await change(request, "untrust", tenant, None, why=why, tenant=tenant))

    @app.get("/v1/adapters")
    async def adapters() -> dict[str, Any]:
        """All adapters by name: path, sha256, and the file of probes and the canary where the policy names them."""
        found = await look(lambda: store.current().adapters)
        return {"adapters": {name: entry.model_dump() for name, entry in found.items()}}

    @app.put("/v1/adapters/{name}")
    async def adapter(request: Request, name: str, body: NewAdapter) -> Registered:
        """Register an adapter under a name, or replace the one of that name. It is read, checked and pinned now."""
        digest = await look(lambda: check_adapter(body.path, body.sha256, body.probes))
        given = body.model_dump(include={"probes", "canary"}, exclude_none=True)
        arguments = (name, body.path, digest, body.probes, body.canary)
        revision = await change(request, "adapter", *arguments, why=body.why, adapter=name, sha256=digest, **given)
        note = None
        with suppress(ApiError, KeyError):  # the change is made, whatever happens to the store meanwhile
            note = await look(lambda: idle_note(name, store.current().adapters[name]))
        return Registered(revision=revision, sha256=digest, note=note)

    @app.delete("/v1/adapters/{name}")
    async def unadapter(request: Request, name: str, why: Why = "") -> Done:
        """Remove an adapter from the policy, but not its files; refused while a tenant forgets or may add it."""
        return Done(revision=await change(request, "unadapter", name, why=why, adapter=name))

    @app.get("/v1/history")
    async def history(limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> dict[str, Any]:
        """Changes, the newest first: revision, who, when (UTC), what, why."""
        return {"changes": [vars(one) for one in await look(lambda: store.history(limit))]}

    app.add_middleware(_Guard, keys=keys)
    return app


class _Guard:
    """Lets in who has a key, and writes only with a key that may; bounds bodies. All before a body is read."""

    def __init__(self, app: Any, keys: Path) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await self._check(scope)
            except ApiError as error:
                headers = {**error.headers, "connection": "close"}
                await JSONResponse(error.body, error.status, headers=headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _check(self, scope: Any) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] not in _OPEN or scope["method"] not in _READS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            found = None
            if scheme.lower() == "bearer" and key.strip():
                try:
                    found = await asyncio.to_thread(find_admin_key, self._keys, key.strip())
                except PolicyError as error:
                    logger.error("admin: all requests are refused: %s", error)
                    raise ApiError(503, "the admin keys cannot be read", code="keys_unavailable") from None
            if found is None:
                logger.warning("admin: a request without a known key was refused")
                message = (
                    "this is no key of the admin port" if key else "an admin key is needed: Authorization: Bearer KEY"
                )
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            scope["admin"], entry = found
            if scope["method"] not in _READS and not entry.write:
                logger.warning("admin: a change by the key '%s', which may only look, was refused", scope["admin"])
                raise ApiError(403, "this key may only look", code="read_only")
        if "transfer-encoding" in headers:
            raise ApiError(411, "expected a Content-Length", code="length_required")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            raise ApiError(413, f"the body is larger than {_MAX_BODY} bytes", code="body_too_large")


def _translated(run: Callable[[], Any]) -> Any:
    """Run something of the store's; its errors become responses. Whoever has a key may know what they say."""
    try:
        return run()
    except UnknownName as error:
        raise ApiError(404, str(error), code="unknown_name") from None
    except PolicyError as error:
        if isinstance(error.__context__, (SQLAlchemyError, OSError)):  # what the database said
            logger.error("admin: %s", error)
            raise ApiError(503, str(error), code="policy_unavailable") from None
        raise ApiError(400, str(error), code="refused") from None
    except (AdapterError, DataError) as error:
        raise ApiError(400, str(error), code="adapter_refused") from None


def _record(audit: AuditLog | None, event: str, line: dict[str, Any], made: bool = False) -> None:
    """Write a line; where it must be written, and the change is not made yet, it is refused if it cannot."""
    if audit is None:
        return
    try:
        audit.write(event, **line)
    except OutputError as error:
        logger.error("%s", error)
        if audit.required and not made:
            raise ApiError(
                503, "the audit log cannot be written, so this change is refused", code="audit_unavailable"
            ) from None
