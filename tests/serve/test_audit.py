"""The audit log's file: moved, deleted, locked, torn; who may read it. A store that may only be read serves."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from fastapi.testclient import TestClient
from serving import StubEngine

from unlearn_peft.errors import OutputError, PolicyError
from unlearn_peft.serve import audit as audit_module
from unlearn_peft.serve.api.app import create_app
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.handler import RequestHandler
from unlearn_peft.serve.policy.store import PolicyStore


def numbers(path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_a_log_without_a_disk_behind_it_is_closed_quietly_and_one_that_fails_is_told(tmp_path, caplog, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(pipe, fsync=True)
    log.write("x", n=1)
    log.close()
    assert json.loads(os.read(reader, 1000))["n"] == 1 and os.read(reader, 1000) == b"" and not caplog.records
    log = AuditLog(tmp_path / "audit.jsonl")

    def fails(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(audit_module.os, "fsync", fails)
    log.close()
    log.close()
    assert caplog.text.count("could not be flushed to the disk: Input/output error") == 1
    os.close(reader)


def test_a_file_that_was_moved_or_deleted_is_begun_anew(tmp_path, caplog):
    """As logrotate moves it: no line is lost, and none goes where nobody looks."""
    path, moved = tmp_path / "audit.jsonl", tmp_path / "moved"
    log = AuditLog(path)
    log.write("x", n=1)
    path.rename(moved)
    log.write("x", n=2)
    assert numbers(moved) == [1] and numbers(path) == [2] and caplog.text.count("moved or deleted") == 1
    path.unlink()
    log.write("x", n=3)
    log.write("x", n=4)
    assert numbers(path) == [3, 4]
    path.unlink()
    path.write_text('{"n": 0}\n')  # another file at its place
    log.write("x", n=5)
    assert numbers(path) == [0, 5]
    log.close()


def test_a_file_that_was_deleted_before_it_is_full(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=200)
    log.write("x", n=0)
    log.path.unlink()
    for n in range(1, 8):
        log.write("x", n=n, pad="p" * 40)
    files = sorted(tmp_path.iterdir(), key=lambda file: -int(file.suffix[1:]) if file.suffix != ".jsonl" else 0)
    assert [n for file in files for n in numbers(file)] == [1, 2, 3, 4, 5, 6, 7]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    log.close()


def test_on_a_signal_it_is_reopened(tmp_path, monkeypatch):
    """`reopen` may come in the middle of a line: it takes no lock and touches no file."""
    log = AuditLog(tmp_path / "audit.jsonl")
    with log._lock:
        log.reopen()
    opened, honest = [], log._open
    monkeypatch.setattr(log, "_open", lambda: opened.append(1) or honest())
    for n in (1, 2):
        log.write("x", n=n)
    assert opened == [1] and numbers(log.path) == [1, 2]
    log.close()


def test_a_server_reopens_on_sighup_and_is_not_killed(tmp_path):
    code = (
        "import os, signal, sys\nfrom unlearn_peft.cli.serve import _on_hangup\n"
        "from unlearn_peft.serve.audit import AuditLog\n"
        "_on_hangup(signal.SIG_IGN)\nos.kill(os.getpid(), signal.SIGHUP)\n"
        "log = AuditLog(sys.argv[1])\n_on_hangup(lambda *_: log.reopen())\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nassert log._reopen\nlog.write('x', n=1)\nassert not log._reopen"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "audit.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "audit.jsonl") == [1]


def second_writer(path, answers):
    try:
        AuditLog(path)
        answers.put("taken")
    except OutputError as error:
        answers.put(str(error))


def test_a_second_writer_is_locked_out(tmp_path, monkeypatch):
    """A torn line is taken back by its writer, which would cut another's lines."""
    path, context = tmp_path / "audit.jsonl", multiprocessing.get_context("spawn")
    log, answers = AuditLog(path), context.Queue()
    log.write("x", n=1)
    child = context.Process(target=second_writer, args=(path, answers))
    child.start()
    assert "another process writes it" in answers.get(timeout=60)
    child.join()
    with pytest.raises(OutputError, match="each server needs its own file"):
        AuditLog(path)
    path.rename(tmp_path / "moved")
    other = AuditLog(path)  # the place is free, and then not for the first one
    other.write("x", n=2)
    with pytest.raises(OutputError, match="another process writes it"):
        log.write("x", n=3)
    other.close()
    log.write("x", n=4)
    assert numbers(path) == [2, 4] and numbers(tmp_path / "moved") == [1]
    real = os.write
    monkeypatch.setattr(audit_module.os, "write", lambda file, line: real(file, line[:10]))
    with pytest.raises(OutputError):
        log.write("x", n=5)
    monkeypatch.undo()
    assert numbers(path) == [2, 4]
    log.close()


