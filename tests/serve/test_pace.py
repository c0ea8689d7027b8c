"""What a tenant's requests take of the processor is its own to wait for, and refusals come at a steady pace."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from serving import KEYS, make_policy_values, running, slow, wait_for

from unlearn_peft import load_base
from unlearn_peft.serve import admission, metrics
from unlearn_peft.serve import handler as handler_module
from unlearn_peft.serve.api import app, connection, listening
from unlearn_peft.serve.api.listening import address_of
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits

TEXT = {"model": "tiny", "prompt": "who wrote", "max_tokens": 2, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def serve(tiny_folder):
    @contextmanager
    def start(**settings):
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny", max_batch=4)
        with running(engine, make_policy_values({}, {"alice": [], "bob": []}), **settings) as (handler, url):
            yield handler, url

    return start


def post(url, tenant="alice", key=None, timeout=60, **fields):
    headers = {"Authorization": f"Bearer {key or KEYS[tenant]}"}
    return httpx.post(f"{url}/v1/completions", json={**TEXT, **fields}, headers=headers, timeout=timeout)


def seconds(do):
    began = time.monotonic()
    do()
    return time.monotonic() - began


def busy(took):
    """Use a thread's processor for so long."""
    end = time.thread_time() + took
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("part", ["body", "prompt"])
def test_who_has_much_to_be_read_waits_where_others_are_there(serve, monkeypatch, part):
    monkeypatch.setattr(handler_module, "_WAIT", 1000)  # times 0.1 s: longer than any machine takes for the rest
    monkeypatch.setattr(admission, "_RECENT", 1000)
    with serve() as (handler, url):
        work = app.read_request if part == "body" else handler.engine._prompts

        def slowly(*arguments, **settings):
            found = work(*arguments, **settings)
            if "long" in str(arguments):
                busy(0.1)
            return found

        monkeypatch.setattr(*((app, "read_request") if part == "body" else (handler.engine, "_prompts")), slowly)
        for _ in range(2):
            assert post(url, prompt="long").status_code == 200, "alone: nothing to wait for"
        for _ in range(2):
            assert post(url, "bob").status_code == 200, "who was charged least waits for nobody"
        with pytest.raises(httpx.ReadTimeout):
            post(url, timeout=5)
        assert post(url, "bob").status_code == 200


@pytest.mark.parametrize("gone", [False, True])
def test_a_pass_over_a_prompt_is_charged_to_its_tenant(serve, gone):
    """Whether or not its client is still there: whoever goes away would else pay for nothing."""
    with serve() as (handler, url):
        prefill, charged = handler.engine.scheduler._runner.prefill, []
        charge = handler._leases.charge
        handler._leases.charge = lambda *what: charged.append(what) or charge(*what)

        def slower(*arguments):
            time.sleep(0.5)
            return prefill(*arguments)

        handler.engine.scheduler._runner.prefill = slower
        if gone:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=TEXT, timeout=0.3,
                           headers={"Authorization": f"Bearer {KEYS['alice']}"})  # fmt: skip
        else:
            assert post(url, prompt=["one", "two"]).status_code == 200
        wait_for(lambda: len(charged) == (1 if gone else 2) and handler.active == 0)
        assert {tenant for tenant, _ in charged} == {"alice"}
        assert 2 <= sum(took for _, took in charged) < 5, "four times what the pass took, or both passes"


def test_rows_that_wait_for_others_hold_no_lease(serve, monkeypatch):
    monkeypatch.setattr(admission, "_RECENT", 1000)
    with serve() as (handler, url), ThreadPoolExecutor(16) as pool:
        slow(handler, 0.05)
        assert post(url, "bob").status_code == 200
        handler._leases.charge("alice", 1000)
        jobs = [pool.submit(post, url) for _ in range(12)]
        wait_for(lambda: handler.active == 12)
        others = [pool.submit(post, url, "bob") for _ in range(3)]
        assert {job.result().status_code for job in others} == {200}
        assert not any(job.done() for job in jobs) and not handler._leases._taken["alice"]
        handler._leases._charged.clear()
        assert {job.result().status_code for job in jobs} == {200}


# ---- refusals ----


@pytest.fixture
def slow_pace(monkeypatch):
    """Three free answers at once, and the next after 50 s: longer than any machine takes for one; yields the queue."""
    made = []
    monkeypatch.setattr(connection, "_PACE", 100)
    monkeypatch.setattr(connection, "_BURST", 250)
    monkeypatch.setattr(app, "free_answers", lambda: made.append(connection.free_answers()) or made[-1])
    return made


