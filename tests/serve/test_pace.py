"""What a tenant's requests take of the processor is its own to wait for, and refusals come at a steady pace."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from serving import KEYS, make_policy_values, running, slow

from unlearn_peft import load_base
from unlearn_peft.serve.api import app
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


def post(url, tenant="alice", key=None, client=httpx, **fields):
    headers = {"Authorization": f"Bearer {key or KEYS[tenant]}"}
    return client.post(f"{url}/v1/completions", json={**TEXT, **fields}, headers=headers, timeout=60)


def seconds(do):
    began = time.monotonic()
    do()
    return time.monotonic() - began


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def busy(took):
    """Use a thread's processor for so long."""
    end = time.thread_time() + took
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("part", ["body", "prompt"])
def test_who_has_much_to_be_read_waits_where_others_are_there(serve, monkeypatch, part):
    with serve() as (handler, url):
        work = app.read_request if part == "body" else handler.engine._prompts

        def slowly(*arguments, **settings):
            found = work(*arguments, **settings)
            if "long" in str(arguments):
                busy(0.1)
            return found

        monkeypatch.setattr(*((app, "read_request") if part == "body" else (handler.engine, "_prompts")), slowly)
        post(url)
        with ThreadPoolExecutor(4) as pool:

            def four(tenant):
                jobs = [pool.submit(post, url, tenant, prompt="long") for _ in range(4)]
                assert {job.result().status_code for job in jobs} == {200}

            assert seconds(lambda: four("alice")) < 1.2, "alone: only what reading takes"
            post(url, "bob")
            took = seconds(lambda: four("alice"))
            assert took > 1.4, "a fifth of a processor"
            assert seconds(lambda: post(url, "bob")) < 0.5


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
        until(lambda: len(charged) == (1 if gone else 2) and handler.active == 0)
        assert {tenant for tenant, _ in charged} == {"alice"}
        assert 2 <= sum(took for _, took in charged) < 5, "four times what the pass took, or both passes"


def test_rows_that_wait_for_others_hold_no_lease(serve):
    with serve() as (handler, url), ThreadPoolExecutor(16) as pool:
        slow(handler, 0.05)
        assert post(url, "bob").status_code == 200
        handler._leases.charge("alice", 4)
        jobs = [pool.submit(post, url) for _ in range(12)]
        until(lambda: handler.active == 12)
        others = [pool.submit(post, url, "bob") for _ in range(3)]
        assert {job.result().status_code for job in others} == {200}
        assert not any(job.done() for job in jobs) and not handler._leases._taken["alice"]
        assert {job.result().status_code for job in jobs} == {200}


# ---- refusals ----


@pytest.mark.parametrize("refused", ["wrong", "unknown key", "no page", "/v1/models", "/metrics"])
def test_free_answers_come_at_a_steady_pace(serve, refused):
    with serve() as (_, url), httpx.Client() as client:
        head = {"Authorization": f"Bearer {KEYS['alice']}"}

        def ask():
            if refused == "wrong":
                assert post(url, n=10**9, client=client).status_code == 400
            elif refused == "unknown key":
                assert post(url, key="uf-nobody", client=client).status_code == 401
            else:
                found = client.get(url + ("/nothing" if refused == "no page" else refused), headers=head)
                assert found.status_code == (404 if refused == "no page" else 200)

        assert seconds(lambda: [ask() for _ in range(5)]) < 1, "a few do not wait"
        assert seconds(lambda: [ask() for _ in range(35)]) > 0.9
        assert seconds(lambda: httpx.get(f"{url}/healthz").raise_for_status()) < 0.5
        assert post(url, client=client).status_code == 200, "what is paid for does not wait"
        assert seconds(lambda: post(url, "bob", n=10**9)) < 0.5, "nor another tenant's refusal"


def test_a_refusal_that_nobody_waits_for_is_dropped(serve):
    with serve() as (_, url), httpx.Client() as client:
        queue = []
        port = int(url.rsplit(":", 1)[1])
        for _ in range(30):
            post(url, n=10**9, client=client)
        sent = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['alice']}\r\n\r\n".encode()
        for _ in range(40):
            queue.append(socket.create_connection(("127.0.0.1", port)))
            queue[-1].sendall(sent)
        time.sleep(0.3)
        for each in queue:
            each.close()
        time.sleep(0.3)
        assert seconds(lambda: post(url, n=10**9)) < 1, "the others would have taken two"


def test_health_has_a_pace_of_its_own(serve):
    with serve() as (_, url), httpx.Client() as client:
        ask = lambda: client.get(f"{url}/healthz").raise_for_status()  # noqa: E731
        assert seconds(lambda: [client.get(f"{url}/nothing") for _ in range(35)]) > 0.5
        assert seconds(ask) < 0.5, "whatever else its address asks for"
        assert seconds(lambda: [ask() for _ in range(400)]) > 0.9


# ---- connections ----


def opened(port, count, source):
    """Open so many connections; returns how many are still open a moment later."""
    made = []
    for _ in range(count):
        made.append(socket.create_connection(("127.0.0.1", port), 5, (source, 0)))
        made[-1].setblocking(False)
    time.sleep(0.3)
    left = 0
    for each in made:
        try:
            left += bool(each.recv(1))
        except BlockingIOError:
            left += 1
        except OSError:
            pass
        each.close()
    return left


def test_who_opens_connections_too_fast_is_cut_off(serve):
    with serve(limits=Limits(per_address=10)) as (_, url):
        port = int(url.rsplit(":", 1)[1])
        assert opened(port, 8, "127.0.0.2") == 8 and opened(port, 40, "127.0.0.2") <= 14
        assert opened(port, 8, "127.0.0.3") == 8 and httpx.get(f"{url}/healthz").status_code == 200
        time.sleep(2)
        assert 1 <= opened(port, 10, "127.0.0.2") <= 7, "two a second"


def test_an_address_of_ipv6_is_a_network():
    assert address_of(("10.0.0.1", 5)) == "10.0.0.1" and address_of(None) == ""
    one, same, other = (
        address_of((host, 5, 0, 0)) for host in ("2001:db8::1", "2001:db8:0:0:5::9%eth0", "2001:db8:0:1::1")
    )
    assert one == same != other
