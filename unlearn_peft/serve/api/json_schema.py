"""Bounds on a JSON schema of a client, before anything compiles it.

Compiling recurses into a schema, `$ref` by `$ref`, and what may follow costs the third power of the alternatives that
are open at once. Real schemas have a few dozen parts (OpenAI allows 10 levels).
"""

from __future__ import annotations

import json
from typing import Any

from ..request import ApiError

_MAX_BYTES, _MAX_DEPTH, _MAX_OBJECTS, _MAX_ALTERNATIVES = 65_536, 64, 1000, 100


def bounded_schema(schema: dict[str, Any]) -> str:
    """Return a schema as JSON text.

    Raises:
        ApiError: it is larger than any limit, which is named.
    """
    objects = alternatives = 0
    level: list[Any] = [schema]
    for depth in range(_MAX_DEPTH + 1):
        if not level:
            break
        if depth == _MAX_DEPTH:
            raise _too_large(f"is nested more than {_MAX_DEPTH} levels deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                objects += 1
                for key in ("anyOf", "oneOf", "type"):
                    alternatives += len(value[key]) if isinstance(value.get(key), list) else 0
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    if objects > _MAX_OBJECTS:
        raise _too_large(f"has {objects} objects: at most {_MAX_OBJECTS}")
    if alternatives > _MAX_ALTERNATIVES:
        raise _too_large(f"has {alternatives} alternatives in anyOf, oneOf and type: at most {_MAX_ALTERNATIVES}")
    text = json.dumps(schema, ensure_ascii=False)
    if (size := len(text.encode())) > _MAX_BYTES:
        raise _too_large(f"has {size} bytes: at most {_MAX_BYTES}")
    return text


def _too_large(what: str) -> ApiError:
    message = f"the response_format's schema {what}"
    return ApiError(400, message, code="invalid_response_format", param="response_format")
