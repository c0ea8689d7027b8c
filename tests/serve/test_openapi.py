"""The OpenAPI document is what the server does: schemathesis makes requests of it, right ones and wrong ones."""

import json
import logging
import math
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import KEYS, make_adapters, make_policy_values, running

from unlearn_peft import load_base
from unlearn_peft.serve.api import connection
from unlearn_peft.serve.api.playground import Playground
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits

sys.path.insert(0, str(Path(__file__).parent.parent / "attacks"))

from fuzz_bodies import fuzz  # noqa: E402

EXAMPLES = 150  # of each operation, right ones and wrong ones


@pytest.fixture
def server(tiny_folder, tmp_path, monkeypatch):
    """A server of a tenant with an adapter; yields its URL and its audit log. Refusals come at once."""
    monkeypatch.setattr(connection, "_BURST", math.inf)
    adapters = make_adapters(tmp_path, tiny_folder, seeds=(1, 2))
    policy = make_policy_values(adapters, {"alice": ["a"]}, {"alice": {"b": 1.0}})
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny", max_batch=4)
    limits = Limits(max_tokens=8, prompt_tokens=200, connections=4000)
    audit = tmp_path / "audit.jsonl"
    with running(engine, policy, limits=limits, audit=AuditLog(audit), playground=Playground()) as (_, url):
        yield url, audit


def test_the_document_names_the_routes_and_what_their_bodies_hold(server):
    found = httpx.get(f"{server[0]}/openapi.json").json()
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "forget", "max_tokens", "stream"} <= fields.keys()
    assert chat["security"] == [{"key": []}] and "4XX" in chat["responses"]
    assert {"/v1/models", "/healthz", "/readyz", "/metrics", "/v1/completions"} <= found["paths"].keys()


@pytest.mark.long
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_requests_of_the_document_get_what_it_says(server, mode, caplog):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        ignored_auth,
        response_schema_conformance,
        status_code_conformance,
    )

    url, audit = server
    checks = [not_a_server_error, content_type_conformance, ignored_auth, response_schema_conformance,
              status_code_conformance]  # fmt: skip
    schema, statuses, prints = schemathesis.openapi.from_url(f"{url}/openapi.json"), Counter(), set()
    kind = schemathesis.GenerationMode(mode)
    head = {"Authorization": f"Bearer {KEYS['alice']}"}

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "negative" and operation.method == "get":
            continue  # nothing that they take could be wrong

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=kind))
        def ask(case):
            if isinstance(case.body, dict) and "model" in case.body and isinstance(case.body["model"], str):
                case.body["model"] = "tiny"  # else none would get further
            response = case.call(headers=head)
            statuses[response.status_code] += 1
            case.validate_response(response, checks=checks, headers=head)
            if response.status_code == 200 and case.operation.method == "post":
                parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
                prints.update(json.loads(part)["system_fingerprint"] for part in parts if "[DONE]" not in part)

        ask()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    admitted = [line for line in lines if line["event"] == "admitted"]
    assert all({each["name"]: each["strength"] for each in line["adapters"]}["a"] == 1.0 for line in admitted)
    assert prints <= {f"fp_{line['set'][:16]}" for line in admitted}, "no answer without its set"
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert statuses[400] and (mode == "negative" or (statuses[200] and prints)), statuses


def test_a_short_fuzz_of_bodies(tmp_path):
    counts, findings = fuzz(tmp_path, 300, seed=5)
    assert not findings and sum(counts.values()) == 300 and {200, 400} <= counts.keys()
