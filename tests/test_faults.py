"""Faults put in on purpose: nothing is lost, nothing half done is taken for whole. docs/faults.md is made from FAULTS.

`python tests/test_faults.py` writes the table; `pytest -m slow tests/test_faults.py` does all the kills.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from killing import Killer

DOCS = Path(__file__).parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- made by tests/test_faults.py -->", "<!-- /made -->"
KILLS = {"train": 60, "save": 40, "stack": 35, "export": 30, "store": 40, "yaml": 35, "pull": 45}  # by `make test-slow`
SOME = {"train": 4, "save": 5, "stack": 7, "export": 6, "store": 8, "yaml": 10, "pull": 6}  # by `make test`
F, S, G = "test_faults", "serve/test_store", "serve/test_scheduler"
E, C = "training/test_runner", "serve/test_serve_safety"
# ruff: noqa: E501  (the table)
FAULTS = [  # fault, what is checked, file and test
    ("kill -9 while training", "the old adapter or the new one is there whole; `--resume` gives the same bits; no checkpoint is damaged; no temporary is left", F, "test_kills_while_training"),
    ("kill -9 while saving an adapter", "the old bits or the new bits, with a manifest that fits; the next save clears up", F, "test_kills_while_writing_an_adapter"),
    ("kill -9 while stacking", "the same", F, "test_kills_while_writing_an_adapter"),
    ("kill -9 while exporting for vLLM", "the same", F, "test_kills_while_writing_an_adapter"),
    ("kill -9 while the policy store changes", "each confirmed change is there, at most one more; tables and history agree; SQLite's own check passes; the next change works", F, "test_kills_while_a_policy_changes"),
    ("kill -9 while a policy file is replaced", "the old or the new file, whole; a server that reads it goes on", F, "test_kills_while_a_policy_file_is_replaced"),
    ("kill -9 while pulling, from the Hub (a stand-in), a mirror and an archive", "the old bits or the new bits, or nothing where nothing was; `NAME.source.json` never tells of another adapter; the next pull gives the right bits and clears up, in the cache too", F, "test_kills_while_pulling"),
    ("kill -9 of four writers of one store at once", "as above, SQLite and PostgreSQL", S, "test_a_writer_that_is_killed_leaves_the_store_whole"),
    ("kill -9 while a checkpoint is deleted", "a finished run leaves no damaged checkpoint that a later `--resume` trips over", F, "test_a_checkpoint_is_never_seen_half_deleted"),
    ("a file system that cannot swap two folders", "a crash between the two renames leaves the old adapter beside; the next writer puts it back", F, "test_a_folder_that_was_moved_aside_comes_back"),
    ("disk full at any write (a file size limit of the system's)", "an error that says so; the old adapter's bits, no temporary", F, "test_a_full_disk_anywhere"),
    ("disk full (a small tmpfs)", "the same, for training, its checkpoints and its cache", F, "test_a_full_file_system"),
    ("disk full while the cache is written", "an error that says so, no file", E, "test_a_full_disk_is_told_and_leaves_nothing_half_written"),
    ("disk full or torn line in the audit log", "the request is refused; no line is torn, and one that is does not swallow the next", F, "test_the_audit_log_on_a_full_disk_and_after_a_torn_line"),
    ("a read-only folder", "an error that says so, nothing written, as a user who is not root", F, "test_a_folder_that_may_not_be_written"),
    ("two writers of one adapter", "always one of the two, whole, at every moment; no error, no temporary", F, "test_two_writers_of_one_adapter"),
    ("two training runs with one output", "the second is refused; a lock that a killed run left hinders nobody", F, "test_two_runs_with_one_output"),
    ("two first runs that make the secret of the digests", "both use one", F, "test_two_first_runs_use_one_secret"),
    ("two and more writers of one store", "no change is lost", S, "test_writers_of_many_processes"),
    ("the clock jumps by a day, back and forth", "the store's grace, the policy file, the audit log and the adapters' memory go on as if it had not", F, "test_clock_jumps"),
    ("the base's file is cut short, overwritten or deleted while serving", "the model in memory answers as before (without the mending: SIGBUS)", F, "test_a_base_that_changes_on_disk"),
    ("an adapter's file is cut short or overwritten while serving", "the adapter in memory is as before", F, "test_an_adapter_that_changes_on_disk"),
    ("out of memory in a forward pass", "the rows of that pass are refused, the others and later ones answered, the worker lives, no adapter stays pinned", F, "test_out_of_memory_in_the_middle_of_a_batch"),
    ("out of memory while an adapter is read", "the request is refused (503), no adapter stays pinned, the next one works", F, "test_out_of_memory_while_an_adapter_is_read"),
]  # fmt: skip
FREE = {"forget_ceiling": 15, "stop_when": None}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base_folder, tmp_path_factory):
    from serving import make_adapters

    return make_adapters(tmp_path_factory.mktemp("adapters"), base_folder, seeds=(1, 2))


@pytest.fixture(scope="module")
def killer(base_folder, adapters):
    killer = Killer(base_folder, adapters.values())
    yield killer
    killer.close()


@pytest.fixture(
    params=[
        pytest.param(SOME, id="some", marks=pytest.mark.long),
        pytest.param(KILLS, id="all", marks=pytest.mark.slow),
    ]
)
def kills(request):
    return request.param


def bits(folder):
    """An adapter's effect, to the last bit; it must be whole."""
    from unlearn_peft import read_bundle

    bundle = read_bundle(folder)
    for name, digest in bundle.manifest.get("files", {}).items():
        from unlearn_peft.files.untrusted import sha256_of as sha256

        assert sha256(folder / name) == digest, name
    return bundle.identity


