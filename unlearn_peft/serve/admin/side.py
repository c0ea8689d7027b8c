"""An app on a port of its own, in a thread of its own, beside the server that answers tenants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Response

from ..api.connection import Connection, free_answers
from ..api.listening import Listening
from ..limits import Limits

_LIMITS = Limits(seconds=60, connections=64, per_address=64, header_seconds=5, body_seconds=10, stall_seconds=10)


def create_metrics_app(metrics: Callable[[], bytes]) -> FastAPI:
    """Return an app of /metrics and /healthz alone."""
    app = FastAPI(title="unlearn-peft metrics", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def text() -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4")

    return app


@contextmanager
def running_beside(app: FastAPI, listening: Listening, **ssl: Any) -> Iterator[None]:
    """Serve an app on a listening socket until the block ends, within bounds of its own (see `Connection`)."""
    app.state.handler, app.state.free_answers = SimpleNamespace(limits=_LIMITS), free_answers()
    listening.limits = _LIMITS
    config = uvicorn.Config(
        app, log_level="warning", http=Connection, ws="none", lifespan="off", timeout_graceful_shutdown=1, **ssl
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, daemon=True, name=f"unlearn-peft {app.title}"
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(5)
