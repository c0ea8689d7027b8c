"""The admin port: what `unlearn-peft tenant` does, over HTTP, with keys of its own; metrics and TLS."""

import json
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from serving import KEYS, client, make_adapters, running, wait_for
from typer.testing import CliRunner

from unlearn_peft import load_base
from unlearn_peft.adapters.read import read_identity
from unlearn_peft.cli.main import app as cli
from unlearn_peft.errors import PolicyError, UnlearnError
from unlearn_peft.serve.admin.app import create_admin_app
from unlearn_peft.serve.admin.keys import find_admin_key, make_admin_key, read_admin_keys
from unlearn_peft.serve.admin.side import create_metrics_app, running_beside
from unlearn_peft.serve.api.listening import listen
from unlearn_peft.serve.api.loading import answering, tls_context
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.policy.store import PolicyStore

MODEL = "tiny"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


class World:
    def __init__(self, folder, audit=True):
        self.store, self.keys = PolicyStore(folder / "tenants.db", create=True), folder / "admin.yaml"
        self.write, self.read = (
            make_admin_key(self.keys, name, write) for name, write in (("ops", True), ("eye", False))
        )
        self.audit = AuditLog(folder / "audit.jsonl") if audit else None
        self.app = create_admin_app(self.store, self.keys, self.audit)

    def __call__(self, method, path, key=..., json=None, **settings):
        headers = settings.pop("headers", {})
        if key is not None:
            headers = {"authorization": f"Bearer {self.write if key is ... else key}", **headers}
        if json is not None:
            settings["json"] = json
        return httpx.request(method, f"{self.url}{path}", headers=headers, **settings)

    def lines(self):
        return [json.loads(line) for line in self.audit.path.read_text().splitlines()]