def left_in(folder, *names):
    return sorted(path.name for path in folder.iterdir() if path.name not in names)


def points(killer, chance, job, *arguments):
    """Points to kill a job at: half of them at its dealings with the file system, half at any time."""
    events, seconds = killer.whole(job, *arguments)
    for n in itertools.count():
        yield n, {"at": chance.randint(1, events)} if n % 2 else {"after": chance.uniform(0, 0.9 * seconds)}


def told(record_property, what, count, **more):
    record_property(what, count)
    print(f"{what}: {count} kills, {', '.join(f'{k} {v}' for k, v in more.items())}")


def test_kills_while_training(killer, kills, tmp_path, record_property):
    chance = random.Random(1)
    killed = old_kept = resumed = done = 0
    want = {}
    for seed in (0, 1):
        killer.whole("train", tmp_path / f"want{seed}", seed, "")
        want[seed] = bits(tmp_path / f"want{seed}")
    for n, point in points(killer, chance, "train", tmp_path / "probe", 0, ""):
        if killed == kills["train"]:
            break
        folder = tmp_path / str(n)
        folder.mkdir()
        replaces = n % 3 == 0
        if replaces:
            killer.whole("train", folder / "out", 1, "")
        killed += killer("train", folder / "out", 0, "", **point)["signal"] == signal.SIGKILL
        if (folder / "out").exists():
            found = bits(folder / "out")
            assert found == want[0] or (replaces and found == want[1]), "neither the old nor the new"
            old_kept += found == want[1]
            done += found == want[0]
        else:
            assert not replaces, "the old adapter is lost"
        resumed += bool(list((folder / "out.training").glob("step-*")))
        again = killer("train", folder / "out", 0, "resume")
        assert again["code"] == 0, again["error"]
        assert bits(folder / "out") == want[0], "a resumed run gives other bits"
        assert left_in(folder, "out") == [], "stale files"
    told(record_property, "training", killed, resumed=resumed, old_kept=old_kept, finished=done)


