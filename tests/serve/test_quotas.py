"""Quotas of requests and tokens, by tenant."""

import json
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from limits.storage import MemoryStorage
from serving import client, make_policy_values, refusal_of, running, wait_for

from unlearn_peft import load_base
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits
from unlearn_peft.serve.policy.policy import make_policy
from unlearn_peft.serve.policy.store import PolicyStore
from unlearn_peft.serve.policy.yaml_file import dump_policy, parse_policy
from unlearn_peft.serve.quotas import Quotas
from unlearn_peft.serve.request import ApiError

ME = {"who": "me"}


@pytest.fixture
def serve(tiny_folder):
    opened = []

    def start(quotas, **settings):
        values = make_policy_values({}, {"alice": [], "bob": []})
        values["tenants"]["alice"]["quotas"] = quotas
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
        opened.append(running(engine, values, **settings))
        return opened[-1].__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def ask(url, tenant="alice", prompt=(5, 6, 7), count=4, **settings):
    settings = {"extra_body": {"ignore_eos": True}, **settings}
    return client(url, tenant).completions.create(model="tiny", prompt=list(prompt), max_tokens=count, **settings)


def refused(url, code, **settings):
    with pytest.raises(openai.RateLimitError) as error:
        ask(url, **settings)
    assert error.value.code == code
    return error.value


def test_requests_beyond_the_quota_are_refused_and_others_are_not(serve, tmp_path):
    handler, url = serve({"requests": "3/hour"}, audit=AuditLog(tmp_path / "audit.jsonl"))
    for _ in range(3):
        assert ask(url)
    for _ in range(3):
        error = refused(url, "quota_requests")
    assert "your quota of 3 requests in 3600 s is used up" in str(error)
    assert 3500 < int(error.response.headers["retry-after"]) <= 3600
    for _ in range(5):
        assert ask(url, "bob"), "another tenant, without a quota"
    assert handler.active == 0 and httpx.get(f"{url}/readyz").status_code == 200
    assert 'unlearn_peft_refusals_total{code="quota_requests"} 3.0' in httpx.get(f"{url}/metrics").text
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["code"] for line in lines if line["event"] == "finished" and line["status"] == 429] == [
        "quota_requests"
    ] * 3


def test_the_window_ends(serve):
    _, url = serve({"requests": "1/second"})
    ask(url)
    error = refused(url, "quota_requests")
    time.sleep(int(error.response.headers["retry-after"]))
    assert ask(url)


def test_tokens_that_were_read_and_generated_count(serve):
    _, url = serve({"tokens": "20/hour"})
    assert ask(url).usage.total_tokens == 7 and ask(url) and ask(url), "21, the last of them began before"
    assert "your quota of 20 tokens" in str(refused(url, "quota_tokens"))


def test_a_stream_that_nobody_reads_is_paid_for(serve):
    handler, url = serve({"tokens": "40/hour"})
    stream = ask(url, count=50, stream=True)
    next(iter(stream))
    wait_for(lambda: not handler._places.active)
    stream.close()
    refused(url, "quota_tokens")


def test_a_request_that_is_refused_costs_no_tokens(serve):
    _, url = serve({"tokens": "10/hour"})
    for _ in range(5):
        with pytest.raises(openai.BadRequestError):
            ask(url, count=5000)
    assert ask(url)


def test_the_servers_own_quotas_are_for_whom_the_policy_has_none(serve):
    limits = Limits(quota_requests="1/hour", quota_tokens="1000/hour")
    handler, url = serve({"requests": "2/hour"}, limits=limits)
    assert ask(url, "bob") and ask(url) and ask(url)
    refused(url, "quota_requests")
    refused(url, "quota_requests", tenant="bob")
    values = make_policy_values({}, {"alice": [], "bob": []})
    values["tenants"]["bob"]["quotas"] = {"requests": "5/hour"}
    handler.policies.policy = make_policy(values, "test")
    assert ask(url, "bob"), "a changed quota begins anew"
    assert isinstance(handler._quotas._limiter.storage, MemoryStorage)


def test_quotas_in_a_policy_and_a_store(tmp_path):
    text = b"{adapters: {}, tenants: {t: {forget: [], quotas: {tokens: 5/day, requests: 60/minute}}}}"
    policy = parse_policy(text, "it", tmp_path)
    assert policy.tenants["t"].quotas == {"requests": "60/minute", "tokens": "5/day"}
    assert parse_policy(dump_policy(policy).encode(), "it", tmp_path) == policy
    for quotas, told in {
        "{requests: 0/minute}": "expected a quota such as 60/minute",
        "{requests: 5}": "expected a quota such as 60/minute",
        "{tokens: 5 per week}": "expected a quota such as 60/minute",
        "{token: 5/day}": "'token' is no quota: expected requests or tokens",
        "[5]": "expected a mapping",
    }.items():
        assert told in refusal_of(f"{{adapters: {{}}, tenants: {{t: {{forget: [], quotas: {quotas}}}}}}}", tmp_path)
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    store.replace(policy, **ME)
    assert store.read_all() == policy and store.current().tenants["t"].quotas == policy.tenants["t"].quotas
    store.quota("t", {"tokens": None, "requests": "7/second"}, **ME)
    assert store.current().tenants["t"].quotas == {"requests": "7/second"}
    assert store.history(1)[0].what["before"] == {"requests": "60/minute", "tokens": "5/day"}
    store.close()


def test_the_commands(run, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_PEFT_STORE", str(tmp_path / "tenants.db"))
    run("tenant", "add", "acme")
    code, out, _ = run("tenant", "quota", "acme", "--requests", "60/minute", "--tokens", "9/day")
    assert code == 0 and "requests 60/minute, tokens 9/day" in out
    assert run("tenant", "quota", "acme", "--tokens", "none")[0] == 0
    assert "quota of requests: 60/minute" in (shown := run("tenant", "show", "acme")[1]) and "tokens" not in shown
    assert "which quota?" in run("tenant", "quota", "acme")[2]
    assert "expected a quota such as" in run("tenant", "quota", "acme", "--tokens", "many")[2]
    arguments = ("serve", "--adapter", tmp_path / "none", "--quota-tokens", "many")
    assert "--quota-tokens is 'many': expected a quota" in run(*arguments)[2]


def test_a_clock_that_is_set_back_makes_no_window_longer(monkeypatch):
    now = [1.8e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    quotas = Quotas({"requests": "2/minute"})
    call = SimpleNamespace(tenant="t", policy=SimpleNamespace(tenants={"t": SimpleNamespace(quotas={})}))
    for _ in range(3):
        quotas.admit(call)
        quotas.admit(call)
        with pytest.raises(ApiError) as refused:
            quotas.admit(call)
        assert 0 < int(refused.value.headers["Retry-After"]) <= 60
        now[0] -= 86_400