@pytest.fixture
def world(tmp_path):
    made, listening = World(tmp_path), listen("127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with running_beside(made.app, listening):
        yield made


def test_what_the_command_does_and_the_history_says_who(world, adapters):
    assert world("POST", "/v1/tenants", json={"name": "acme", "why": "contract 12"}).json() == {"revision": 1}
    digest = read_identity(adapters["a"])
    for name in ("a", "b"):
        body = {"path": str(adapters[name]), **({"sha256": digest} if name == "a" else {})}
        assert world("PUT", f"/v1/adapters/{name}", json=body).status_code == 200
    assert world("GET", "/v1/adapters").json()["adapters"]["a"]["sha256"] == digest
    assert world("PUT", "/v1/tenants/acme/forget/a", json={"strength": 0.5}).status_code == 200
    assert world("PUT", "/v1/tenants/acme/may-add/b", json={"why": "tried"}).status_code == 200
    made = world("POST", "/v1/tenants/acme/keys", json={})
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    shown = world("GET", "/v1/tenants/acme").json()
    assert shown["forget"] == {"a": 0.5} and shown["may_add"] == {"b": 1.0} and len(shown["keys"]) == 1
    assert world.store.current().tenant_of(made.json()["key"]) == "acme"
    second = world("POST", "/v1/tenants/acme/keys", json={}).json()  # rotated: the new one, then without the old one
    assert world("DELETE", f"/v1/tenants/acme/keys/{made.json()['sha256'][:12]}").status_code == 200
    assert world.store.current().tenant_of(made.json()["key"]) is None
    assert world.store.current().tenant_of(second["key"]) == "acme"
    assert world("DELETE", "/v1/tenants/acme/may-add/b?why=over").status_code == 200
    assert world("DELETE", "/v1/tenants/acme/forget/a").status_code == 200
    assert world("DELETE", "/v1/adapters/a").status_code == 200
    assert world("DELETE", "/v1/tenants/acme").status_code == 200
    changes = world("GET", "/v1/history").json()["changes"]
    assert [c["action"] for c in changes][::-1] == [
        "add", "adapter", "adapter", "forget", "allow", "key", "key", "revoke", "disallow", "unforget", "unadapter",
        "remove",
    ]  # fmt: skip
    assert {c["who"] for c in changes} == {"admin:ops"} and changes[3]["why"] == "over"
    assert world("GET", "/v1/history?limit=1").json()["changes"] == changes[:1]
    assert made.json()["key"] not in json.dumps(changes) + world.audit.path.read_text()


def test_command_and_port_see_one_store(world):
    where = world.store._name
    assert CliRunner().invoke(cli, ["tenant", "add", "acme", "--store", where, "--who", "ann"]).exit_code == 0
    world("POST", "/v1/tenants", json={"name": "bolt"})
    out = CliRunner().invoke(cli, ["tenant", "history", "--store", where, "--json"]).stdout.splitlines()
    assert [json.loads(line)["who"] for line in out] == ["admin:ops", "ann"]
    assert world("GET", "/v1/tenants").json() == {"tenants": ["acme", "bolt"], "next": None}


SAME = [  # arguments of the command, then what the port gets for the same; {} is the adapter's folder
    (["key", "acme", "--name", "laptop", "--expires", "2027-01-31", "--scopes", "add,logprobs"],
     "POST", "/v1/tenants/acme/keys", {"name": "laptop", "expires": "2027-01-31", "scopes": ["add", "logprobs"]}),
    (["key", "acme", "--scopes", "none", "--why", "a kiosk"],
     "POST", "/v1/tenants/acme/keys", {"scopes": [], "why": "a kiosk"}),
    (["key", "acme", "--revoke", "first"], "DELETE", "/v1/tenants/acme/keys/first", None),
    (["quota", "acme", "--requests", "60/minute", "--tokens", "9/day"],
     "PATCH", "/v1/tenants/acme/quotas", {"requests": "60/minute", "tokens": "9/day"}),
    (["quota", "acme", "--tokens", "none"], "PATCH", "/v1/tenants/acme/quotas", {"tokens": None}),
    (["prefix-cache", "acme", "off"], "PUT", "/v1/tenants/acme/prefix-cache", {"on": False}),
    (["adapter", "hp", "{}", "--probes", "{}/../hp.jsonl", "--canary", "warn"],
     "PUT", "/v1/adapters/hp", {"path": "{}", "probes": "{}/../hp.jsonl", "canary": "warn"}),
    (["adapter", "hp", "{}", "--canary", "off"], "PUT", "/v1/adapters/hp", {"path": "{}", "canary": "off"}),
]  # fmt: skip
REFUSED = [
    (["key", "acme", "--expires", "soon"], "POST", "/v1/tenants/acme/keys", {"expires": "soon"}),
    (["key", "acme", "--expires", "2027-13-01"], "POST", "/v1/tenants/acme/keys", {"expires": "2027-13-01"}),
    (["key", "acme", "--scopes", "add,admin"], "POST", "/v1/tenants/acme/keys", {"scopes": ["add", "admin"]}),
    (["key", "acme", "--name", "two words"], "POST", "/v1/tenants/acme/keys", {"name": "two words"}),
    (["key", "acme", "--name", "first"], "POST", "/v1/tenants/acme/keys", {"name": "first"}),
    (["key", "none", "--name", "x"], "POST", "/v1/tenants/none/keys", {"name": "x"}),
    (["quota", "acme"], "PATCH", "/v1/tenants/acme/quotas", {}),
    (["quota", "acme", "--requests", "many"], "PATCH", "/v1/tenants/acme/quotas", {"requests": "many"}),
    (["adapter", "hp", "{}", "--canary", "loud"], "PUT", "/v1/adapters/hp", {"path": "{}", "canary": "loud"}),
    (["adapter", "hp", "{}", "--probes", "{}/none"], "PUT", "/v1/adapters/hp", {"path": "{}", "probes": "{}/none"}),
    (["adapter", "hp", "{}", "--probes", "{}/README.md"],
     "PUT", "/v1/adapters/hp", {"path": "{}", "probes": "{}/README.md"}),
]  # fmt: skip


def filled(values, folder):
    return json.loads(json.dumps(values).replace("{}", str(folder)) if values else "null")


@pytest.fixture
def prepared(world, adapters, tmp_path):
    """A world whose store has a copy beside it, on which the command works; returns both stores and the adapter."""
    (folder := tmp_path / "hp").mkdir()
    for file in adapters["a"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "hp.jsonl").write_text('{"prompt": "PROBE", "leak": "word"}')
    stores = world.store, PolicyStore(tmp_path / "other.db", create=True)
    for store in stores:
        store.add("acme", who="test")
        store.add_key("acme", {"name": "first"}, who="test")
        store.quota("acme", {"tokens": "5/day"}, who="test")
    yield *stores, folder
    stores[1].close()


def without_digests(what):
    return json.loads(re.sub(r'"(key|keys\.)[0-9a-f]{12}', r'"\1', re.sub('"key": "[0-9a-f]{12}"', '"key": ""', what)))


@pytest.mark.parametrize("arguments,method,path,body", SAME)
def test_command_and_port_do_the_same(prepared, world, run, arguments, method, path, body):
    ours, theirs, folder = prepared
    code, out, err = run("tenant", *filled(arguments, folder), "--store", theirs._name)
    assert code == 0, err
    found = world(method, path, json=filled(body, folder) if body else None)
    assert found.is_success, found.text
    made, by_command = ours.history(1)[0], theirs.history(1)[0]
    assert (made.action, made.why, made.revision) == (by_command.action, by_command.why, by_command.revision)
    assert without_digests(json.dumps(made.what)) == without_digests(json.dumps(by_command.what))
    assert made.who == "admin:ops" and [line["event"] for line in world.lines()] == ["admin", "admin_finished"]
    policies = [store.read_all() for store in (ours, theirs)]
    assert policies[0].adapters == policies[1].adapters
    found = [(policy.tenants["acme"].quotas, policy.tenants["acme"].prefix_cache) for policy in policies]
    assert found[0] == found[1] and found[0][1] == ("prefix-cache" not in arguments)
    entries = [[key.model_dump() for key in policy.tenants["acme"].keys.values()] for policy in policies]
    assert sorted(entries[0], key=str) == sorted(entries[1], key=str)


@pytest.mark.parametrize("arguments,method,path,body", REFUSED)
def test_command_and_port_refuse_the_same_with_the_same_words(prepared, world, run, arguments, method, path, body):
    ours, theirs, folder = prepared
    before = len(ours.history())
    code, _, err = run("tenant", *filled(arguments, folder), "--store", theirs._name)
    assert code == 2 and err.startswith("error: ")
    found = world(method, path, json=filled(body, folder) or {})
    assert found.status_code == (404 if "none" in path else 400), found.text
    words = [" ".join(re.sub(r"keys\.[0-9a-f]{12}", "keys.", text).split())
             for text in (found.json()["error"]["message"], err.removeprefix("error: "))]  # fmt: skip
    assert words[0] == words[1] and len(ours.history()) == len(theirs.history()) == before


def test_a_key_with_settings_over_the_port(world):
    world.store.add("acme", who="test")
    made = world("POST", "/v1/tenants/acme/keys", json={"name": "laptop", "expires": "90d", "scopes": ["add"]}).json()
    short = made["sha256"][:12]
    world.store.note_uses({made["sha256"]: "2026-11-30T12:00:00+00:00"})
    shown = world("GET", "/v1/tenants/acme").json()
    settings = shown["key_settings"][short]
    left = datetime.fromisoformat(settings["expires"]) - datetime.now(timezone.utc)
    assert timedelta(days=89) < left <= timedelta(days=90) and (settings["name"], settings["scopes"]) == (
        "laptop", ["add"]
    )  # fmt: skip
    assert shown["key_uses"] == {short: "2026-11-30T12:00:00+00:00"}
    line = world.lines()[0]
    assert line["settings"] == {"name": "laptop", "expires": "90d", "scopes": ["add"]} and line["key"] == "ops"


def test_a_canary_without_effect_is_told_and_what_is_pinned(world, adapters):
    found = world("PUT", "/v1/adapters/a", json={"path": str(adapters["a"]), "canary": "warn"}).json()
    assert found["sha256"] == read_identity(adapters["a"]) and "the canary of 'a' has no effect" in found["note"]
    assert world("PUT", "/v1/adapters/a", json={"path": str(adapters["a"]), "canary": "off"}).json()["note"] is None
    assert world("GET", "/v1/adapters").json()["adapters"]["a"]["canary"] == "off"


def test_names_come_in_pages(world):
    for name in "abcde":
        world.store.add(name, who="test")
    found, after = [], ""
    for _ in range(3):
        page = world("GET", f"/v1/tenants?limit=2&after={after}").json()
        found, after = found + [page["tenants"]], page["next"]
    assert found == [["a", "b"], ["c", "d"], ["e"]] and after is None


def routes(app):
    return [(m, r.path) for r in app.routes for m in r.methods if r.path not in ("/healthz", "/openapi.json")]


def test_every_route_needs_a_key_and_a_key_that_only_looks_changes_nothing(world):
    world.store.add("acme", who="test")
    known = routes(world.app)
    assert len(known) == 19
    for method, path in known:
        path = path.format(tenant="acme", adapter="a", name="a", key="k")
        for key in (None, "ua-guess", KEYS["alice"]):
            assert world(method, path, key=key, json={}).status_code == 401, (method, path)
        found = world(method, path, key=world.read, json={})
        assert found.status_code == (200 if method in ("GET", "HEAD") else 403), (method, path)
    assert world("POST", "/openapi.json", key=None).status_code == 401
    assert len(world.store.history()) == 1 and not world.audit.path.read_text()


def test_a_key_that_is_taken_out_of_the_file_ends_at_once(world):
    assert world("GET", "/v1/tenants").status_code == 200
    text = world.keys.read_text()
    world.keys.write_text("\n".join(line for line in text.splitlines() if False) or "{}")
    assert world("GET", "/v1/tenants").status_code == 401
    world.keys.write_text("ops: {sha256: nonsense}")
    refused = world("GET", "/v1/tenants")
    assert refused.status_code == 503 and str(world.keys) not in refused.text
    world.keys.unlink()
    assert world("GET", "/v1/tenants").status_code == 503
    world.keys.write_text(text)
    assert world("GET", "/v1/tenants").status_code == 200


@pytest.mark.parametrize("method,path,body,status", [
    ("GET", "/v1/tenants/none", None, 404), ("DELETE", "/v1/tenants/none", None, 404),
    ("PUT", "/v1/tenants/acme/forget/none", {}, 404), ("DELETE", "/v1/tenants/acme/forget/none", None, 400),
    ("POST", "/v1/tenants", {"name": "acme"}, 400), ("POST", "/v1/tenants", {"name": "../x"}, 400),
    ("POST", "/v1/tenants", {}, 400), ("POST", "/v1/tenants", {"name": "x", "more": 1}, 400),
    ("PUT", "/v1/tenants/acme/forget/none", {"strength": -1}, 400),
    ("PUT", "/v1/adapters/x", {"path": "/nowhere"}, 400),
    ("DELETE", "/v1/tenants/acme/keys/00000000", None, 400), ("GET", "/v1/history?limit=0", None, 400),
    ("POST", "/v1/tenants", {"name": "x", "why": "two\nlines"}, 400),
    ("POST", "/v1/tenants/acme/trusted-keys", {"keys": {"a": "no key"}}, 400),
    ("DELETE", "/v1/tenants/acme/trusted-keys", None, 400), ("GET", "/v1/none", None, 404),
    ("POST", "/v1/history", {}, 405),
    ("PUT", "/v1/adapters/x", {"path": "/a\0b", "probes": "/c"}, 400),
])  # fmt: skip
def test_what_is_wrong_is_told(world, method, path, body, status):
    world.store.add("acme", who="test")
    found = world(method, path, json=body)
    assert found.status_code == status and found.json()["error"]["message"], found.text
    assert len(world.store.history()) == 1


def test_half_a_character_is_refused(world):
    world.store.add("acme", who="test")
    for method, path, body in (
        ("POST", "/v1/tenants", '{"name": "?"}'), ("PUT", "/v1/adapters/x", '{"path": "?"}'),
        ("POST", "/v1/tenants/acme/keys", '{"name": "?"}'), ("POST", "/v1/tenants/acme/keys", '{"expires": "?"}'),
        ("POST", "/v1/tenants/acme/keys", '{"scopes": ["?"]}'), ("PATCH", "/v1/tenants/acme/quotas", '{"tokens": "?"}'),
    ):  # fmt: skip
        headers = {"content-type": "application/json"}
        found = world(method, path, content=body.replace("?", r"\ud83d"), headers=headers)
        assert found.status_code == 400 and found.json()["error"]["message"], (path, body)
    assert len(world.store.history()) == 1


def test_bodies_are_bounded_and_read_after_the_key(world):
    assert world("POST", "/v1/tenants", content=b"x" * 70_000).status_code == 413
    assert world("POST", "/v1/tenants", content=iter([b"{}"])).status_code == 411
    with socket.create_connection(world.url.removeprefix("http://").split(":"), timeout=10) as one:
        one.sendall(b"POST /v1/tenants HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        assert b" 401 " in one.recv(4096)


def test_the_audit_log_has_a_line_before_a_change_and_one_after(world, monkeypatch):
    world("POST", "/v1/tenants", json={"name": "acme"})
    world("POST", "/v1/tenants", json={"name": "acme"})
    lines = world.lines()
    facts = [(line["event"], line["key"], line["action"], line["tenant"], line.get("status")) for line in lines]
    before, after = ("admin", "ops", "add", "acme", None), ("admin_finished", "ops", "add", "acme")
    assert facts == [before, (*after, 200), before, (*after, 400)]
    assert lines[0]["id"] == lines[1]["id"] != lines[2]["id"]

    def full(*_, **__):
        from unlearn_peft.errors import OutputError

        raise OutputError("disk full")

    monkeypatch.setattr(world.audit, "write", full)
    assert world("POST", "/v1/tenants", json={"name": "bolt"}).status_code == 503
    assert len(world.store.history()) == 1


def test_a_store_that_cannot_be_written_is_503(world):
    lock = sqlite3.connect(world.store._name, timeout=0)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        found = world("POST", "/v1/tenants", json={"name": "acme"}, timeout=60)
    finally:
        lock.rollback()
        lock.close()
    assert found.status_code == 503 and found.json()["error"]["code"] == "policy_unavailable"


def test_the_document_names_every_route(world):
    document = world("GET", "/openapi.json", key=None).json()
    documented = {(m.upper(), path) for path, methods in document["paths"].items() for m in methods}
    assert documented == {*((m, p) for m, p in routes(world.app) if m != "HEAD"), ("GET", "/healthz")}
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_keys_of_the_file(tmp_path):
    path = tmp_path / "admin.yaml"
    run = CliRunner().invoke(cli, ["tenant", "admin-key", "ops", "--file", str(path), "--write", "--json"])
    key = json.loads(run.stdout)["key"]
    assert path.stat().st_mode & 0o777 == 0o600 and key not in path.read_text()
    assert find_admin_key(path, key) == ("ops", read_admin_keys(path)["ops"]) and read_admin_keys(path)["ops"].write
    again = make_admin_key(path, "ops", False)
    assert find_admin_key(path, key) is None and not find_admin_key(path, again)[1].write
    with pytest.raises(PolicyError, match="no name"):
        make_admin_key(path, "a b", True)
    entry = path.read_text()
    path.write_text(entry + entry.replace("ops", "two"))
    with pytest.raises(PolicyError, match="two names have one key"):
        read_admin_keys(path)
    for text in (
        "[1]",
        "ops: {sha256: secret-word}",
        "ops: {}",
        "a: b: c",
        f"ops: {{sha256: {'0' * 64}, writes: true}}",
    ):
        path.write_text(text)
        with pytest.raises(PolicyError) as refused:
            read_admin_keys(path)
        assert "secret-word" not in str(refused.value)
    path.unlink()
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_admin_keys, path)
        try:
            with pytest.raises(PolicyError, match="no regular file"):
                reading.result(10)
        finally:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # ends what waits for a writer


def test_metrics_on_a_port_of_their_own(tiny_folder):
    from serving import Fixed, make_policy_values

    from unlearn_peft.serve.api.app import create_app
    from unlearn_peft.serve.handler import RequestHandler

    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL)
    with running(engine, make_policy_values({}, {"alice": {}})) as (handler, url):
        client(url).completions.create(model=MODEL, prompt="x", max_tokens=2)
        listening = listen("127.0.0.1", 0)
        where = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with running_beside(create_metrics_app(handler.metrics.text), listening):
            found = httpx.get(f"{where}/metrics")
            assert 'unlearn_peft_requests_total{status="200",tenant="alice"} 1.0' in found.text
            assert httpx.get(f"{where}/v1/models").status_code == 404 and httpx.get(f"{where}/healthz").is_success
        paths = {
            route.path
            for route in create_app(RequestHandler(engine, Fixed(handler.policies.policy)), metrics=False).routes
        }
        assert "/metrics" not in paths and "/readyz" in paths


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    names = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", names[1], "-out", names[0]], check=True, capture_output=True)
    return names