@pytest.mark.parametrize("job", ["save", "stack", "export"])
def test_kills_while_writing_an_adapter(killer, kills, tmp_path, job, record_property):
    chance, output = random.Random(2), tmp_path / "out"
    old, new = (["0"], ["1"]) if job == "save" else (["1", "1"], ["0.5", "2"])
    want = []
    for version in (old, new):
        killer.whole(job, output, *version)
        want.append(bits(output))
    killed, found = 0, [0, 0, 0]
    for n, point in points(killer, chance, job, output, *old):
        if killed == kills[job]:
            break
        place = output if n % 4 else tmp_path / f"fresh{n}"
        killed += killer(job, place, *(new if n % 2 else old), **point)["signal"] == signal.SIGKILL
        if place.exists():
            found[want.index(bits(place))] += 1
        else:
            assert place != output, "the adapter is lost"
            found[2] += 1
        killer.whole(job, place, *old)
        assert bits(place) == want[0]
        assert [name for name in left_in(tmp_path) if name.startswith(".")] == [], "stale temporaries"
    told(record_property, job, killed, old_or_new_whole=sum(found[:2]), nothing_yet=found[2])


@pytest.mark.parametrize("kind", ["hub", "mirror", "archive"])
def test_kills_while_pulling(killer, kills, adapters, tmp_path, kind, record_property):
    from fake_hub import Running

    from unlearn_peft.adapters.hub.archive import pack
    from unlearn_peft.files.untrusted import sha256_of as sha256

    def name_of(version, path):
        if kind == "hub":
            files = {file.name: file.read_bytes() for file in path.iterdir()}
            return f"hub:acme/{version}@{server.hub.commit(f'acme/{version}', files)}"
        archive = tmp_path / "remote" / f"{version}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        pack(path, archive)
        server.hub.mirror[archive.name] = archive.read_bytes()
        return f"{server.url}/mirror/{archive.name}#sha256={sha256(archive)}" if kind == "mirror" else archive

    chance, (old, new), server = random.Random(5), adapters.values(), Running()
    wants = {bits(old): name_of("old", old), bits(new): name_of("new", new)}
    names, place = list(wants.values()), tmp_path / "place"
    found, killed, most = [0, 0, 0], 0, kills["pull"] // 3
    arguments = names[0], place / "out", tmp_path / "cache", server.url
    killer.whole("pull", *arguments)
    for n, point in points(killer, chance, "pull", *arguments[:2], tmp_path / "another", server.url):
        if killed == most:
            break
        output, cache = place / (f"fresh{n}" if n % 4 == 0 else "out"), tmp_path / f"cache{n // 3}"
        arguments = names[n % 2], output, cache, server.url
        killed += killer("pull", *arguments, **point)["signal"] == signal.SIGKILL
        if output.exists():
            found[list(wants).index(bits(output))] += 1
        else:
            assert output.name != "out", "the adapter is lost"
            found[2] += 1
        if (note := place / f"{output.name}.source.json").exists():
            assert json.loads(note.read_text())["identity"] == bits(output)
        killer.whole("pull", *arguments)
        assert bits(output) == list(wants)[n % 2]
        left = [path for where in (place, cache) for path in where.rglob(".*") if not path.name == ".downloads"]
        left += [path for path in cache.rglob("*") if ".downloads" in path.parts and path.is_file()]
        assert [path for path in left if path.suffix != ".lock"] == [], "stale temporaries"
    server.stop()
    told(record_property, f"pull, {kind}", killed, old_or_new_whole=sum(found[:2]), nothing_yet=found[2])


def test_kills_while_a_policy_changes(killer, kills, tmp_path, record_property):
    from test_store import assert_whole

    from unlearn_peft.serve.policy.store import PolicyStore

    where, chance, confirmed, killed = str(tmp_path / "policy.db"), random.Random(3), 0, 0
    for n in range(kills["store"]):
        said = tmp_path / f"said{n}"
        killed += killer("store", where, f"r{n}", said, after=chance.uniform(0.03, 0.3))["signal"] == signal.SIGKILL
        lines = said.read_text().splitlines() if said.exists() else []
        if not Path(where).exists():
            continue
        store = PolicyStore(where, create=True)
        store.add(f"after-{n}", who="test")  # goes on
        store.close()
        made = [change.revision for change in reversed(assert_whole(where)) if change.who == f"r{n}"]
        assert len(lines) <= len(made) <= len(lines) + 1 and made[: len(lines)] == list(map(int, lines))
        confirmed += len(lines)
    told(record_property, "policy store", killed, confirmed_changes_all_there=confirmed)
    assert confirmed


