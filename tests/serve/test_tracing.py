"""Traces: one span a request, with figures and names, and no text."""

import json
import sys

import httpx
import openai
import pytest
from fake_vllm import FakeVllm, install_vllm, serving
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving import KEYS, Fixed, client, make_adapters, make_policy_values, running

from unlearn_peft import load_base
from unlearn_peft.errors import UnlearnError
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.tracing import Tracing
from unlearn_peft.serve.vllm.engine import VllmEngine
from unlearn_peft.serve.vllm.plugin import Sets, make_resolver

MODEL, SECRET = "tiny", "green stars"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


@pytest.fixture
def spans():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exporter.tracing = Tracing(provider)
    return exporter


@pytest.fixture
def url(tiny_folder, adapters, spans):
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL)
    policy = make_policy_values(adapters, {"alice": {"a": 1.0, "b": 0.5}, "bob": {}})
    with running(engine, policy, tracing=spans.tracing) as (_, where):
        yield where


def ask(url, tenant="alice", **settings):
    settings = {"max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}, **settings}
    return client(url, tenant).completions.create(model=MODEL, prompt=SECRET, **settings)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_one_span_with_its_figures(url, spans, stream):
    found = ask(url, stream=stream)
    if stream:
        list(found)
    (span,) = spans.get_finished_spans()
    facts = dict(span.attributes)
    assert span.name == "text_completion tiny" and span.kind is SpanKind.SERVER and span.parent is None
    assert facts["unlearn_peft.tenant"] == "alice" and facts["unlearn_peft.set.size"] == 2
    assert len(facts["unlearn_peft.set.digest"]) == 64 and facts["http.response.status_code"] == 200
    assert facts["gen_ai.usage.output_tokens"] == 6 and facts["gen_ai.usage.input_tokens"] > 1
    queue, prefill, decode, first, whole = (
        facts[f"gen_ai.latency.{name}"]
        for name in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode", "time_to_first_token", "e2e")
    )
    assert min(queue, prefill, decode) > 0 and queue + prefill == pytest.approx(first)
    assert first + decode == pytest.approx(whole) and whole <= (span.end_time - span.start_time) / 1e9 + 0.1
    assert span.status.status_code is StatusCode.UNSET and "error.type" not in facts


def test_spans_hold_no_text_and_no_key(url, spans):
    answer = ask(url, max_tokens=8).choices[0].text
    with pytest.raises(openai.BadRequestError):
        ask(url, extra_body={"echo": SECRET})
    with pytest.raises(openai.NotFoundError):
        client(url).completions.create(model=f"no {SECRET}", prompt=SECRET)
    written = " ".join(span.to_json() for span in spans.get_finished_spans())
    assert len(spans.get_finished_spans()) == 3
    for text in (SECRET, answer.strip(), KEYS["alice"]):
        assert text and text not in written and json.dumps(text)[1:-1] not in written


def test_the_clients_trace_goes_on(url, spans):
    headers = {"authorization": f"Bearer {KEYS['bob']}", "traceparent": PARENT, "tracestate": "x=1"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).is_success
    headers["traceparent"] = "nonsense"
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).is_success
    first, second = spans.get_finished_spans()
    assert f"{first.context.trace_id:032x}" == PARENT[3:35] and f"{first.parent.span_id:016x}" == PARENT[36:52]
    assert first.name == "chat tiny" and first.attributes["unlearn_peft.set.size"] == 0
    assert second.parent is None and second.context.trace_id != first.context.trace_id


def test_what_a_client_writes_for_a_trace_is_short_and_in_no_log(url, spans, caplog):
    headers = {"authorization": f"Bearer {KEYS['bob']}", "traceparent": PARENT}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for state in ("my secret words", "x=1", ",".join(f"a{n}=1" for n in range(200))):
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers | {"tracestate": state}).is_success
    assert [len(span.parent.trace_state) for span in spans.get_finished_spans()] == [0, 1, 0]
    assert "secret" not in caplog.text


def test_refusals_have_spans_and_unknown_keys_have_none(url, spans):
    with pytest.raises(openai.BadRequestError):
        ask(url, max_tokens=100_000)
    with pytest.raises(openai.AuthenticationError):
        ask(url, tenant="nobody")
    (span,) = spans.get_finished_spans()
    facts = dict(span.attributes)
    assert facts["error.type"] == "context_length_exceeded" and facts["http.response.status_code"] == 400
    assert "gen_ai.latency.time_in_queue" not in facts and span.status.status_code is StatusCode.UNSET


def test_errors_of_the_server_are_errors(tiny_folder, adapters, spans, tmp_path):
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL)
    values = make_policy_values({"a": tmp_path / "gone"}, {"alice": {"a": 1.0}})
    with running(engine, values, tracing=spans.tracing) as (_, where), pytest.raises(openai.InternalServerError):
        ask(where)
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR and span.attributes["error.type"] == "adapter_unavailable"


def test_vllm_gets_the_span_as_its_parent(tiny_folder, adapters, spans, tmp_path, monkeypatch):
    install_vllm(monkeypatch)
    source = Fixed(make_policy_values(adapters, {"alice": {"a": 1.0}}))
    sets = Sets(source, tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=10**9)
    fake, seen = FakeVllm(load_base(str(tiny_folder)), make_resolver(sets)), []

    @fake.app.middleware("http")
    async def note(request, go_on):
        seen.append((request.url.path, request.headers.get("traceparent")))
        return await go_on(request)

    with serving(fake) as vllm:
        engine = VllmEngine([vllm], str(tiny_folder), name=MODEL)
        with running(engine, source, tracing=spans.tracing) as (_, where):
            ask(where)
    (span,) = spans.get_finished_spans()
    (header,) = [found for path, found in seen if path == "/v1/completions" and found]
    assert header.startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UnlearnError, match=r"unlearn-peft\[otel\]"):
        Tracing()


def test_spans_are_sent_by_otlp_to_where_the_variable_says(monkeypatch):
    """The exporter that `--traces` uses, against a collector that notes what comes."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from unlearn_peft.serve.request import Call

    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    tracing, call = Tracing(), Call("alice", None)
    tracing.start(call, {}, MODEL, chat=True)
    tracing.finish(call, 200, None)
    tracing.finish(call, 503, "again")  # does nothing
    tracing.close()
    server.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces" and b"chat tiny" in body and b"alice" in body and b"again" not in body
