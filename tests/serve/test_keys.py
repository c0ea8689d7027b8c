"""API keys with names, ends, scopes and last use; who asked, in the audit and the access log."""

import json
import logging
from datetime import datetime, timedelta, timezone

import httpx
import openai
import pytest
from serving import KEYS, Fixed, changed, client, make_adapters, make_policy_values, refusal_of, running, wait_for

from unlearn_peft import load_base
from unlearn_peft.errors import PolicyError
from unlearn_peft.serve import key_log
from unlearn_peft.serve.api.playground import Playground
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.policy import entries
from unlearn_peft.serve.policy.policy import key_digest, make_policy
from unlearn_peft.serve.policy.store import PolicyStore
from unlearn_peft.serve.policy.yaml_file import dump_policy, parse_policy

ME = {"who": "me"}
PAST, FUTURE = "2020-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder, seeds=(1, 2))


@pytest.fixture
def serve(tiny_folder, adapters, tmp_path):
    opened = []

    def start(policy, **settings):
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
        opened.append(running(engine, policy, **settings))
        return opened[-1].__enter__()

    yield start
    for context in reversed(opened):
        context.__exit__(None, None, None)


def with_keys(adapters, **keys):
    """Alice's policy, each of whose keys (`uf-NAME`) has these settings."""
    values = make_policy_values(adapters, {"alice": ["a"]}, {"alice": ["b"]})
    values["tenants"]["alice"]["keys"] = {key_digest(f"uf-{name}"): settings for name, settings in keys.items()}
    return values


def complete(url, key, **settings):
    settings = {"model": "tiny", "prompt": "x", "max_tokens": 2, **settings}
    return client(url, key).completions.create(**settings)


def test_a_key_that_is_over_is_refused(serve, adapters, caplog, monkeypatch):
    soon = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()
    handler, url = serve(with_keys(adapters, old={"expires": PAST}, soon={"expires": soon}, new={"expires": FUTURE}))
    assert complete(url, "uf-new") and complete(url, "uf-soon")
    with pytest.raises(openai.AuthenticationError, match="this API key ended at 2020") as refused:
        complete(url, "uf-old")
    assert refused.value.code == "expired_api_key"
    monkeypatch.setattr(entries, "_now", lambda: datetime.fromisoformat(soon))  # without any change of the policy
    with pytest.raises(openai.AuthenticationError):
        complete(url, "uf-soon")
    assert f"the expired key {key_digest('uf-old')[:12]} of tenant 'alice' of 127.0.0.1 (req-" in caplog.text
    assert "uf-old" not in caplog.text and handler.active == 0


def test_a_key_may_do_what_its_scopes_say(serve, adapters):
    keys = {"all": {}, "none": {"scopes": []}, **{s: {"scopes": [s]} for s in ("add", "logprobs", "playground")}}
    _, url = serve(with_keys(adapters, **keys), playground=Playground(base=True))

    def page(key, path="adapters"):
        return httpx.get(f"{url}/playground/api/{path}", headers={"Authorization": f"Bearer {key}"}).status_code

    def base(key):
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        where = f"{url}/playground/api/base/completions"
        return httpx.post(where, json=body, headers={"Authorization": f"Bearer {key}"}).status_code

    tries = {
        "add": lambda key: complete(url, key, extra_body={"forget": ["b"]}),
        "logprobs": lambda key: complete(url, key, logprobs=0),
    }
    for name in keys:
        assert complete(url, f"uf-{name}").choices
        for scope, attempt in tries.items():
            if name in ("all", scope):
                assert attempt(f"uf-{name}").choices
                continue
            with pytest.raises(openai.PermissionDeniedError, match=f"does not allow '{scope}'") as refused:
                attempt(f"uf-{name}")
            assert refused.value.code == "key_scope"
        assert complete(url, f"uf-{name}", extra_body={"forget": ["a"]}).choices, "its own, as strong as it is anyway"
        want = 200 if name in ("all", "playground") else 403
        assert (page(f"uf-{name}"), base(f"uf-{name}")) == (want, want)


