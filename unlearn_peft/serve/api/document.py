"""The server's OpenAPI document, /openapi.json: its routes, what their bodies may hold, how each of them refuses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from .requests import BODIES

_PLACE = "#/components/schemas/"
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
                "adapter": {"type": "string"},
            },
        }
    },
}  # fmt: skip


def add_document(app: FastAPI) -> None:
    """Let FastAPI, which serves it, find the document here: routes read their bodies themselves."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    public = [route for route in app.routes if not getattr(route, "path", "").startswith("/playground")]
    found = get_openapi(title=app.title, version="1", routes=public)
    names, schemas = models_json_schema(
        [(kind, "validation") for kind in BODIES.values()], ref_template=_PLACE + "{model}"
    )
    components = found.setdefault("components", {})
    components["schemas"] = {**schemas["$defs"], "Error": _ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    refusal = {"description": "Refused.", "content": {"application/json": {"schema": {"$ref": f"{_PLACE}Error"}}}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path.startswith("/v1"):
                operation["responses"] |= {"4XX": refusal, "5XX": refusal}
                operation["security"] = [{"key": []}]
            kind = BODIES.get(path)
            if kind is not None:
                body = {"application/json": {"schema": names[kind, "validation"]}}
                operation["requestBody"] = {"required": True, "content": body}
                operation["responses"]["200"]["content"]["text/event-stream"] = {}
    return found
