"""Traces: one span for each request of a tenant, as OpenTelemetry has them (extra `otel`). No text, no key.

A request's `traceparent` is the span's parent, and vLLM gets the span as its parent. Names are those of OpenTelemetry
for generative AI, and vLLM's own for what these leave out (`gen_ai.latency...`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import UnlearnError

if TYPE_CHECKING:
    from .request import Call

_HEADERS, _LONGEST = ("traceparent", "tracestate"), 512  # characters: as many as W3C wants
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # its warnings quote what a client wrote there


class Tracing:
    """Writes spans, where and which OpenTelemetry's variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER).

    Args:
        provider: where spans go; None: by OTLP over HTTP, as the variables say.

    Raises:
        UnlearnError: the extra `otel` is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise UnlearnError(f"traces need {error.name}: pip install 'unlearn-peft[otel]'") from None
        if provider is None:
            provider = TracerProvider(resource=Resource.create({"service.name": "unlearn-peft"}))
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._provider, self._kind, self._propagator = provider, SpanKind.SERVER, TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("unlearn_peft", version("unlearn-peft"))

    def start(self, call: Call, headers: Mapping[str, str], model: str, *, chat: bool) -> None:
        """Begin the span of a request whose tenant is known."""
        given = {name: headers[name] for name in _HEADERS if len(headers.get(name, "")) in range(1, _LONGEST + 1)}
        parent = self._propagator.extract(given)
        operation = "chat" if chat else "text_completion"
        call.span = self._tracer.start_span(
            f"{operation} {model}", parent, self._kind,
            {
                "gen_ai.operation.name": operation, "gen_ai.request.model": model, "gen_ai.request.id": call.id,
                "unlearn_peft.tenant": call.tenant,
            },
        )  # fmt: skip

    def headers(self, call: Call) -> dict[str, str]:
        """Return what makes a request's span the parent of another program's."""
        from opentelemetry.trace import set_span_in_context

        headers: dict[str, str] = {}
        if call.span is not None:
            self._propagator.inject(headers, set_span_in_context(call.span))
        return headers

    def finish(self, call: Call, status: int, code: str | None) -> None:
        """End a request's span. A second call does nothing."""
        span, call.span = call.span, None
        if span is None:
            return
        now = time.monotonic()
        times = {
            "time_in_queue": (call.began, call.placed), "time_to_first_token": (call.began, call.first),
            "time_in_model_prefill": (call.placed, call.first), "time_in_model_decode": (call.first, now),
            "e2e": (call.began, now),
        }  # fmt: skip
        span.set_attributes(
            {
                "http.response.status_code": status,
                "gen_ai.usage.input_tokens": call.prompt_tokens,
                "gen_ai.usage.output_tokens": call.completion_tokens,
                "unlearn_peft.set.size": len(call.applied or ()),
                "unlearn_peft.set.digest": call.set_digest,
                **{
                    f"gen_ai.latency.{name}": b - a for name, (a, b) in times.items() if a is not None and b is not None
                },
                **({"error.type": code} if code is not None else {}),
            }  # fmt: skip
        )
        if status >= 500:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR, code)
        span.end()

    def close(self) -> None:
        """Send what is not sent yet."""
        self._provider.shutdown()