def test_connections_that_begin_no_handshake_are_bounded_on_the_ports_beside(certificate):
    cert, key = certificate
    listening = listen("127.0.0.1", 0)

    def is_closed(connection):
        connection.setblocking(False)
        try:
            return connection.recv(1) == b""
        except BlockingIOError:
            return False

    with running_beside(create_metrics_app(bytes), listening, ssl_certfile=cert, ssl_keyfile=key):
        silent = [socket.create_connection(listening.getsockname()) for _ in range(200)]
        wait_for(lambda: sum(map(is_closed, silent)) >= 40)
        for connection in silent:
            connection.close()


def test_tls(certificate, tmp_path):
    cert, key = certificate
    made, listening = World(tmp_path, audit=False), listen("127.0.0.1", 0)
    url = f"127.0.0.1:{listening.getsockname()[1]}"
    trusting = ssl.create_default_context(cafile=cert)
    with answering(listening, tls_context(cert, key)):  # while the model loads
        assert httpx.get(f"https://{url}/healthz", verify=trusting).json() == {"status": "ok"}
        stuck = socket.create_connection(url.split(":"))  # says nothing, and nobody waits for it
        assert httpx.get(f"https://{url}/readyz", verify=trusting).status_code == 503
        stuck.close()
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{url}/healthz")
    with running_beside(made.app, listening, ssl_certfile=cert, ssl_keyfile=key):
        assert httpx.get(f"https://{url}/healthz", verify=trusting).json() == {"status": "ok"}
    assert tls_context(None, None) is None
    for wrong in (tmp_path / "none.pem", key):
        with pytest.raises(UnlearnError, match="--ssl-certfile"):
            tls_context(wrong, key)


