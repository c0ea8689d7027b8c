"""Clients that do not read, do not end what they send, or come in floods: nobody else waits for them."""

import json
import logging
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest
from serving import KEYS, make_adapters, make_policy_values, running, slow, wait_for
from uvicorn.protocols.http.h11_impl import H11Protocol

from unlearn_peft import load_base
from unlearn_peft.serve import admission
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits

MODEL = "tiny"
TEXT = {"model": MODEL, "prompt": "who wrote", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
LONG = {**TEXT, "max_tokens": 60, "n": 4, "logprobs": 20, "stream": True}  # some 250 kB of events


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder, seeds=(1,))


@pytest.fixture
def serve(tiny_folder, adapters, monkeypatch):
    """Start a server whose sockets hold little, so that what nobody reads is noticed at once."""
    made, transports = H11Protocol.connection_made, []

    def narrow(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=2048)
        transports.append(transport)
        made(self, transport)

    monkeypatch.setattr(H11Protocol, "connection_made", narrow)

    @contextmanager
    def start(**limits):
        limits = Limits(**{"batch": 4, **limits})
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL, max_batch=limits.batch)
        policy = make_policy_values(adapters, {"alice": ["a"], "bob": ["a"], "carol": []})
        with running(engine, policy, limits=limits) as (handler, url):
            handler.transports = transports
            yield handler, url

    return start


def connect(url, data=b"", source=None):
    port = int(url.rsplit(":", 1)[1])
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    if source:
        made.bind((source, 0))
    made.settimeout(20)
    made.connect(("127.0.0.1", port))
    made.sendall(data)
    return made


def head(length, tenant="alice", path="completions"):
    lines = [f"POST /v1/{path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS.get(tenant, tenant)}"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def unread(url, tenant="alice", **fields):
    """A client that asks for a stream and never reads it."""
    body = json.dumps({**LONG, **fields}).encode()
    return connect(url, head(len(body), tenant) + body)


def post(url, tenant="bob", **fields):
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    return httpx.post(f"{url}/v1/completions", json={**TEXT, **fields}, headers=headers, timeout=60)


def until_closed(client):
    """Read to the end; returns what came, and after how many seconds."""
    got, began = b"", time.monotonic()
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            got += part
    return got, time.monotonic() - began


def refused(url, status):
    return f'requests_total{{status="{status}",tenant="alice"}}' in httpx.get(f"{url}/metrics").text


# ---- who does not read ----


def test_streams_that_nobody_reads_hold_no_row_no_set_and_no_place(serve):
    with serve() as (handler, url):
        clients = [unread(url) for _ in range(4)]
        wait_for(lambda: handler.active > 0)
        wait_for(lambda: handler.active == 0)
        stats = handler.engine.stats()
        assert stats.running == stats.waiting == 0 and stats.resident == 1
        assert not refused(url, 200), "they are not wholly sent"
        began = time.monotonic()
        assert post(url).status_code == 200 and time.monotonic() - began < 10
        got = b""
        while b"[DONE]" not in got[-200:]:
            got += clients[0].recv(65536)
        assert got.count(b'"finish_reason": "length"') == 4, "who reads late gets all"
        for client in clients:
            client.close()
        wait_for(lambda: refused(url, 499))


def test_the_share_of_who_does_not_read_is_used_up(serve):
    with serve(per_tenant=8) as (handler, url):
        clients = [unread(url) for _ in range(2)]
        wait_for(lambda: handler.active == 8)
        wait_for(lambda: handler.active == 0)
        assert post(url, "alice").status_code == 429 and post(url, "bob").status_code == 200
        for client in clients:
            client.close()
        wait_for(lambda: post(url, "alice").status_code == 200)


@pytest.mark.parametrize("limits", [{"seconds": 6}, {"stall_seconds": 3}], ids=["in all", "without progress"])
def test_a_stream_that_nobody_reads_is_cut_off(serve, limits):
    with serve(**limits) as (handler, url):
        client = unread(url)
        wait_for(lambda: refused(url, 499) or refused(url, 504))  # the latter on a machine that is slow, too
        got, _ = until_closed(client)
        assert b"200 OK" in got and b"[DONE]" not in got
        assert post(url, "alice").status_code == 200


def test_sigterm_does_not_wait_for_who_does_not_read(serve, caplog):
    log = logging.getLogger("uvicorn.error")
    with serve(drain_seconds=20) as (handler, url):
        log.addHandler(caplog.handler)
        try:
            clients = [unread(url, n=2) for _ in range(2)]
            wait_for(lambda: handler.active > 0)
            wait_for(lambda: handler.active == 0)
            began = time.monotonic()
        except BaseException:
            log.removeHandler(caplog.handler)
            raise
    log.removeHandler(caplog.handler)
    assert time.monotonic() - began < 10
    assert not any(record.exc_info for record in caplog.records), "no traceback"
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)
    for client in clients:
        client.close()