def test_who_asked_is_in_the_audit_log_and_the_access_log(serve, adapters, tmp_path):
    log, access = AuditLog(tmp_path / "audit.jsonl"), AuditLog(tmp_path / "access.jsonl", keep=10, required=False)
    _, url = serve(with_keys(adapters, it={}), audit=log, access=access)
    key = key_digest("uf-it")[:12]
    answer = client(url, "uf-it").completions.with_raw_response.create(model="tiny", prompt="SECRET", max_tokens=2)
    stream = client(url, "uf-it").completions.create(model="tiny", prompt="x", max_tokens=2, stream=True)
    assert list(stream)
    with pytest.raises(openai.AuthenticationError) as refused:
        complete(url, "uf-wrong")
    with pytest.raises(openai.NotFoundError):
        complete(url, "uf-it", model="another")
    httpx.get(f"{url}/healthz")
    httpx.get(f"{url}/no\u2028where%1b[2J?key=uf-it")
    written = lambda: (tmp_path / "access.jsonl").read_text().splitlines()  # noqa: E731
    wait_for(lambda: len(written()) >= 5)  # a line is written when its response has been sent
    lines = [json.loads(one) for one in written()]
    told = [(line["status"], line["tenant"], line["key"], line["path"]) for line in lines]
    path = "/v1/completions"
    assert told == [
        (200, "alice", key, path), (200, "alice", key, path), (401, None, None, path), (404, "alice", key, path),
        (404, None, None, "/no\\u2028where\\u001b[2J"),
    ]  # fmt: skip
    assert (
        lines[0]["id"] == answer.headers["x-request-id"]
        and lines[2]["id"] == refused.value.response.headers["x-request-id"]
    )
    assert all(one["client"] == "127.0.0.1" and one["seconds"] >= 0 and one["event"] == "access" for one in lines)
    assert lines[0]["bytes"] == int(answer.headers["content-length"]) and lines[0]["method"] == "POST"
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(records) == 5 and all((one["key"], one["client"]) == (key, "127.0.0.1") for one in records)
    assert {one["id"] for one in records} == {lines[n]["id"] for n in (0, 1, 3)}
    both = (tmp_path / "audit.jsonl").read_text() + (tmp_path / "access.jsonl").read_text()
    assert not [word for word in ("SECRET", "uf-it", "uf-wrong") if word in both]