@pytest.mark.parametrize("refused", ["wrong", "unknown key", "no page", "/v1/models", "/metrics"])
def test_free_answers_come_at_a_steady_pace(serve, slow_pace, refused):
    with serve() as (_, url):
        head = {"Authorization": f"Bearer {KEYS['alice']}"}

        def ask(timeout=45):
            if refused == "wrong":
                assert post(url, n=10**9, timeout=timeout).status_code == 400
            elif refused == "unknown key":
                assert post(url, key="uf-nobody", timeout=timeout).status_code == 401
            else:
                path, status = ("/nothing", 404) if refused == "no page" else (refused, 200)
                assert httpx.get(url + path, headers=head, timeout=timeout).status_code == status

        for _ in range(3):
            ask()
        with pytest.raises(httpx.ReadTimeout):
            ask(timeout=2)
        assert httpx.get(f"{url}/healthz", timeout=45).status_code == 200
        assert post(url, timeout=45).status_code == 200, "what is paid for does not wait"
        assert post(url, "bob", n=10**9, timeout=45).status_code == 400, "nor another tenant's refusal"


def test_a_refusal_that_nobody_waits_for_is_dropped(serve, slow_pace):
    with serve() as (handler, url):
        port = int(url.rsplit(":", 1)[1])
        for _ in range(3):
            post(url, n=10**9)
        body = b"x" * 500_000  # of a body that is not read, too
        for sent in (b"GET /v1/models HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500000\r\n"):
            head = sent + f"Host: x\r\nAuthorization: Bearer {KEYS['alice']}\r\n\r\n".encode()
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
            for each in clients:
                each.sendall(head + (body if b"Length" in head else b""))
            wait_for(lambda: len(slow_pace[0]._waiting.get("alice", ())) == 5)
            assert handler.active == 0, "it holds no place"
            for each in clients:
                each.close()
            wait_for(lambda: not slow_pace[0]._waiting)


def test_health_has_a_pace_of_its_own(serve):
    with serve() as (_, url), httpx.Client() as client:
        ask = lambda: client.get(f"{url}/healthz", timeout=60).raise_for_status()  # noqa: E731
        assert seconds(lambda: [ask() for _ in range(400)]) > 0.9


# ---- connections ----


def opened(port, count, source, most):
    """Open so many connections; returns how many stay open, once they are `most`."""
    made = [socket.create_connection(("127.0.0.1", port), 20, (source, 0)) for _ in range(count)]

    def stays(each):
        each.setblocking(False)
        try:
            return bool(each.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    wait_for(lambda: sum(map(stays, made)) <= most)
    left = sum(map(stays, made))
    for each in made:
        each.close()
    return left


def test_who_opens_connections_too_fast_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(listening, "OPENING_SECONDS", 100)
    with serve(limits=Limits(per_address=10)) as (_, url):
        port = int(url.rsplit(":", 1)[1])
        assert opened(port, 8, "127.0.0.2", 8) == 8
        assert opened(port, 40, "127.0.0.2", 14) > 0, "twice as many as the share, and what came since"
        assert opened(port, 8, "127.0.0.3", 8) == 8 and httpx.get(f"{url}/healthz", timeout=45).status_code == 200


def test_the_event_loop_takes_a_connection_and_goes_on():
    with listening.listen("127.0.0.1", 0) as made:
        made.setblocking(False)
        clients = [socket.create_connection(made.getsockname()) for _ in range(3)]
        for _ in clients:
            made.accept()[0].close()
            with pytest.raises(BlockingIOError):
                made.accept()
        with pytest.raises(BlockingIOError):  # there is none
            made.accept()
        for client in clients:
            client.close()


def test_an_address_of_ipv6_is_a_network():
    assert address_of(("10.0.0.1", 5)) == "10.0.0.1" and address_of(None) == ""
    one, same, other = (
        address_of((host, 5, 0, 0)) for host in ("2001:db8::1", "2001:db8:0:0:5::9%eth0", "2001:db8:0:1::1")
    )
    assert one == same != other


def test_metrics_are_made_beside_the_event_loop_and_for_all_who_ask_at_once(serve, monkeypatch):
    made = list[str]()

    def slowly(registry):
        made.append(threading.current_thread().name)
        busy(0.3)
        return b"found"

    monkeypatch.setattr(metrics, "generate_latest", slowly)
    with serve() as (_, url), ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(httpx.get, f"{url}/metrics", timeout=60) for _ in range(8)]
        assert {text.result().text for text in texts} == {"found"}
        assert len(made) == 1, "the next one waits for four times as long as that took"
        assert "AnyIO" in made[0], "not the event loop's"