def test_a_pipe_that_nobody_reads_is_an_error_and_is_not_waited_for(tmp_path):
    path, before = tmp_path / "audit.jsonl", signal.signal(signal.SIGALRM, signal.default_int_handler)
    log = AuditLog(path)
    path.unlink()
    os.mkfifo(path)
    signal.alarm(10)  # which ends what waits for ever
    try:
        for again in (lambda: AuditLog(path), lambda: log.write("x")):
            with pytest.raises(OutputError, match="cannot write"):
                again()
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
            log.write("x", n=1)
            assert b'"n": 1' in reader.read(1000)
            with pytest.raises(OutputError, match="cannot write"):
                for _ in range(100):
                    log.write("x", filler="y" * 4000)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_no_text_looks_like_another_line_or_steers_a_terminal(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    text = 'so\n\r\x85\u2028{"event": "finished"}\u2029\x1b[2J\x9b2J\u202e ö 東'
    log.write("x", asked=text)
    written = (tmp_path / "audit.jsonl").read_text()
    assert len(written.splitlines()) == 1 and written.strip().isprintable() and "ö 東" in written
    assert json.loads(written)["asked"] == text


class Engine(StubEngine):
    """One that may be in trouble."""

    trouble = None

    async def problem(self):
        return self.trouble


@pytest.fixture
def ready(tmp_path):
    """A handler whose policy is in a store, and what its /readyz says."""
    with TestClient(create_app(handler := handler_of(tmp_path))) as web:

        def ask():
            answer = web.get("/readyz")
            assert (answer.status_code == 200) == (answer.json()["problem"] is None)
            assert str(tmp_path) not in answer.text
            return answer.json()["problem"]

        yield handler, ask


def handler_of(folder):
    store = PolicyStore(folder / "tenants.db", create=True, grace=0.0)
    store.add("acme", who="me")
    return RequestHandler(Engine(), store, audit=AuditLog(folder / "audit" / "audit.jsonl"))


def test_not_ready_while_the_audit_log_cannot_be_written(ready, monkeypatch):
    handler, ask = ready
    assert ask() is None
    path = handler.audit.path
    path.unlink()
    path.mkdir()
    assert ask() == "the audit log cannot be written (Is a directory)"
    path.rmdir()
    assert ask() is None and path.read_bytes() == b""
    handler.audit.write("x", n=1)
    real = os.write
    for failing in (lambda file, line: real(file, line[:10]), lambda *_: os.read(-1, 1)):
        monkeypatch.setattr(audit_module.os, "write", failing)
        with pytest.raises(OutputError):
            handler.audit.write("x", n=2)
        assert ask().startswith("the audit log cannot be written (") and ask()
        monkeypatch.undo()
        assert ask() is None and numbers(path) == [1], "without a request, and with no line of its own"
    handler.audit.required = False
    path.unlink()
    path.mkdir()
    assert ask() is None, "requests are answered without a line"


def test_not_ready_where_the_disk_is_full(ready, monkeypatch):
    _, ask = ready
    full = os.statvfs_result((4096, 4096, 1000, 0, 0, 9, 9, 9, 0, 255))
    monkeypatch.setattr(audit_module.os, "statvfs", lambda _: full)
    assert ask() == "the audit log cannot be written (No space left on device)"


def test_not_ready_while_the_store_cannot_be_reached(ready, tmp_path):
    handler, ask = ready
    assert ask() is None
    (tmp_path / "tenants.db").rename(tmp_path / "away.db")
    deadline = time.monotonic() + 20
    while ask() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ask() == "the policy store cannot be reached"
    handler.engine.trouble = "no vLLM server answers"
    assert ask() == "no vLLM server answers"
    handler.draining = True
    assert ask() == "the server is shutting down"


def as_nobody(act, answers):
    try:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        answers.put(act())
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")


def ask_as_nobody(act):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=as_nobody, args=(act, answers))
    child.start()
    answer = answers.get(timeout=60)
    child.join()
    return answer