def test_kills_while_a_policy_file_is_replaced(killer, kills, tmp_path, record_property):
    from unlearn_peft.serve.policy.yaml_file import PolicyFile

    where, chance, killed = tmp_path / "policy.yaml", random.Random(4), 0
    killer.whole("yaml", where, 1)
    serving = PolicyFile(where)
    for n in range(kills["yaml"]):
        point = {"at": chance.randint(1, 60)} if n % 2 else {"after": chance.uniform(0, 0.2)}
        killed += killer("yaml", where, 10_000, **point)["signal"] == signal.SIGKILL
        tenants = serving.current().tenants
        assert serving.problem is None
        assert list(tenants) == [f"t{m}" for m in range(len(tenants))] and tenants
    killer.whole("yaml", where, 1)
    assert list(serving.current().tenants) == ["t0"] and left_in(tmp_path) == ["policy.yaml"]
    told(record_property, "policy file", killed)
    assert killed == kills["yaml"]


def test_a_checkpoint_is_never_seen_half_deleted(tmp_path, monkeypatch):
    import unlearn_peft.files.atomic as files
    from unlearn_peft.training.checkpoints import Checkpoints, State

    checkpoints = Checkpoints(tmp_path / "out", "run")
    for step in (1, 2):
        checkpoints.save(State(step, {"a": torch.ones(1)}, {"a": torch.ones(1)}, {}, {}))
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed before
        checkpoints.clear()
    assert checkpoints.latest() is None
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_moved_aside_comes_back(tmp_path, monkeypatch):
    import unlearn_peft.files.atomic as files

    target, rename = tmp_path / "adapter", os.rename

    def write(text):
        with files.atomic_folder(target, replace=True) as folder:
            (folder / "text").write_text(text)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write("old")
    write("older")
    assert (target / "text").read_text() == "older" and left_in(tmp_path) == ["adapter"]

    class Killed(BaseException):
        pass

    def die(source, to):
        if Path(to) == target:
            raise Killed
        rename(source, to)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.os, "rename", die)
        write("new")
    assert not target.exists() and len(left_in(tmp_path)) == 1
    files.clear_stale(target)
    assert (target / "text").read_text() == "older" and left_in(tmp_path) == ["adapter"]