# ---- who does not end what it sends ----


def test_a_head_that_does_not_come_is_not_waited_for(serve):
    with serve(header_seconds=1) as (_, url):
        silent, slow_one, kept = connect(url), connect(url, b"GET /heal"), connect(url)
        began = time.monotonic()
        for _ in range(4):
            with suppress(OSError):
                slow_one.sendall(b"x")
            time.sleep(0.2)
        for client in (silent, slow_one):
            assert until_closed(client)[0] == b"" and time.monotonic() - began < 5
        kept = httpx.Client()
        for _ in range(2):
            assert kept.get(f"{url}/healthz").status_code == 200
            time.sleep(1.5)  # a connection may rest between two requests
        half = connect(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert half.recv(4096).startswith(b"HTTP/1.1 200")
        half.sendall(b"GET /heal")  # and the next head has its own time
        assert until_closed(half)[1] < 5


def test_a_slow_body_is_under_way_and_has_its_time(serve):
    with serve(body_seconds=2, per_tenant=1) as (handler, url):
        client = connect(url, head(500) + b"{")
        wait_for(lambda: handler.active == 1)
        assert post(url, "alice").status_code == 429 and post(url, "bob").status_code == 200
        got, _ = until_closed(client)
        assert got.startswith(b"HTTP/1.1 408") and b"1 bytes of it did" in got
        assert handler.active == 0 and post(url, "alice").status_code == 200


def test_a_body_without_a_key_has_its_time_too(serve):
    with serve(body_seconds=0.5) as (_, url):
        client, began = connect(url, head(500, "nobody")), time.monotonic()
        assert client.recv(4096).startswith(b"HTTP/1.1 401")
        with suppress(OSError):
            while time.monotonic() - began < 10:
                client.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - began < 8, "it was cut off"


# ---- who comes in floods ----


def test_connections_are_counted_in_all_and_by_address(serve):
    with serve(connections=4, per_address=2) as (_, url):
        ours = [connect(url) for _ in range(2)]
        assert until_closed(connect(url))[0].startswith(b"HTTP/1.1 503")
        others = [connect(url, source=f"127.0.0.{n}") for n in (2, 3)]
        time.sleep(0.2)
        assert until_closed(connect(url, source="127.0.0.4"))[0].startswith(b"HTTP/1.1 503")
        for client in (*ours, *others):
            client.close()
        time.sleep(0.2)
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_the_share_of_one_tenant_leaves_room_for_others(serve):
    with serve(batch=2, queue=8) as (handler, url), ThreadPoolExecutor(12) as pool:
        slow(handler, 0.05)
        jobs = [pool.submit(post, url, "alice", max_tokens=20) for _ in range(12)]
        wait_for(lambda: handler.active == 5)
        assert post(url, "bob").status_code == 200
        assert sorted({job.result().status_code for job in jobs}) == [200, 429]


@pytest.mark.parametrize("answers", [1, 3])
def test_a_flood_delays_another_tenant_by_one_batch_at_most(serve, answers):
    with serve(batch=2, queue=100) as (handler, url), ThreadPoolExecutor(32) as pool:
        slow(handler, 0.02, gate := threading.Event())
        jobs = [pool.submit(post, url, "alice", max_tokens=12, n=answers) for _ in range(18 // answers)]
        wait_for(lambda: handler.active == 18 and handler.engine.stats().running == 1)
        gate.set()
        assert post(url, "bob", max_tokens=12).status_code == 200
        done = sum(job.done() and job.result().status_code == 200 for job in jobs) * answers
        assert done <= 2 + 2 + 2 + answers, "those that ran, those next to them, those that ran beside it"
        assert all(job.result().status_code == 200 for job in jobs)


@pytest.mark.parametrize("tenants", [["alice"], ["alice", "carol"]], ids=["of one tenant", "of two"])
def test_long_answers_leave_a_row_to_others(serve, tenants):
    steps = threading.Semaphore(0)
    with serve(batch=4) as (handler, url), ThreadPoolExecutor(16) as pool:
        slow(handler, 0, SimpleNamespace(wait=lambda seconds: steps.acquire(timeout=seconds)))
        scheduler = handler.engine.scheduler
        jobs = [pool.submit(post, url, tenant, max_tokens=100) for tenant in tenants]
        wait_for(lambda: scheduler.running + scheduler.waiting == len(tenants))
        jobs += [pool.submit(post, url, tenant, max_tokens=100) for tenant in tenants for _ in range(5)]
        wait_for(lambda: handler.active > 4 and scheduler.running + scheduler.waiting == 3)
        other = pool.submit(post, url, "bob", max_tokens=4)
        try:
            wait_for(lambda: scheduler.running + scheduler.waiting == 4)
            steps.release(50)
            assert other.result().status_code == 200
            assert not any(job.done() and job.result().status_code == 200 for job in jobs)
        finally:
            steps.release(10_000)


@pytest.mark.parametrize(("within", "of_each"), [(6.0, 2), (None, 2), (math.inf, 5)])
def test_rows_that_slow_each_other_are_shared_evenly(serve, monkeypatch, within, of_each):
    monkeypatch.setattr(admission, "_RECENT", 600)  # however slow the machine is
    with serve(batch=8) as (handler, url), ThreadPoolExecutor(12) as pool:
        slow(handler, 0.02)
        handler.engine.scheduler.step_times.rows_within = lambda times: {2.0: within}[times]
        assert post(url, "bob", max_tokens=1).status_code == 200
        jobs = [pool.submit(post, url, "alice", max_tokens=30) for _ in range(8)]
        most = 0
        while not all(job.done() for job in jobs[:2]):
            most = max(most, handler.engine.stats().running)
            time.sleep(0.005)
        assert most == of_each if of_each == 2 else most >= of_each
        assert all(job.result().status_code in (200, 429) for job in jobs)


# ---- the wire ----


def test_two_lengths_of_one_body_are_refused(serve):
    with serve() as (_, url):
        more = b"Transfer-Encoding: chunked\r\n\r\n"
        hidden = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        client = connect(url, head(5)[:-2] + more + hidden)
        got, seconds = until_closed(client)
        assert got.startswith(b"HTTP/1.1 400") and got.count(b"HTTP/1.1") == 1 and seconds < 5


def test_small_answers_do_not_wait_for_others(serve):
    with serve() as (handler, url):
        assert httpx.get(f"{url}/healthz").status_code == 200
        with httpx.Client() as kept:
            kept.get(f"{url}/healthz")
            made = handler.transports[-1].get_extra_info("socket")
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_port_answers_while_the_model_loads(monkeypatch, capsys, adapters):
    from unlearn_peft import cli
    from unlearn_peft.cli import options
    from unlearn_peft.errors import UnlearnError

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, found = f"http://127.0.0.1:{port}", {}

    def load(*_):
        for path in ("healthz", "readyz", "v1/models"):
            found[path] = httpx.get(f"{url}/{path}", timeout=5)
        found["post"] = httpx.post(f"{url}/v1/completions", json=TEXT, timeout=5)
        with connect(url):  # says nothing, and holds up nobody
            found["again"] = httpx.get(f"{url}/healthz", timeout=5)
        raise UnlearnError("no model today")

    monkeypatch.setattr(options, "load", load)
    arguments = ["unlearn-peft", "serve", "--adapter", str(adapters["a"]), "--port", str(port)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    assert "no model today" in capsys.readouterr().err
    assert found["healthz"].json() == found["again"].json() == {"status": "ok"}
    for path in ("readyz", "v1/models", "post"):
        assert found[path].status_code == 503 and int(found[path].headers["retry-after"]) > 0
    assert found["post"].json()["error"]["code"] == "loading" and "loading" in found["readyz"].json()["problem"]
    assert not any("serve_forever" in repr(thread) for thread in threading.enumerate())