def test_an_access_log_that_cannot_be_written_refuses_nobody(serve, adapters, tmp_path, monkeypatch, caplog):
    access = AuditLog(tmp_path / "access.jsonl", required=False, name="access")
    _, url = serve(with_keys(adapters, it={}), access=access)

    def full(line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(access, "_append", full)
    assert complete(url, "uf-it") and complete(url, "uf-it")
    assert caplog.text.count("cannot write to the access log") == 1 and "audit log" not in caplog.text


def test_refused_keys_are_logged_without_the_key_and_not_in_a_flood(serve, adapters, caplog, monkeypatch):
    _, url = serve(with_keys(adapters, it={}))
    monkeypatch.setattr(key_log, "_LOG_SECONDS", 1e9)
    caplog.clear()
    for _ in range(5):
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer uf-guess"}).status_code == 401
    monkeypatch.setattr(key_log, "_LOG_SECONDS", 0)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    told = [one.getMessage() for one in caplog.records if one.name == key_log.__name__]
    assert len(told) == 2 and told[0].startswith("refused an unknown key of 127.0.0.1 (req-")
    assert told[1].startswith("refused a request without a key of") and "and 4 more since" in told[1]
    assert "uf-guess" not in caplog.text


def test_the_last_use_is_written_together_and_not_with_each_request(tiny_folder, adapters, tmp_path, monkeypatch):
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    store.adapter("a", adapters["a"], None, **ME)
    store.add("acme", **ME)
    keys = [store.add_key("acme", {"name": f"k{n}"}, **ME) for n in range(3)]
    writes, note = [], store.note_uses
    monkeypatch.setattr(store, "note_uses", lambda uses: (writes.append(dict(uses)), note(uses)))
    monkeypatch.setattr(key_log, "_FLUSH_SECONDS", 2.0)
    revision = len(store.history())
    with running(LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny"), store) as (_, url):
        for _ in range(10):
            for key in keys[:2]:
                complete(url, key)
        with pytest.raises(openai.AuthenticationError):
            complete(url, "uf-unknown")
        store.revoke_key("acme", "k1", **ME)
    assert 1 <= len(writes) <= 10 and {*writes[0]} <= {key_digest(key) for key in keys[:2]}
    uses = store.key_uses("acme")
    assert list(uses) == [key_digest(keys[0])], "one was revoked, one never used"
    assert abs(datetime.fromisoformat(uses[key_digest(keys[0])]) - datetime.now(timezone.utc)) < timedelta(minutes=5)
    assert len(store.history()) == revision + 1 and store.read_all().tenants["acme"].keys.keys() == {
        key_digest(keys[n]) for n in (0, 2)
    }
    store.replace(store.read_all(), **ME)
    assert store.key_uses("acme") == uses, "an edit leaves it"
    store.close()


def test_a_store_that_may_only_be_read_serves_and_says_so_once(serve, tmp_path, adapters, monkeypatch, caplog):
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    store.add("acme", **ME)
    key = store.add_key("acme", **ME)
    monkeypatch.setattr(key_log, "_FLUSH_SECONDS", 0.01)

    def refuse(uses):
        raise PolicyError("cannot write to the store: attempt to write a readonly database")

    monkeypatch.setattr(store, "note_uses", refuse)
    _, url = serve(store)
    for _ in range(5):
        complete(url, key)
    assert caplog.text.count("when keys were last used is not noted") == 1
    store.close()


def test_settings_of_keys_in_a_policy(tmp_path):
    digests = [key_digest(str(n)) for n in range(3)]
    text = f"""
adapters: {{}}
tenants:
  plain: {{forget: [], keys: [{digests[0]}]}}
  acme:
    forget: []
    keys:
      {digests[1]}: {{name: laptop, expires: 2027-01-31, scopes: [logprobs, add, add]}}
      {digests[2]}:
"""
    policy = parse_policy(text.encode(), "it", tmp_path)
    entry = policy.tenants["acme"].keys[digests[1]]
    assert (entry.name, entry.expires, entry.scopes) == ("laptop", "2027-01-31T00:00:00+00:00", ("add", "logprobs"))
    assert policy.tenants["acme"].keys[digests[2]].scopes is None
    again = parse_policy(dump_policy(policy).encode(), "it", tmp_path)
    assert again == policy and f"keys:\n    - {digests[0]}" in dump_policy(policy)
    for settings, told in {
        "{name: a b}": "'a b' is no name",
        "{expires: soon}": "expected a time such as 2027-01-31",
        "{expires: 5}": "expected a time such as",
        "{scopes: all}": "expected a list of add, logprobs, playground",
        "{scopes: [admin]}": "expected a list of add, logprobs, playground",
        "{nam: x}": "did you mean 'name'?",
        "[x]": "expected a mapping",
    }.items():
        keys = f"{{{digests[0]}: {settings}}}"
        message = refusal_of(f"{{adapters: {{}}, tenants: {{t: {{forget: [], keys: {keys}}}}}}}", tmp_path)
        assert told in message and digests[0] not in message
    twice = changed(policy.dump())
    twice["tenants"]["acme"]["keys"] = [digests[1], digests[1].upper()]
    with pytest.raises(PolicyError, match="a key stands there twice"):
        make_policy(twice, "it")


def test_the_commands(run, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_PEFT_STORE", str(tmp_path / "tenants.db"))

    def done(*arguments):
        code, out, err = run("tenant", *arguments)
        assert code == 0, err
        return out

    done("add", "acme")
    made = json.loads(
        done("key", "acme", "--name", "laptop", "--expires", "90d", "--scopes", "add, logprobs", "--json")
    )
    done("key", "acme", "--scopes", "none")
    short = made["sha256"][:12]
    shown = json.loads(done("show", "acme", "--json"))
    settings = shown["key_settings"][short]
    assert settings["name"] == "laptop" and settings["scopes"] == ["add", "logprobs"] and len(shown["keys"]) == 2
    left = datetime.fromisoformat(settings["expires"]) - datetime.now(timezone.utc)
    assert timedelta(days=89) < left <= timedelta(days=90)
    store = PolicyStore(tmp_path / "tenants.db")
    store.note_uses({made["sha256"]: "2026-11-30T12:00:00+00:00", "f" * 64: "2026-11-30T12:00:00+00:00"})
    text = done("show", "acme")
    assert (
        f"key {short}... laptop; ends {settings['expires']}; may add, logprobs; last used 2026-11-30T12:00:00" in text
    )
    assert "; may only ask" in text
    for arguments, told in {
        ("--name", "laptop"): "has a key called 'laptop'",
        ("--expires", "soon"): "or a span such as 90d or 12h",
        ("--scopes", "admin"): "expected a list of add, logprobs, playground",
    }.items():
        code, _, err = run("tenant", "key", "acme", *arguments)
        assert code == 2 and told in err
    done("key", "acme", "--revoke", "laptop")
    assert json.loads(done("show", "acme", "--json"))["key_settings"].keys().isdisjoint([short])
    store.close()


def test_who_has_no_policy_needs_no_key(serve, adapters):
    values = {**make_policy_values(adapters, {}), "tenants": {"local": {"forget": [], "may_add": ["a"]}}}
    handler, url = serve(Fixed(values), open_tenant="local")
    assert complete(url, KEYS["alice"], extra_body={"forget": ["a"]}, logprobs=1) and not handler._keys._uses


@pytest.fixture(autouse=True)
def _logs(caplog):
    caplog.set_level(logging.WARNING)