def in_a_child(job, *arguments):
    """Run in a forked process; returns what it raised, as text, or its own text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = str(job(*arguments))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return said


@pytest.mark.parametrize("bytes_", [0, 100, 700, 3000, 20_000])
def test_a_full_disk_anywhere(tmp_path, adapters, bytes_):
    """A limit on the size of files lets the system itself refuse each write beyond it (EFBIG, told as a full disk)."""
    from unlearn_peft.adapters.transform.merge import stack

    output, paths = tmp_path / "out", list(adapters.values())
    stack(paths, output)
    before = bits(output)

    def limited():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
        stack(paths, output, [2.0, 2.0])

    said = in_a_child(limited)
    assert said.startswith("OutputError: no disk space") or (bytes_ == 20_000 and said == "None"), said
    assert (bits(output) == before) == (said != "None") and left_in(tmp_path) == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("filled_kb", [0, 100, 180, 240, 296])
def test_a_full_file_system(small_disk, tiny, fields, filled_kb):
    from unlearn_peft import unlearn
    from unlearn_peft.errors import OutputError

    (small_disk / "filler").write_bytes(b"x" * (filled_kb * 1000))
    output = small_disk / "out"
    settings = {**fields, "output": str(output), "checkpoint_every": 1, "cache_gb": 0}
    try:
        unlearn(tiny, **settings)
    except OutputError as error:
        assert "no disk space" in str(error)
        assert not output.exists(), "a part of an adapter"
        (small_disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
        unlearn(tiny, **settings, resume=True)
    assert bits(output) and left_in(small_disk, "filler") == ["out"]


def test_the_audit_log_on_a_full_disk_and_after_a_torn_line(small_disk):
    from unlearn_peft.errors import OutputError
    from unlearn_peft.serve.audit import AuditLog

    log, written = AuditLog(small_disk / "audit.jsonl"), 0
    with pytest.raises(OutputError, match="audit log"):
        while True:
            log.write("admitted", id=written, more="x" * 997)
            written += 1
    lines = (small_disk / "audit.jsonl").read_text().splitlines(True)
    assert [json.loads(line)["id"] for line in lines] == list(range(written)) and written > 100
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    log.write("admitted", id=written)
    log.close()
    with (small_disk / "audit.jsonl").open("a") as stream:
        stream.write('{"id": 5, "torn')
    log = AuditLog(small_disk / "audit.jsonl")
    log.write("admitted", id=-1)
    log.close()
    lines = (small_disk / "audit.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["id"] == -1 and lines[-2] == '{"id": 5, "torn'


def test_a_folder_that_may_not_be_written(tmp_path, adapters, tiny, fields, killer):
    from unlearn_peft import unlearn
    from unlearn_peft.adapters.transform.merge import stack
    from unlearn_peft.serve.audit import AuditLog

    place = tmp_path / "place"
    stack(adapters.values(), place / "out")
    before = bits(place / "out")

    def tries(try_):
        files = [file for folder in adapters.values() for file in folder.iterdir()]
        paths = (tmp_path, *tmp_path.parents, *adapters["a"].parents, *adapters.values(), *files)
        for path in paths:  # pytest's folders are this user's alone
            if path.stat().st_uid == 0 and path != Path("/"):
                path.chmod(0o755)
        place.chmod(0o555)
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return try_()

    paths = [path.absolute() for path in adapters.values()]
    for try_ in (
        lambda: stack(paths, place / "new"),
        lambda: stack(paths, place / "deep" / "new"),
        lambda: unlearn(tiny, **{**fields, "output": str(place / "new")}),
        lambda: AuditLog(place / "audit.jsonl"),
    ):
        said = in_a_child(tries, try_)
        assert said.startswith("OutputError: cannot write"), said
    place.chmod(0o755)
    assert left_in(place) == ["out"] and bits(place / "out") == before


def write_often(target, text, rounds):
    from unlearn_peft.files.atomic import atomic_folder

    for _ in range(rounds):
        with atomic_folder(Path(target), replace=True) as folder:
            for name in "abc":
                (folder / name).write_text(text)


def test_two_writers_of_one_adapter(tmp_path):
    target = tmp_path / "adapter"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unlearn_peft.files.atomic"])
    children = [context.Process(target=write_often, args=(str(target), text, 150)) for text in ("one", "two", "three")]
    for child in children:
        child.start()
    absent = mixed = looks = 0
    seen = False
    while any(child.is_alive() for child in children):
        try:
            handle = os.open(target, os.O_RDONLY)  # the folder that has the name now
        except FileNotFoundError:
            absent += seen
            continue
        seen, looks = True, looks + 1
        try:
            texts = set()
            for name in "abc":
                with open(os.open(name, os.O_RDONLY, dir_fd=handle)) as stream:
                    texts.add(stream.read())
            mixed += len(texts) != 1
        except FileNotFoundError:
            pass  # replaced and being deleted
        finally:
            os.close(handle)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert not absent and not mixed and looks > 50
    assert left_in(tmp_path) == ["adapter"]


def test_two_runs_with_one_output(tmp_path, tiny, fields):
    from unlearn_peft import unlearn
    from unlearn_peft.errors import OutputError
    from unlearn_peft.training.run import _locked

    output = Path(fields["output"])
    with _locked(output), pytest.raises(OutputError, match="another run is writing"):
        unlearn(tiny, **fields)

    def dies():
        with _locked(output):
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=dies)
    child.start()
    child.join()
    assert output.with_name("adapter.lock").exists()
    unlearn(tiny, **fields)
    assert left_in(tmp_path) == ["adapter"]


def secret(home, barrier, answers):
    os.environ.pop("UNLEARN_PEFT_DIGEST_KEY", None)
    os.environ["XDG_CONFIG_HOME"] = home
    from unlearn_peft.files.paths import digest_key

    barrier.wait()
    answers.put(digest_key())


def test_two_first_runs_use_one_secret(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(10):
        barrier, answers = context.Barrier(4), context.Queue()
        children = [
            context.Process(target=secret, args=(str(tmp_path / str(round_)), barrier, answers)) for _ in "1234"
        ]
        for child in children:
            child.start()
        found = {answers.get(timeout=30) for _ in children}
        for child in children:
            child.join()
        key = tmp_path / str(round_) / "unlearn_peft" / "digest.key"
        assert found == {key.read_bytes()} and key.stat().st_mode & 0o777 == 0o600
        assert left_in(key.parent) == ["digest.key"]


def test_clock_jumps(tmp_path, monkeypatch, tiny, adapters):
    import datetime as real

    import unlearn_peft.serve.audit as audit
    import unlearn_peft.serve.policy.store as store_module
    import unlearn_peft.serve.policy.yaml_file as policy_file
    from unlearn_peft.inference.bank import Bank
    from unlearn_peft.serve.policy.store import PolicyStore
    from unlearn_peft.serve.policy.yaml_file import PolicyFile

    jump = [0.0]

    class Clock(real.datetime):
        @classmethod
        def now(cls, tz=None):
            return real.datetime.now(tz) + real.timedelta(seconds=jump[0])

    wall, wall_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: wall() + jump[0])
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + int(jump[0] * 1e9))
    for module in (audit, store_module):
        monkeypatch.setattr(module, "datetime", Clock)
    assert policy_file.time.time is time.time

    store = PolicyStore(tmp_path / "policy.db", create=True, grace=30)
    store.add("acme", who="test")
    path = tmp_path / "policy.yaml"
    path.write_text("tenants: {t0: {forget: [], keys: []}}\nadapters: {}\n")
    file, log, bank = PolicyFile(path), audit.AuditLog(tmp_path / "audit.jsonl"), Bank(tiny.model, tiny.tokenizer)
    sizes = []
    for name, folder in adapters.items():
        bank.register(name, folder)
        with bank.hold([name]):
            sizes.append(bank.stats.resident_bytes)
    bank.cache._budget = sizes[-1]  # room for these two
    for n, jump[0] in enumerate((86_400, -86_400, 3.15e9, -1e9, 0)):
        assert "acme" in store.current().tenants and store.problem is None, "confirmed just now, by the steady clock"
        store.add(f"more-{n}", who="test")
        assert f"more-{n}" in store.current().tenants
        path.write_text(f"tenants: {{t{n}: {{forget: [], keys: []}}}}\nadapters: {{}}\n")
        stamp = wall() + jump[0]
        os.utime(path, (stamp, stamp))  # a file of yesterday, or of tomorrow, is as new as any other
        assert list(file.current().tenants) == [f"t{n}"] and file.problem is None
        log.write("admitted", id=n)
        for name in ("a", "b"):
            with bank.hold([name]):
                pass
    assert [change.revision for change in reversed(store.history())] == list(range(1, 7)), "counted, not timed"
    lines = [json.loads(line)["id"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert lines == list(range(5)) and bank.stats.loads == 2 and bank.stats.evictions == 0
    # the database goes away: the grace is over after 30 steady seconds, wherever the clock jumps
    steady = [time.monotonic()]
    monkeypatch.setattr(store_module, "monotonic", lambda: steady[0])
    steady[0] += 5
    store.current()
    (tmp_path / "policy.db").rename(tmp_path / "away.db")
    steady[0] += 20
    for jump[0] in (1e9, -1e9):
        store.current()
    steady[0] += 20
    from unlearn_peft.errors import PolicyError

    for jump[0] in (-1e9, 0):
        with pytest.raises(PolicyError, match="confirmed no policy in the last 30 s"):
            store.current()
    store.close()


CHANGED_BASE = """
import os, sys, torch
from unlearn_peft import load_base
folder, how = sys.argv[1:]
base = load_base(folder, dtype="float32", device="cpu")
ids = torch.arange(3, 40)[None]
file = os.path.join(folder, "model.safetensors")
size = os.path.getsize(file)
expected = None if how == "cut unseen" else base.model(ids).logits
if how.startswith("cut"):
    os.truncate(file, 0)
