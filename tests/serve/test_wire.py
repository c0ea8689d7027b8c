"""What a client may send over a connection: whatever costs the event loop long, or memory, is cut off."""

import logging
import socket
import time
from contextlib import suppress

import h11
import pytest
from serving import KEYS, StubEngine, make_policy_values, running

from unlearn_peft.serve.api import connection, listening
from unlearn_peft.serve.api.loading import answering
from unlearn_peft.serve.limits import Limits


@pytest.fixture(scope="module")
def url():
    with running(StubEngine(), make_policy_values({}, {"alice": []})) as (_, url):
        yield url


def send(url, *parts, until=b""):
    """Send parts, and return what came back when it holds `until`, or to the end of the connection."""
    got = b""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
        client.settimeout(20)
        with suppress(ConnectionResetError, BrokenPipeError):
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)
            while (part := client.recv(65536)) and not (got := got + part).endswith(until or b"\0"):
                pass
    return got


def head(lines=0, size=0, more=""):
    fill = "".join(f"a{n}: {'b' * (size // max(lines, 1))}\r\n" for n in range(lines))
    return f"GET /healthz HTTP/1.1\r\nHost: x\r\n{fill}{more}\r\n".encode()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head(90), b"200"), (head(4, 15_000), b"200"), (head(150), b"431"), (head(4, 20_000), b"431"),
        (head(1000) + b"x" * 10**5, b"431"),
    ],
)  # fmt: skip
def test_heads_of_many_lines_or_bytes_are_refused_unread(url, sent, status, monkeypatch):
    read, receive = [], h11.Connection.receive_data
    monkeypatch.setattr(h11.Connection, "receive_data", lambda self, data: (read.append(data), receive(self, data)))
    got = send(url, sent, until=b'"}')
    assert got.startswith(b"HTTP/1.1 " + status) and bool(read) == (status == b"200")
    read.clear()
    slices = [sent[at : at + 1000] for at in range(0, min(len(sent), 20_000), 1000)]
    got = send(url, *slices, until=b'"}')  # or a reset, where more was on its way
    assert got.startswith(b"HTTP/1.1 200") == (status == b"200") and len(b"".join(read)) < 17_000


def test_a_body_in_parts_of_a_byte_is_refused(url, monkeypatch):
    parts, following = [], h11.Connection.next_event

    def next_event(self):
        if isinstance(event := following(self), h11.Data):
            parts.append(event)
        return event

    monkeypatch.setattr(h11.Connection, "next_event", next_event)
    start = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    start = f"{start}Authorization: Bearer {KEYS['alice']}\r\n\r\n".encode()
    assert send(url, start, b"1\r\na\r\n" * 40_000).startswith(b"HTTP/1.1 400")
    assert len(parts) < 300
    whole = b"10000\r\n" + b" " * 65536 + b"\r\n"
    got = send(url, start, b"1\r\n{\r\n" * 100, whole * 4, b"0\r\n\r\n", until=b"}}")
    assert b"the body is not JSON" in got, "a few small ones, and large ones, are read"


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_requests_that_come_before_an_answer_are_not_kept(url, monkeypatch, more):
    monkeypatch.setattr(connection, "_HEALTH_PACE", 0.2)
    held = 0
    made = connection.Connection.data_received

    def received(self, data):
        nonlocal held
        made(self, data)
        held = max(held, len(self.conn.trailing_data[0]))

    monkeypatch.setattr(connection.Connection, "data_received", received)
    both = send(url, head() + head(more="Connection: close\r\n"))
    assert both.count(b"HTTP/1.1 200") == 2, "a few are answered in their order"
    began = time.monotonic()
    send(url, *[head(more=more) * 1000] * 40)
    assert time.monotonic() - began < 15 and held < 300_000


def test_what_is_no_http_leaves_neither_tracebacks_nor_lines(url, caplog, capfd):
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
                client.settimeout(20)
                client.sendall(start)
                assert client.recv(65536).startswith(b"HTTP/1.1 401")
                client.sendall(b"zz\r\n")  # no chunk of a body, when there is an answer
                with suppress(ConnectionResetError):
                    while client.recv(65536):
                        pass
            assert send(url, b"what?\r\n\r\n").startswith(b"HTTP/1.1 400")
            assert send(url, head(more="Connection: upgrade\r\nUpgrade: websocket\r\n"), until=b'"}').endswith(b'"ok"}')
    said = [record.getMessage() for record in caplog.records] + capfd.readouterr().err.splitlines()
    assert [line for line in said if line and not line.startswith("refused a request without a key")] == []


def test_connections_that_begin_nothing_are_counted_before_a_tls_handshake(monkeypatch):
    monkeypatch.setattr(listening, "OPENING_SECONDS", 0.0)  # however slowly they are opened
    port = listening.listen("127.0.0.1", 0)
    port.limits = Limits(connections=100, per_address=2)
    port.setblocking(False)
    clients = [socket.create_connection(port.getsockname()) for _ in range(10)]
    taken = list[socket.socket]()

    def take():
        for _ in range(10):
            with suppress(BlockingIOError):
                taken.append(port.accept()[0])

    take()
    assert len(taken) == 4, "twice its share, so that one too many can be told so"
    assert clients[-1].recv(1) == b"", "the others are closed"
    taken.pop().close()
    clients.append(socket.create_connection(port.getsockname()))
    take()
    assert len(taken) == 4
    for each in (*clients, *taken, port):
        each.close()


def test_one_address_leaves_threads_to_others_while_the_model_loads():
    port = listening.listen("127.0.0.1", 0)
    with port, answering(port):
        slow = [socket.create_connection(port.getsockname(), source_address=("127.0.0.2", 0)) for _ in range(40)]
        for one in slow:
            with suppress(OSError):
                one.sendall(b"GET /heal")
        time.sleep(0.5)
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        assert send(url, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")
        for one in slow:
            one.close()