@pytest.mark.parametrize("open_still", [True, False])
def test_whoever_may_only_read_a_store_can_serve(tmp_path, open_still):
    if os.getuid() != 0:
        pytest.skip("needs another user")
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.stat().st_uid == 0 and folder != folder.parent:
            folder.chmod(0o755)
    where = tmp_path / "tenants.db"
    store = PolicyStore(where, create=True)
    assert where.stat().st_mode & 0o777 == 0o600
    store.add("acme", who="me")
    key = store.add_key("acme", who="me")
    for file in tmp_path.glob("tenants.db*"):
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o644)
    if not open_still:
        store.close()

    def serve():
        reader = PolicyStore(where)
        return reader.current().tenant_of(key), reader.current().tenant_of("uf-other")

    assert ask_as_nobody(serve) == ("acme", None)
    assert "did not confirm the change" in ask_as_nobody(lambda: PolicyStore(where).add("x", who="nobody"))
    where.chmod(0o600)
    with pytest.raises(AssertionError):
        assert "acme" in ask_as_nobody(serve)
    store.close()


def test_a_store_that_is_closed_is_whole_in_its_one_file(tmp_path):
    """SQLite's other files stay beside it for those who may only read, but a copy of the one has everything."""
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    for n in range(20):
        store.add(f"t{n}", who="me")
    store.close()
    assert (tmp_path / "tenants.db-wal").exists()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "tenants.db").write_bytes((tmp_path / "tenants.db").read_bytes())
    assert len(PolicyStore(tmp_path / "copy" / "tenants.db").current().tenants) == 20
    with pytest.raises(PolicyError):
        PolicyStore(tmp_path / "copy")


@pytest.mark.parametrize("read", [False, True])
def test_a_store_that_is_closed_leaves_a_short_log(tmp_path, read):
    """Whoever opens it next reads all of that, for seconds after an import; not while another reads."""
    path = tmp_path / "tenants.db"
    store, log = PolicyStore(path, create=True), tmp_path / "tenants.db-wal"
    for number in range(20):
        store.add(f"t{number}", who="me")
    assert log.stat().st_size > 40_000
    server = PolicyStore(path)
    if read:  # in the middle of something
        with server._reads.connect() as connection:
            connection.exec_driver_sql("SELECT * FROM unlearn_tenants").fetchone()
            began = time.monotonic()
            store.close()
            assert time.monotonic() - began < 2, "it waits for nobody"
    else:
        store.close()
        assert log.stat().st_size == 0
    assert len(server.current().tenants) == 20
    server.close()
    assert log.exists() and len(PolicyStore(path).current().tenants) == 20


def test_messages_of_the_access_log_call_it_so(tmp_path, caplog):
    path = tmp_path / "access.jsonl"
    with closing(AuditLog(path, required=False, name="access")) as log:
        log.write("access")
        path.unlink()
        log.write("access")
        with pytest.raises(OutputError, match="cannot write the access log .* another process writes it"):
            AuditLog(path, name="access")
    assert "the access log" in caplog.text and "audit log" not in caplog.text