elif how == "overwritten":
    with open(file, "r+b") as stream:
        stream.seek(size // 4)
        stream.write(bytes(size // 2))
else:
    os.remove(file)
found = base.model(ids).logits
assert expected is None or torch.equal(expected, found), "another model"
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
assert "model.safetensors" not in maps
"""


@pytest.mark.parametrize("how", ["cut unseen", "cut", "overwritten", "deleted"])
@pytest.mark.long
def test_a_base_that_changes_on_disk(tmp_path, how):
    """Transformers maps the file: without a copy in memory, cut short, this ends with SIGBUS (measured: exit -7)."""
    make_tiny(tmp_path, tied=how == "cut")
    done = subprocess.run([sys.executable, "-c", CHANGED_BASE, tmp_path, how], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_an_adapter_that_changes_on_disk(tmp_path, tiny, make_adapter):
    from unlearn_peft.inference.bank import Bank

    path, ids = make_adapter(tiny, "one", scale=1.0), torch.arange(3, 40)[None]
    bank = Bank(tiny.model, tiny.tokenizer)
    bank.load("one", path)
    with torch.no_grad(), bank.rows([["one"]]):
        before = tiny.model(ids).logits
    os.truncate(path / "adapter_model.safetensors", 0)
    with torch.no_grad(), bank.rows([["one"]]):
        assert torch.equal(tiny.model(ids).logits, before)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize(
    "where", ["in a layer of the first pass", "in a layer of a step", "when rows join", "in a mix"]
)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_in_the_middle_of_a_batch(tiny, adapters, monkeypatch, where, error):
    from unlearn_peft.inference import model_runner as passes
    from unlearn_peft.inference.bank import Bank
    from unlearn_peft.serve.engine.base import Generation, GenerationError
    from unlearn_peft.serve.engine.scheduler import ActiveRow, Scheduler

    bank = Bank(tiny.model, tiny.tokenizer)
    for name, path in adapters.items():
        bank.load(name, path)
    scheduler = Scheduler(tiny.model, tiny.tokenizer, bank)

    def ask(forget, tokens=40):
        held, ended, pieces = bank.hold(forget), threading.Event(), []
        request = Generation(ids=(5, 6, 7), max_tokens=tokens, ignore_eos=True)
        row = ActiveRow(request, held, pieces.append, lambda: (held.release(), ended.set()))
        scheduler.submit(row)
        return ended, pieces

    def finish(asked):
        ended, pieces = asked
        assert ended.wait(60)
        failed = [piece for piece in pieces if isinstance(piece, Exception)]
        return failed[0] if failed else pieces[-1].finish_reason

    armed = threading.Event()
    hit = []

    def fail_once():
        if armed.is_set():
            armed.clear()
            hit.append(where)
            raise error

    layer = tiny.model.model.layers[1].mlp  # the first layer's keys are in the cache by then
    steps = where == "in a layer of a step"
    if where.startswith("in a layer"):
        hook = layer.register_forward_pre_hook(lambda _, x: fail_once() if (x[0].shape[1] == 1) == steps else None)
    elif where == "when rows join":
        extend = passes.KVBatch.extend
        monkeypatch.setattr(passes.KVBatch, "extend", lambda self, other: (fail_once(), extend(self, other))[1])
    else:
        import unlearn_peft.inference.multi_lora as multi_lora

        layer_of = multi_lora._layer
        monkeypatch.setattr(multi_lora, "_layer", lambda *parts: (fail_once(), layer_of(*parts))[1])

    try:
        started, slow = threading.Event(), passes.ModelRunner.step

        def step(self, *arguments):
            started.set()
            time.sleep(0.005)
            return slow(self, *arguments)

        monkeypatch.setattr(passes.ModelRunner, "step", step)
        running = ask(["a"], 60)
        assert started.wait(30)
        armed.set()
        joining = ask(["b"], 20)
        ends = {"running": finish(running), "joining": finish(joining)}
        assert hit == [where]
        refused = {name for name, end in ends.items() if isinstance(end, GenerationError)}
        assert all(end == "length" for name, end in ends.items() if name not in refused)
        assert len(refused) >= 1 and (
            where in ("in a layer of a step",) or refused == {"joining"} or where == "in a mix"
        )
        assert all(type(error).__name__ in str(end) for name, end in ends.items() if name in refused)
        assert scheduler.alive and finish(ask(["a", "b"])) == "length" == finish(ask([])), "the worker goes on"
        for _ in range(500):
            if not scheduler.running:
                break
            time.sleep(0.01)
        assert scheduler.running == 0 == scheduler.waiting
        pins = {name: one.pins for name, one in bank.cache._loaded.items()}
        assert pins == {"a": 1, "b": 1}, "the bank's own, and nobody else's"
    finally:
        if where.startswith("in a layer"):
            hook.remove()
        scheduler.close()
    for name in adapters:
        bank.remove(name)
    assert not bank._hooks and not any(module._forward_hooks for module in tiny.model.modules())


@pytest.mark.parametrize("point", ["read_bundle", "LoadedAdapter.on", "AdapterBatch"])
def test_out_of_memory_while_an_adapter_is_read(tiny, adapters, monkeypatch, point):
    import unlearn_peft.inference.bank as bank_module
    from unlearn_peft.inference.bank import Bank

    bank = Bank(tiny.model, tiny.tokenizer)
    for name, path in adapters.items():
        bank.register(name, path)
    bank.hold(["a"]).release()

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        if point == "read_bundle":
            patch.setattr(bank_module, "read_bundle", fail)
        elif point == "LoadedAdapter.on":
            patch.setattr(bank_module.LoadedAdapter, "on", fail)
        else:
            patch.setattr(bank_module, "AdapterBatch", fail)
        with pytest.raises(MemoryError), bank.rows([["a", "b"], ["b"]]):
            pass
    assert {one.pins for one in bank.cache._loaded.values()} == {1}
    with torch.no_grad(), bank.rows([["a", "b"]]):
        tiny.model(torch.arange(3, 9)[None])
    assert bank.stats.resident == 2 and {one.pins for one in bank.cache._loaded.values()} <= {1}


def table():
    lines = ["| fault | what is checked | test |", "|---|---|---|"]
    lines += [f"| {fault} | {checked} | `tests/{file}.py::{test}` |" for fault, checked, file, test in FAULTS]
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one_and_its_tests_exist():
    text = DOCS.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == table(), "run python tests/test_faults.py"
    for _, _, file, test in FAULTS:
        assert re.search(rf"^def {test}\(", (Path(__file__).parent / f"{file}.py").read_text(), re.M), test


if __name__ == "__main__":
    text = DOCS.read_text()
    DOCS.write_text(text[: text.index(BEGIN) + len(BEGIN)] + "\n" + table() + "\n" + text[text.index(END) :])