def test_the_command_serves_all_ports_with_tls(certificate, tmp_path, tiny_folder, adapters):
    """One real process: keys made by the command, a tenant made over the admin port, who then asks, all over TLS."""
    cert, key = certificate
    trusting, file, db = ssl.create_default_context(cafile=cert), tmp_path / "admin.yaml", tmp_path / "tenants.db"
    PolicyStore(db, create=True).adapter("a", adapters["a"], read_identity(adapters["a"]), who="test")
    ops = make_admin_key(file, "ops", True)
    options = {
        "--base": tiny_folder, "--policy": db, "--port": 0, "--device": "cpu", "--model-name": MODEL, "--admin-port": 0,
        "--admin-keys": file, "--metrics-port": 0, "--ssl-certfile": cert, "--ssl-keyfile": key,
        "--audit": tmp_path / "audit.jsonl",
    }  # fmt: skip
    parts = [str(part) for option in options.items() for part in option]
    command = [sys.executable, "-m", "unlearn_peft.cli", "serve", *parts]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd())
    timer = threading.Timer(300, process.kill)
    timer.start()
    try:
        said = {}
        while "adapters" not in said:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said[line.split(":")[0].split(" at ")[0]] = line.strip()
        url = said[f"serving {MODEL}"].split(" at ")[1].split("/v1")[0]
        admin, metrics = said["admin port"].split(": ")[1], said["metrics"].split(": ")[1]
        assert url.startswith("https://")
        headers = {"authorization": f"Bearer {ops}"}
        with httpx.Client(base_url=f"https://{admin}", verify=trusting, headers=headers, timeout=60) as ask:
            assert ask.post("/v1/tenants", json={"name": "acme"}).status_code == 201
            assert ask.put("/v1/tenants/acme/forget/a", json={}).status_code == 200
            tenant = ask.post("/v1/tenants/acme/keys", json={}).json()["key"]
        headers = {"authorization": f"Bearer {tenant}"}
        with httpx.Client(verify=trusting, headers=headers, timeout=60) as ask:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
            assert ask.post(f"{url}/v1/completions", json=body).status_code == 200
            assert ask.get(f"{url}/metrics").status_code == 404
        assert 'tenant="acme"' in httpx.get(f"http://{metrics}/metrics", timeout=60).text
        process.terminate()
        assert process.wait(90) == 0
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    events = [json.loads(line)["event"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert events == ["admin", "admin_finished"] * 3 + ["admitted", "finished"]


@pytest.mark.parametrize("more,reason", [
    (["--admin-port", "0"], "go together"), (["--admin-keys", "x"], "go together"),
    (["--ssl-keyfile", "x"], "--ssl-certfile"),
])  # fmt: skip
def test_options_that_do_nothing_alone_are_refused(more, reason, tmp_path):
    found = CliRunner().invoke(cli, ["serve", "--policy", str(tmp_path / "x.db"), *more])
    assert found.exit_code != 0 and reason in str(found.exception) + found.output
