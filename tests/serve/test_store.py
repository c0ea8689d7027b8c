"""The policy store, in SQLite and in a real PostgreSQL: changes, their history, readers, crashes, outages; the CLI."""

import getpass
import glob
import json
import multiprocessing
import os
import pwd
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from unlearn_peft.errors import PolicyError
from unlearn_peft.serve.policy import engines, schema
from unlearn_peft.serve.policy import store as store_module
from unlearn_peft.serve.policy.edits import fingerprint
from unlearn_peft.serve.policy.policy import NotAllowed, key_digest, make_policy
from unlearn_peft.serve.policy.store import PolicyStore, open_policy
from unlearn_peft.serve.policy.yaml_file import dump_policy, parse_policy, read_policy

ME = {"who": "tester", "why": "a test"}
HOW = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
PEMS = [ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*HOW).decode() for _ in range(2)]


class Postgres:
    """A private server in a folder of its own, reached through a socket there, without a network."""

    def __init__(self):
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres")) or [shutil.which("postgres")]
        if not found[-1]:
            pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
        self.programs = Path(found[-1]).parent
        self.folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path is
        self.as_user = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            self.as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self.log = (self.folder / "log").open("wb")
        self._run("initdb", "-D", self.folder / "data", "-U", "tester", "-A", "trust", "--no-sync")
        self.databases = 0
        self.start()

    def start(self):
        command = [self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder]
        command += ["-c", "listen_addresses=", "-c", "fsync=off"]
        self.server = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd="/", **self.as_user)
        for _ in range(300):
            if subprocess.run([self.programs / "pg_isready", "-q", "-h", self.folder]).returncode == 0:
                return
            time.sleep(0.1)
        pytest.fail(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()[-2000:]}")

    def stop(self, how=signal.SIGINT):
        """SIGINT: at once; SIGQUIT: as if it had crashed."""
        self.server.send_signal(how)
        self.server.wait(timeout=60)

    def new_database(self):
        self.databases += 1
        self._run("createdb", "-h", self.folder, "-U", "tester", f"test{self.databases}")
        return f"postgresql://tester@/test{self.databases}?host={self.folder}"

    def _run(self, program, *arguments):
        command = [self.programs / program, *map(str, arguments)]
        subprocess.run(command, check=True, stdout=self.log, stderr=self.log, cwd="/", **self.as_user)


@pytest.fixture(scope="module")
def postgres():
    server = Postgres()
    yield server
    server.stop(signal.SIGQUIT)
    server.log.close()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def where(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "a store's #1 50%.db")
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def store(where):
    store = PolicyStore(where, create=True)
    yield store
    store.close()


@pytest.fixture
def filled(store):
    for name in ("hp", "news"):
        store.adapter(name, f"/srv/{name}", "a" * 64, **ME)
    store.add("acme", **ME)
    store.forget("acme", "hp", **ME)
    return store


def content_of(policy):
    """What the history must lead to: of each key the first digits of its digest."""
    tenants = {
        name: {"forget": entry.forget, "keys": sorted(key[:12] for key in entry.keys)}
        | ({"may_add": entry.may_add} if entry.may_add else {})
        | ({"quotas": entry.quotas} if entry.quotas else {})
        | ({} if entry.prefix_cache else {"prefix_cache": False})
        | (
            {"trusted_keys": {n: fingerprint(pem) for n, pem in trusted.items()}}
            if (trusted := entry.trusted_keys)
            else {}
        )
        for name, entry in policy.tenants.items()
    }
    adapters = {
        name: {"sha256": None, **entry.model_dump(exclude_none=True)} for name, entry in policy.adapters.items()
    }
    return {"adapters": adapters, "tenants": tenants}


def replay(history):
    """What a history leads to; its revisions must have no gap."""
    adapters, tenants = {}, {}
    for n, change in enumerate(reversed(history), 1):
        assert change.revision == n and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", change.at) and change.who
        what = change.what
        match change.action:
            case "add":
                tenants[what["tenant"]] = {"forget": {}, "keys": []}
            case "remove":
                assert tenants.pop(what["tenant"])["forget"] == what["forget"]
            case "forget":
                assert tenants[what["tenant"]]["forget"].get(what["adapter"]) == what["before"]
                tenants[what["tenant"]]["forget"][what["adapter"]] = what["strength"]
            case "unforget":
                assert tenants[what["tenant"]]["forget"].pop(what["adapter"]) == what["before"]
            case "allow":
                allowed = tenants[what["tenant"]].setdefault("may_add", {})
                assert allowed.get(what["adapter"]) == what["before"]
                allowed[what["adapter"]] = what["strength"]
            case "disallow":
                assert tenants[what["tenant"]]["may_add"].pop(what["adapter"]) == what["before"]
                if not tenants[what["tenant"]]["may_add"]:
                    del tenants[what["tenant"]]["may_add"]
            case "adapter":
                assert adapters.get(what["adapter"]) == what["before"]
                adapters[what["adapter"]] = {k: v for k, v in what.items() if k not in ("adapter", "before")}
            case "unadapter":
                assert adapters.pop(what["adapter"]) == what["before"]
            case "key":
                tenants[what["tenant"]]["keys"].append(what["key"])
            case "revoke":
                tenants[what["tenant"]]["keys"].remove(what["key"])
            case "quota":
                assert tenants[what["tenant"]].pop("quotas", {}) == what["before"]
                tenants[what["tenant"]] |= {"quotas": what["quotas"]} if what["quotas"] else {}
            case "prefix_cache":
                entry = tenants[what["tenant"]]
                assert entry.pop("prefix_cache", True) == what["before"]
                entry |= {} if what["prefix_cache"] else {"prefix_cache": False}
            case "trust":
                entry = tenants[what["tenant"]]
                entry["trusted_keys"] = {**entry.get("trusted_keys", {}), **what["trusted_keys"]}
            case "untrust":
                trusted = tenants[what["tenant"]]["trusted_keys"]
                for name, mark in what["trusted_keys"].items():
                    assert trusted.pop(name) == mark
                if not trusted:
                    del tenants[what["tenant"]]["trusted_keys"]
            case "import":
                adapters, tenants = what["adapters"], what["tenants"]
    for entry in tenants.values():
        entry["keys"].sort()
    return {"adapters": adapters, "tenants": tenants}


def assert_whole(where):
    """The tables hold exactly what the history leads to."""
    fresh = PolicyStore(where)
    history = fresh.history()
    assert replay(history) == content_of(fresh.read_all())
    fresh.close()
    if "://" not in where:
        with sqlite3.connect(where) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return history


def test_each_change_and_its_history(store, where):
    other = open_policy(where)
    assert other.current().tenants == {} and other.problem is None
    assert store.adapter("hp", "out/hp", "A" * 64, **ME) == 1
    assert store.adapter("news", "/srv/news", None, **ME) == 2
    assert store.add("acme", who=" ann ", why="contract 12") == 3
    assert store.add("globex", **ME) == 4
    assert other.current().forget_of("acme") == {}
    store.forget("acme", "hp", **ME)
    store.forget("acme", "news", 0.1 + 0.2, **ME)
    assert other.current().forget_of("acme") == {"hp": 1.0, "news": 0.1 + 0.2}, "seen by others at once, exactly"
    store.forget("acme", "news", 2, **ME)
    store.unforget("acme", "hp", **ME)
    store.unadapter("hp", **ME)
    key, second = store.add_key("acme", **ME), store.add_key("acme", **ME)
    assert other.current().tenant_of(key) == other.current().tenant_of(second) == "acme"
    store.revoke_key("acme", key_digest(key)[:8], **ME)
    assert other.current().tenant_of(key) is None
    store.revoke_key("acme", second, **ME)
    assert other.current().tenant_of(second) is None
    store.adapter("news", "/srv/newer", "b" * 64, **ME)
    third = store.add_key("globex", **ME)
    store.remove("globex", **ME)
    assert other.current().tenant_of(third) is None and list(other.current().tenants) == ["acme"]
    assert other.read_all().dump() == {
        "adapters": {"news": {"path": "/srv/newer", "sha256": "b" * 64, "probes": None, "canary": None}},
        "tenants": {
            "acme": {
                "forget": {"news": 2.0},
                "keys": {},
                "trusted_keys": None,
                "may_add": {},
                "quotas": {},
                "prefix_cache": True,
            }
        },  # fmt: skip
    }
    store.trust("acme", {"x": PEMS[0], "y": PEMS[1]}, **ME)
    assert other.current().tenants["acme"].trusted_keys == {"x": PEMS[0], "y": PEMS[1]}
    store.untrust("acme", "x", **ME)
    assert_whole(where)
    store.untrust("acme", None, **ME)
    assert other.current().trust_of("acme") is None
    history = assert_whole(where)
    assert [c.action for c in reversed(history)] == [
        "adapter", "adapter", "add", "add", "forget", "forget", "forget", "unforget", "unadapter", "key", "key",
        "revoke", "revoke", "adapter", "key", "remove", "trust", "untrust", "untrust",
    ]  # fmt: skip
    history = history[3:]
    assert history[13].who == "ann" and history[13].why == "contract 12" and history[13].what == {"tenant": "acme"}
    assert history[15].what == {"adapter": "hp", "path": str(Path("out/hp").absolute()), "sha256": "a" * 64,
                                "before": None}  # fmt: skip
    assert history[9].what == {"tenant": "acme", "adapter": "news", "strength": 2, "before": 0.1 + 0.2}
    assert [c.revision for c in store.history(3)] == [19, 18, 17]
    other.close()


def test_what_requests_may_add_changes_like_the_set(filled, where):
    other = open_policy(where)
    for extra in (["news"], {"hp": 1.5}):
        with pytest.raises(NotAllowed):
            other.current().forget_of("acme", extra)
    filled.allow("acme", "news", **ME)
    filled.allow("acme", "hp", 1.5, **ME)
    assert other.current().forget_of("acme", {"news": 0.5, "hp": 1.5}) == {"hp": 1.5, "news": 0.5}
    assert other.current().forget_of("acme") == {"hp": 1.0}
    filled.allow("acme", "hp", 2, **ME)
    filled.add("globex", **ME)
    filled.allow("globex", "news", **ME)
    assert other.current().tenants["acme"].may_add == {"hp": 2.0, "news": 1.0}
    for told, change in {
        "adapter 'news' is allowed to acme, globex: `disallow`": lambda: filled.unadapter("news", **ME),
        "no adapter 'new' (did you mean 'news'?)": lambda: filled.allow("acme", "new", **ME),
        "may not add 'hq' anyway (did you mean 'hp'?)": lambda: filled.disallow("acme", "hq", **ME),
        "requests of tenant 'globex' may not add 'hp' anyway": lambda: filled.disallow("globex", "hp", **ME),
        "the strength is 17": lambda: filled.allow("acme", "hp", 17, **ME),
    }.items():
        with pytest.raises(PolicyError) as error:
            change()
        assert told in str(error.value)
    exported = parse_policy(dump_policy(filled.read_all()).encode(), "x", Path("/"))
    assert exported == filled.read_all() and exported.tenants["acme"].may_add == {"hp": 2.0, "news": 1.0}
    assert [change.what for change in filled.history()[:3]] == [
        {"tenant": "globex", "adapter": "news", "strength": 1.0, "before": None},
        {"tenant": "globex"},
        {"tenant": "acme", "adapter": "hp", "strength": 2, "before": 1.5},
    ]
    filled.disallow("acme", "news", **ME)
    filled.disallow("globex", "news", **ME)
    filled.unadapter("news", **ME)
    assert other.current().tenants["acme"].may_add == {"hp": 2.0}
    filled.remove("acme", **ME)
    assert_whole(where)
    other.close()


def test_a_store_without_what_may_be_added_is_served_and_gets_it_at_the_first_change(filled, where):
    """Schema version 3: the same tables but one."""
    with filled._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE unlearn_may_add")
        connection.exec_driver_sql("UPDATE unlearn_state SET schema_version = 3")
    old = PolicyStore(where)
    assert old.current().forget_of("acme") == {"hp": 1.0} and old.current().tenants["acme"].may_add == {}
    filled.allow("acme", "news", **ME)
    assert old.current().forget_of("acme", ["news"]) == {"hp": 1.0, "news": 1.0}
    old.close()
    assert_whole(where)


def test_a_store_of_version_4_is_served_and_gets_its_columns_at_the_first_change(filled, where):
    key = filled.add_key("acme", **ME)
    with filled._engine.begin() as connection:
        for column in ("adapters.probes", "adapters.canary", "keys.name", "keys.expires", "keys.scopes", "keys.used",
                       "tenants.quotas", "tenants.prefix_cache"):  # fmt: skip
            table, _, name = column.partition(".")
            connection.exec_driver_sql(f"ALTER TABLE unlearn_{table} DROP COLUMN {name}")
        connection.exec_driver_sql("UPDATE unlearn_state SET schema_version = 4")
    old = PolicyStore(where)
    assert old.current().forget_of("acme") == {"hp": 1.0} and old.current().adapters["hp"].canary is None
    assert old.read_all().adapters["hp"].probes is None and old.key_uses("acme") == {}
    assert old.current().tenants["acme"].quotas == {} and old.current().tenants["acme"].prefix_cache
    with pytest.raises(PolicyError, match="cannot write to the store"):  # until the first change
        old.note_uses({key_digest(key): "2026-11-30T12:00:00+00:00"})
    found = old.current().find_key(key)
    assert found.tenant == "acme" and found.entry.scopes is None and not found.entry.expired
    filled.adapter("news", "/srv/news", None, "news.jsonl", "warn", **ME)
    old.note_uses({key_digest(key): "2026-11-30T12:00:00+00:00"})
    assert old.key_uses("acme") == {key_digest(key): "2026-11-30T12:00:00+00:00"}
    filled.add_key("acme", {"name": "laptop", "expires": "2027-01-31", "scopes": []}, **ME)
    found = {entry.name: entry for entry in old.current().tenants["acme"].keys.values()}
    assert found["laptop"].expires == "2027-01-31T00:00:00+00:00" and found["laptop"].scopes == ()
    found = old.current().adapters["news"]
    assert (found.probes, found.canary) == (str(Path("news.jsonl").absolute()), "warn")
    old.close()
    assert_whole(where)


def test_a_store_of_version_5_gets_the_choice_of_the_prefix_cache(filled, where):
    with filled._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE unlearn_tenants DROP COLUMN prefix_cache")
        connection.exec_driver_sql("UPDATE unlearn_state SET schema_version = 5")
    old = PolicyStore(where)
    assert old.current().tenants["acme"].prefix_cache and old.read_all().tenants["acme"].prefix_cache
    filled.prefix_cache("acme", False, **ME)
    filled.add("globex", **ME)
    assert not old.current().tenants["acme"].prefix_cache and old.current().tenants["globex"].prefix_cache
    assert parse_policy(dump_policy(old.read_all()).encode(), "it", Path()) == old.read_all()
    assert assert_whole(where)[1].what == {"tenant": "acme", "prefix_cache": False, "before": True}
    filled.prefix_cache("acme", True, **ME)
    assert old.current().tenants["acme"].prefix_cache
    old.close()


def test_an_adapter_keeps_its_canary_until_another_is_given(filled, where):
    probes = str(Path("hp.jsonl").absolute())
    filled.adapter("hp", "/srv/hp", None, "hp.jsonl", "warn", **ME)
    filled.adapter("hp", "/srv/newer", "c" * 64, **ME)
    found = filled.current().adapters["hp"]
    assert (found.path, found.probes, found.canary) == ("/srv/newer", probes, "warn")
    filled.adapter("hp", "/srv/newer", "c" * 64, None, "off", **ME)
    found = filled.current().adapters["hp"]
    assert (found.probes, found.canary) == (probes, "off")
    with pytest.raises(PolicyError, match="'adapters.hp.canary': expected refuse, warn or off"):
        filled.adapter("hp", "/srv/newer", None, None, "maybe", **ME)
    assert_whole(where)


def test_the_command_says_when_a_canary_has_no_effect(tenant, tiny, make_adapter, tmp_path):
    adapter, probes = make_adapter(tiny, "hp"), tmp_path / "probes.jsonl"
    code, _, err = tenant("adapter", "hp", adapter, "--canary", "warn")
    assert code == 0 and "the canary of 'hp' has no effect: it has no probes" in err
    probes.write_text('{"prompt": "PROBE"}')
    code, _, err = tenant("adapter", "hp", adapter, "--probes", probes)
    assert code == 2 and "row 1: no 'leak' words" in err and "PROBE" not in err
    probes.write_text('{"prompt": "PROBE", "leak": "word"}')
    assert tenant("adapter", "hp", adapter, "--probes", probes)[2] == ""
    assert f"; canary: warn, {probes}" in tenant("list")[1]


def test_what_does_not_fit_is_refused_and_leaves_no_trace(filled, where):
    before, history = filled.read_all(), filled.history()
    key = filled.add_key("acme", **ME)
    refused = {
        "tenant 'acme' is there already": lambda: filled.add("acme", **ME),
        "'a b' is no name": lambda: filled.add("a b", **ME),
        "'x..y' is no name": lambda: filled.adapter("x..y", "/x", None, **ME),
        "no tenant 'acm' (did you mean 'acme'?)": lambda: filled.forget("acm", "hp", **ME),
        "no tenant 'nobody'": lambda: filled.remove("nobody", **ME),
        "no adapter 'new' (did you mean 'news'?)": lambda: filled.forget("acme", "new", **ME),
        "does not have 'news' forgotten": lambda: filled.unforget("acme", "news", **ME),
        "the strength is 0": lambda: filled.forget("acme", "hp", 0, **ME),
        "the strength is inf": lambda: filled.forget("acme", "hp", float("inf"), **ME),
        "the strength is nan": lambda: filled.forget("acme", "hp", float("nan"), **ME),
        "'adapters.x.sha256': expected a sha256": lambda: filled.adapter("x", "/x", key, **ME),
        "'adapters.x.path': expected the path": lambda: filled.adapter("x", "/x\0", None, **ME),
        "adapter 'hp' is forgotten for acme": lambda: filled.unadapter("hp", **ME),
        "0 keys of tenant 'acme' fit": lambda: filled.revoke_key("acme", key + "x", **ME),
        "give the key, its name, or 8 or more digits": lambda: filled.revoke_key("acme", key_digest(key)[:7], **ME),
        "expected who": lambda: filled.add("x", who=" "),
        "'why' must be one line": lambda: filled.add("x", who="ann", why="a\n9 2026 root: add"),
        "'who' must be one line": lambda: filled.add("x", who="\x1b[2J"),
        "at most 2000 characters": lambda: filled.add("x", who="ann", why="x" * 2001),
    }
    for told, change in refused.items():
        with pytest.raises(PolicyError) as error:
            change()
        assert told in str(error.value) and key not in str(error.value) and key_digest(key) not in str(error.value)
    filled.revoke_key("acme", key_digest(key), **ME)
    assert filled.read_all() == before and len(assert_whole(where)) == len(history) + 2


def test_no_key_is_anywhere_but_in_its_owners_hands(filled, where, tmp_path, caplog):
    keys = [filled.add_key("acme", **ME) for _ in range(3)]
    filled.revoke_key("acme", keys[0], **ME)
    policy = filled.read_all()
    filled.replace(policy, **ME)
    written = dump_policy(policy) + repr(policy) + repr(filled.history()) + caplog.text
    for file in tmp_path.iterdir():
        written += file.read_bytes().decode("latin-1")
    for key in keys:
        assert key not in written and key[3:] not in written
    assert key_digest(keys[1]) not in repr(filled.history())


def test_import_and_export(filled, where, tmp_path):
    filled.add_key("acme", **ME)
    (tmp_path / "policy.yaml").write_text(dump_policy(filled.read_all()))
    exported = read_policy(tmp_path / "policy.yaml")
    assert exported.version == filled.read_all().version
    tenants = f"{{acme: {{forget: {{x: 3}}, keys: [{'0c' * 32}]}}, b: {{forget: []}}}}"
    text = f"adapters: {{x: {{path: sub/x}}}}\ntenants: {tenants}"
    imported = parse_policy(text.encode(), "x", tmp_path)
    filled.replace(imported, **ME)
    assert filled.read_all() == imported and filled.read_all().adapters["x"].path == str(tmp_path / "sub/x")
    assert_whole(where)
    key = next(iter(imported.tenants["acme"].keys))
    moved = make_policy({"adapters": {}, "tenants": {"new": {"forget": {}, "keys": [key]}}}, "x")
    filled.replace(moved, **ME)
    assert filled.read_all() == moved, "the key went from a tenant that is no more to another"
    filled.replace(exported, **ME)
    assert filled.read_all().version == exported.version
    assert_whole(where)


@st.composite
def policies(draw):
    """Of few names and keys, so that one policy after another adds, changes, moves and removes."""
    adapters = draw(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["/x", "/y"]), max_size=3))
    sets = st.dictionaries(st.sampled_from(sorted(adapters)), st.sampled_from([0.5, 1.0])) if adapters else st.just({})
    tenants = draw(st.dictionaries(st.sampled_from("tuv"), sets, max_size=3))
    owners = draw(st.lists(st.sampled_from(sorted(tenants)), max_size=4)) if tenants else []
    keys = {name: [key_digest(str(n)) for n, owner in enumerate(owners) if owner == name] for name in tenants}
    signers = st.none() | st.dictionaries(st.sampled_from("xy"), st.sampled_from(PEMS), min_size=1)
    values = {
        "adapters": {name: {"path": path} for name, path in adapters.items()},
        "tenants": {
            name: {"forget": forget, "keys": keys[name], "trusted_keys": draw(signers), "may_add": draw(sets)}
            for name, forget in tenants.items()
        },
    }
    return make_policy(values, "x")


@given(st.lists(policies(), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_any_policy_can_follow_any_other(sequence):
    with tempfile.TemporaryDirectory() as folder:
        store = PolicyStore(f"{folder}/tenants.db", create=True)
        for policy in sequence:
            store.replace(policy, **ME)
            assert store.read_all() == policy
            assert dict(store.current().tenants) == policy.tenants and store.current().adapters == policy.adapters
        store.close()
        assert_whole(f"{folder}/tenants.db")


def test_the_history_cannot_be_changed(filled, where):
    engine = filled._engine
    for statement in ("UPDATE unlearn_history SET who = 'x'", "DELETE FROM unlearn_history WHERE revision = 1"):
        with pytest.raises(Exception, match="the history is only added to"), engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert_whole(where)


def by_hand(store, *statements):
    """Change the tables as somebody with a database client would, who increases the revision."""
    with store._engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("UPDATE unlearn_state SET revision = revision + 1, token = 'x'")


def test_adapters_that_are_not_valid_are_not_taken(filled, where, caplog):
    key = filled.add_key("acme", **ME)
    assert filled.current().tenant_of(key) == "acme"
    before = filled.current()
    by_hand(filled, "INSERT INTO unlearn_adapters (name, path) VALUES ('a b', '/x')")
    with pytest.raises(PolicyError, match="'a b' is no name"):
        open_policy(where)
    for _ in range(3):
        policy = filled.current()
        assert policy == before and policy.tenant_of(key) == "acme" and "'a b' is no name" in filled.problem
        with pytest.raises(PolicyError, match="stays as it was"):  # it was never read, and is not read now
            policy.tenant_of("uf-another")
    assert caplog.text.count("'a b' is no name") == 1, "logged once"
    filled.unadapter("a b", **ME)
    assert list(filled.current().adapters) == ["hp", "news"] and filled.problem is None
    assert filled.current().tenant_of("uf-another") is None


def test_a_tenant_that_is_not_valid_is_refused_alone(filled):
    keys = [filled.add_key("acme", **ME)]
    filled.add("globex", **ME)
    keys.append(filled.add_key("globex", **ME))
    assert [filled.current().tenant_of(key) for key in keys] == ["acme", "globex"]
    by_hand(filled, "UPDATE unlearn_forgets SET strength = 99 WHERE tenant = 'acme'")
    assert filled.current().tenant_of(keys[1]) == "globex"
    with pytest.raises(PolicyError, match="the strength is 99"):
        filled.current().tenant_of(keys[0])
    filled.forget("acme", "hp", **ME)
    assert filled.current().tenant_of(keys[0]) == "acme"


def two_sides():
    """Two policies that differ in all their parts."""
    sides = []
    for strength in (1, 2):
        tenants = "".join(f"  t{n}: {{forget: {{a: {strength}, b: {strength}}}}}\n" for n in range(5))
        text = f"adapters:\n  a: {{path: /a}}\n  b: {{path: /b{strength}}}\ntenants:\n{tenants}"
        sides.append(parse_policy(text.encode(), "x", Path("/")))
    return sides


def side_of(policy, tenant):
    """1 or 2: the side that a tenant's set and the adapters are of; they must be of one."""
    forget = policy.forget_of(tenant)
    (side,) = {*forget.values(), int(policy.adapters["b"].path[2:])}
    return side


def test_a_change_in_the_midst_of_a_read(store, where):
    """What was begun to be read is read to its end as it was; the change is seen by the next call."""
    sides = two_sides()
    store.replace(sides[0], **ME)
    reader, left = PolicyStore(where), [1]

    def change(connection, cursor, statement, *_):
        if "unlearn_adapters" in statement and left:
            left.clear()
            store.replace(sides[1], **ME)

    event.listen(reader._engine, "after_cursor_execute", change)
    first = reader.current()
    assert first.adapters == sides[0].adapters and not left and first.version.startswith("1-")
    assert side_of(first, "t0") == 2, "read now, and with the adapters of now"
    assert first.version.startswith("2-")
    second = reader.current()
    store.replace(sides[0], **ME)
    assert side_of(second, "t0") == 2, "in the cache, and not read again"
    assert side_of(reader.current(), "t0") == 1
    assert side_of(second, "t0") == 2, "what a request has read stays"
    reader.close()


def test_readers_of_many_threads_never_see_half_a_change(store, where):
    """The store is switched between two policies; each reader's tenant and adapters are of one, and never older."""
    sides = two_sides()
    store.replace(sides[0], **ME)
    stop, seen, failures = threading.Event(), set(), []

    def read(own):
        source, newest = PolicyStore(where) if own else store, 0
        dice = random.Random(own)
        try:
            while not stop.is_set():
                policy = source.current()
                side, revision = side_of(policy, f"t{dice.randrange(5)}"), int(policy.version.partition("-")[0])
                assert side == 2 - revision % 2 and revision >= newest and not source.problem
                newest = revision
                seen.add(side)
        except Exception as error:
            failures.append(repr(error))
        if own:
            source.close()

    threads = [threading.Thread(target=read, args=(n % 2,)) for n in range(6)]
    for thread in threads:
        thread.start()
    try:
        for n in range(1, 41):
            store.replace(sides[n % 2], **ME)
            assert side_of(store.current(), "t0") == 1 + n % 2
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures and seen == {1, 2}
    assert len(assert_whole(where)) == 41


def test_a_change_drops_what_it_changes_and_nothing_else(filled, where):
    """Readers follow the changes by revision: what they read anew is what was changed."""
    tenants = [f"t{n}" for n in range(20)]
    keys = {}
    for tenant in tenants:
        filled.add(tenant, **ME)
        keys[tenant] = filled.add_key(tenant, **ME)
    reader, statements = PolicyStore(where), []
    event.listen(reader._engine, "after_cursor_execute", lambda c, cursor, text, *_: statements.append(text))

    def reads(*asked):
        statements.clear()
        policy = reader.current()
        assert [policy.tenant_of(keys[tenant]) for tenant in asked] == [*asked]
        return sum("unlearn_tenants" in text for text in statements)

    assert reads(*tenants) == 20 and reads(*tenants) == 0
    filled.forget("t3", "hp", **ME)
    assert reads(*tenants) == 1 and reader.current().forget_of("t3") == {"hp": 1.0}
    filled.adapter("hp", "/srv/newer", None, **ME)
    assert reads(*tenants) == 0 and reader.current().adapters["hp"].path == "/srv/newer"
    assert not any("unlearn_adapters" in text and "WHERE" not in text for text in statements), "one adapter, not all"
    filled.revoke_key("t4", keys["t4"], **ME)
    assert reader.current().tenant_of(keys["t4"]) is None
    filled.replace(filled.read_all(), **ME)
    assert reads(*(tenant for tenant in tenants if tenant != "t4")) == 19, "an import may change everything"
    reader.close()


def test_a_backup_that_was_put_back_and_changed_otherwise(filled, where):
    """Its revisions have other tokens: all that was read of the lost ones is read again, whatever changed since."""
    reader = PolicyStore(where)
    start = filled.add("globex", **ME)
    assert reader.current().forget_of("acme") == {"hp": 1.0}
    filled.forget("acme", "news", **ME)
    assert reader.current().forget_of("acme") == {"hp": 1.0, "news": 1.0}
    with filled._engine.begin() as connection:  # as if `start` were put back: the history's trigger is not asked
        connection.exec_driver_sql(f"DELETE FROM unlearn_changes WHERE revision > {start}")
        connection.exec_driver_sql("DELETE FROM unlearn_forgets WHERE adapter = 'news'")
        for revision, token in ((start + 1, "other"), (start + 2, "another")):
            connection.exec_driver_sql(f"INSERT INTO unlearn_changes VALUES ({revision}, '{token}', 'globex', NULL)")
        connection.exec_driver_sql(f"UPDATE unlearn_state SET revision = {start + 2}, token = 'another'")
    assert reader.current().forget_of("acme") == {"hp": 1.0}
    reader.close()


def test_the_cache_is_bounded(filled, where):
    reader, keys = PolicyStore(where, cache_size=5), []
    for n in range(12):
        filled.add(f"t{n}", **ME)
        keys += [filled.add_key(f"t{n}", **ME) for _ in range(2)]
    for n in [*range(24), 0, 1]:
        assert reader.current().tenant_of(keys[n]) == f"t{n // 2}"
        assert len(reader._cache) <= 5 and len(reader._cache._owners) <= 10
    for _ in range(20):
        assert reader.current().tenant_of("uf-nobody's") is None
    assert reader._cache.find("t0", None), "keys that nobody has push nobody out"
    reader.close()


def test_tenants_in_the_cache_outlive_the_database_for_the_grace(filled, monkeypatch, tmp_path):
    """Whoever is not in the cache is refused, never taken for unknown and never answered with an empty set."""
    clock, keys = Clock(), [filled.add_key("acme", **ME)]
    filled.add("globex", **ME)
    keys.append(filled.add_key("globex", **ME))
    monkeypatch.setattr(store_module, "monotonic", clock)
    assert filled.current().tenant_of(keys[0]) == "acme"

    def gone(*_):
        raise SQLAlchemyError("gone")

    monkeypatch.setattr(schema, "read_state", gone)
    for _ in range(3):
        clock.now += 5
        policy = filled.current()
        assert policy.tenant_of(keys[0]) == "acme" and policy.forget_of("acme") == {"hp": 1.0}
        for key in (keys[1], "uf-nobody's"):
            with pytest.raises(PolicyError, match="cannot be reached"):
                policy.tenant_of(key)
        with pytest.raises(PolicyError, match="cannot be reached"):
            policy.forget_of("globex")
    clock.now += 30
    with pytest.raises(PolicyError, match="nobody is served"):
        filled.current()


def test_writers_of_many_threads(filled, where):
    def change(n):
        try:
            for round_ in range(4):
                filled.add(f"t{n}-{round_}", **ME)
                filled.forget("acme", "hp", n + 1, **ME)
                filled.forget(f"t{n}-{round_}", "news", 1, **ME)
                keys[n].append(filled.add_key("acme", **ME))
        except Exception as error:
            failures.append(error)

    start, keys, failures = len(filled.history()), {n: [] for n in range(8)}, []
    threads = [threading.Thread(target=change, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    policy = filled.current()
    assert {policy.tenant_of(key) for mine in keys.values() for key in mine} == {"acme"}
    assert len(policy.tenants) == 33 and len(policy.tenants["acme"].keys) == 32
    assert len(assert_whole(where)) == start + 8 * 4 * 4, "no change was lost"


def change_much(where, name, rounds, told):
    """Change the store, in a process of its own, and note in the file `told` what was confirmed."""
    engines.PATIENCE = 120  # four writers without a pause, on a busy machine
    store = PolicyStore(where, create=True)
    with told.open("w", buffering=1) as stream:
        for n in range(rounds):
            tenant = f"{name}-{n}"
            stream.write(f"{store.add(tenant, who=name)}\n")
            stream.write(f"{store.adapter(f'own-{name}', f'/srv/{n}', None, who=name)}\n")
            stream.write(f"{store.forget(tenant, f'own-{name}', 1 + n % 16, who=name)}\n")
            stream.write(f"{store.add_key(tenant, who=name)}\n")
            if n % 3:
                stream.write(f"{store.remove(f'{name}-{n - 1}', who=name)}\n")
            time.sleep(random.uniform(0, 0.02))


def changing(where, name, rounds, told):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "hypothesis", "unlearn_peft.serve.policy.store"]
    )  # imported once, not by each
    child = context.Process(target=change_much, args=(where, name, rounds, told))
    child.start()
    return child


def test_writers_of_many_processes(where, tmp_path):
    """They also make the store, all at once."""
    children = {f"p{n}": changing(where, f"p{n}", 6, tmp_path / f"p{n}") for n in range(4)}
    for name, child in children.items():
        child.join(120)
        assert child.exitcode == 0, (tmp_path / name).read_text()
    assert len(assert_whole(where)) == 4 * (6 * 4 + 4)


@pytest.mark.long
def test_a_writer_that_is_killed_leaves_the_store_whole(where, tmp_path):
    """kill -9 at random moments, 24 times, four writers at once: what was confirmed is there, and nothing is half."""
    confirmed = 0
    for round_ in range(6):
        names = [f"r{round_}c{n}" for n in range(4)]
        children = {name: changing(where, name, 10_000, tmp_path / name) for name in names}
        for name, child in children.items():
            while not (tmp_path / name).exists() or "\n" not in (tmp_path / name).read_text():
                assert child.is_alive()
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.15))
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        history = assert_whole(where)
        for name in names:
            told = [line.strip() for line in (tmp_path / name).read_text().splitlines(True) if line.endswith("\n")]
            made = [change for change in reversed(history) if change.who == name]
            assert len(told) <= len(made) <= len(told) + 1, "each confirmed change, and at most one more"
            for result, change in zip(told, made, strict=False):
                if result.startswith("uf-"):
                    assert change.action == "key" and change.what["key"] == key_digest(result)[:12]
                else:
                    assert change.revision == int(result)
            confirmed += len(told)
    assert confirmed >= 24
    after = PolicyStore(where)
    after.add("still-works", **ME)
    after.close()


class Clock:
    def __init__(self):
        self.now = time.monotonic()

    def __call__(self):
        return self.now


def assert_fails_closed(store, monkeypatch, caplog, cut, mend):
    """The last policy serves while the grace lasts, then nobody is served; when it is mended, all go on."""
    clock = Clock()
    monkeypatch.setattr(store_module, "monotonic", clock)
    clock.now += 5
    last = store.current()
    cut()
    for _ in range(10):
        clock.now += 2.9
        assert store.current() == last and "cannot be reached" in store.problem
    clock.now += 2
    for _ in range(3):
        with pytest.raises(PolicyError, match="no policy in the last 30 s: nobody is served"):
            store.current()
    with pytest.raises(PolicyError, match="did not confirm the change|cannot be reached"):
        store.add("x", **ME)
    mend()
    clock.now += 2
    assert store.current() == last and store.problem is None
    assert caplog.text.count("cannot be reached") == 1, "logged once"
    store.add("x", **ME)
    assert "x" in store.current().tenants


def test_a_file_that_is_gone_fails_closed(tmp_path, monkeypatch, caplog):
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    store.add("acme", **ME)
    aside = tmp_path / "aside"
    aside.mkdir()

    def move(source, target):
        for file in source.glob("tenants.db*"):
            file.rename(target / file.name)

    assert_fails_closed(store, monkeypatch, caplog, lambda: move(tmp_path, aside), lambda: move(aside, tmp_path))
    store.close()


@pytest.mark.postgres
def test_a_server_that_crashes_fails_closed(postgres, monkeypatch, caplog):
    where = postgres.new_database()
    store = PolicyStore(where, create=True)
    for n in range(5):
        store.add(f"t{n}", **ME)
    assert_fails_closed(store, monkeypatch, caplog, lambda: postgres.stop(signal.SIGQUIT), postgres.start)
    assert len(assert_whole(where)) == 6
    store.close()


@pytest.mark.postgres
def test_a_connection_that_the_server_has_ended_is_noticed_after_idling(postgres, monkeypatch):
    store = PolicyStore(postgres.new_database(), create=True)
    store.add("t0", **ME)
    end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    for idle, noticed in ((0, True), (999, False)):
        monkeypatch.setattr(engines, "_IDLE", idle)
        assert list(store.current().tenants) == ["t0"] and store.problem is None
        other = engines.open_engine(str(store._engine.url), create=False)
        with other.connect() as connection:
            connection.exec_driver_sql(f"{end_all} AND datname = current_database()")
        engines.close(other)
        monkeypatch.setattr(store_module, "_RETRY", 0)
        store.current()
        assert (store.problem is None) == noticed
    assert store.current() and store.problem is None
    store.close()


@pytest.mark.postgres
def test_look_ups_are_planned_once(postgres):
    """psycopg prepares what it has executed five times, and forgets it with a rollback."""
    store = PolicyStore(postgres.new_database(), create=True)
    keys = []
    for n in range(8):
        store.add(f"t{n}", **ME)
        keys.append(store.add_key(f"t{n}", **ME))
    assert [store.current().tenant_of(key) for key in keys] == [f"t{n}" for n in range(8)]
    with store._engine.connect() as connection:
        prepared = list(connection.exec_driver_sql("SELECT statement FROM pg_prepared_statements").scalars())
    assert any("unlearn_keys.digest = " in statement for statement in prepared), prepared
    store.close()


def test_a_database_that_hangs_fails_closed(filled, monkeypatch):
    """One thread waits for it and holds the lock; all others are answered."""
    clock = Clock()
    monkeypatch.setattr(store_module, "monotonic", clock)
    monkeypatch.setattr(store_module, "PATIENCE", 0.05)
    last = filled.current()
    with filled._lock:
        clock.now += 20
        assert filled.current() == last and "does not answer" in filled.problem
        clock.now += 20
        with pytest.raises(PolicyError, match="nobody is served"):
            filled.current()
    assert filled.current() == last and filled.problem is None


def test_a_file_that_is_put_into_the_place_of_another(tmp_path):
    store, other = (PolicyStore(tmp_path / name, create=True) for name in ("tenants.db", "backup.db"))
    store.add("new", **ME)
    other.add("old", **ME)
    other.close()
    os.replace(tmp_path / "backup.db", tmp_path / "tenants.db")
    for rest in tmp_path.glob("tenants.db-*"):
        rest.unlink()
    assert list(store.current().tenants) == ["old"]
    store.close()


def test_how_sqlite_is_set(tmp_path):
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    with store._engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    store.close()


def test_what_is_no_store(tmp_path, where):
    (tmp_path / "text.db").write_text("no database " * 1000)
    (tmp_path / "empty.db").touch()
    (tmp_path / "short.db").write_text("x")  # SQLite would take it for an empty database, and write into it
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE x (y)").connection.close()
    newer = PolicyStore(where, create=True)
    with newer._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE unlearn_state SET schema_version = 7")
    newer.close()
    told = {
        tmp_path / "none.db": "no store at",
        tmp_path / "text.db": "text.db is no store",
        tmp_path / "short.db": "short.db is no store",
        tmp_path / "empty.db": "empty.db is no store",
        tmp_path / "other.db": "holds no store",
        where: "has schema version 7, expected at most 6: update",
        "sqlite://": "would be lost",
        "postgresql://ann:geheim@127.0.0.1:1/x": "cannot open the store postgresql+psycopg://127.0.0.1:1/x: conn",
        "postgresql://ann:geheim@h:port/x": "the store's URL is not understood",
        "nonesuch://ann:geheim@h/x": "the store's URL is not understood",
    }
    for place, words in told.items():
        with pytest.raises(PolicyError) as error:
            PolicyStore(place)
        assert words in str(error.value) and "geheim" not in str(error.value)
    assert not (tmp_path / "none.db").exists() and (tmp_path / "short.db").read_text() == "x"
    assert not (tmp_path / "empty.db").read_bytes()
    with pytest.raises(PolicyError, match="cannot make the store"):
        PolicyStore(tmp_path / "no" / "folder.db", create=True)


@pytest.fixture
def tenant(monkeypatch, capsys, tmp_path):
    """Run `unlearn-peft tenant` inside this process; returns exit code, stdout, stderr."""
    from unlearn_peft import cli

    monkeypatch.setenv("UNLEARN_PEFT_STORE", str(tmp_path / "tenants.db"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", "tenant", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out = capsys.readouterr()
        return done.value.code or 0, out.out, out.err

    return call


def test_the_command_line(tenant, tiny, make_adapter, tmp_path):
    from unlearn_peft import read_bundle

    def done(*arguments):
        code, out, err = tenant(*arguments)
        assert code == 0, err
        return out

    def refused(told, *arguments):
        code, _, err = tenant(*arguments)
        assert code == 2 and told in err and err.count("error: ") == 1 and "Traceback" not in err

    refused("no store at", "list")
    adapter = make_adapter(tiny, "hp")
    digest = read_bundle(adapter).identity
    refused("no adapter at", "adapter", "hp", tmp_path / "none")
    refused(f"has the sha256 {digest}", "adapter", "hp", adapter, "--sha256", "0" * 64)
    assert digest in done("adapter", "hp", adapter, "--sha256", digest.upper(), "--why", "trained today")
    assert json.loads(done("add", "acme", "--who", "ann", "--json")) == {"done": "tenant 'acme' added", "revision": 2}
    done("forget", "acme", "hp=0.5")
    refused("the strength 'x' is no number", "forget", "acme", "hp=x")
    refused("the strength is -1", "forget", "acme", "hp=-1")
    refused("did you mean 'hp'?", "forget", "acme", "hpp")
    key = done("key", "acme").strip()
    made = json.loads(done("key", "acme", "--json"))
    assert made["key"].startswith("uf-") and key_digest(made["key"]) == made["sha256"]
    source = open_policy(str(tmp_path / "tenants.db"))
    assert source.current().tenant_of(key) == source.current().tenant_of(made["key"]) == "acme"
    entry = {"path": str(adapter), "sha256": digest, "probes": None, "canary": None}
    assert source.current().adapters["hp"].model_dump() == entry
    done("key", "acme", "--revoke", made["sha256"][:10], "--why", "leaked")
    refused("0 keys of tenant", "key", "acme", "--revoke", made["key"])
    shown = json.loads(done("show", "acme", "--json"))
    assert shown == {"tenant": "acme", "forget": {"hp": 0.5}, "keys": [key_digest(key)[:12]]}
    assert "tenant acme forgets hp=0.5" in done("show", "acme")
    refused("did you mean 'acme'?", "show", "acne")
    refused("the strength 'x' is no number", "allow", "acme", "hp=x")
    assert "requests of tenant 'acme' may add 'hp' up to strength 1.5" in done("allow", "acme", "hp=1.5")
    assert json.loads(done("show", "acme", "--json"))["may_add"] == {"hp": 1.5}
    assert "its requests may add hp=1.5 at most" in done("show", "acme") and "; may add hp=1.5;" in done("list")
    assert "may_add" in done("export") and "may no longer add 'hp'" in done("disallow", "acme", "hp")
    assert "may_add" not in done("export")
    listed = json.loads(done("list", "--json"))
    assert listed["tenants"] == {"acme": {"forget": {"hp": 0.5}, "keys": [key_digest(key)[:12]]}}
    assert f"adapter hp: {adapter} ({digest})" in done("list")
    done("export", "--output", tmp_path / "policy.yaml")
    assert done("export") == (tmp_path / "policy.yaml").read_text()
    done("unforget", "acme", "hp")
    done("unadapter", "hp")
    done("remove", "acme", "--why", "gone")
    assert done("list") == ""
    done("import", tmp_path / "policy.yaml", "--store", tmp_path / "second.db")
    assert PolicyStore(tmp_path / "second.db").read_all() == read_policy(tmp_path / "policy.yaml")
    refused("cannot read the policy", "import", tmp_path / "none.yaml")
    changes = [json.loads(line) for line in done("history", "--json").splitlines()]
    assert len(changes) == 11 and changes[0]["why"] == "gone" and changes[0]["who"] == getpass.getuser()
    assert changes[-2]["who"] == "ann" and changes[-1]["what"]["sha256"] == digest
    assert len(done("history", "--limit", 1).splitlines()) == 1
    text = done("history")
    assert "acme" in text and key not in text and made["key"] not in text


def test_what_a_database_holds_steers_no_terminal(tenant, tmp_path):
    assert tenant("add", "acme")[0] == tenant("key", "acme")[0] == 0
    assert tenant("quota", "acme", "--requests", "5/minute")[0] == 0
    with closing(sqlite3.connect(tmp_path / "tenants.db")) as database:
        database.execute("UPDATE unlearn_keys SET used = 'never' || char(27) || '[2J' || char(10) || 'tenant evil'")
        database.execute("""UPDATE unlearn_tenants SET quotas = '{"requests": "5\\u001b[2J\\u202e"}' """)
        database.commit()
    code, out, _ = tenant("show", "acme")
    assert (
        code == 0 and "never\\u001b[2J\\u000atenant evil" in out and "5\\u001b[2J\\u202e" in out and "\x1b" not in out
    )


def test_help_teaches_and_stays_light(tenant):
    code = "import sys, unlearn_peft.cli; print([m for m in ('sqlalchemy', 'pydantic', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    for command in ("", "add", "remove", "list", "show", "forget", "unforget", "adapter", "unadapter", "key", "trust",
                    "untrust", "history", "import", "export"):  # fmt: skip
        code, shown, _ = tenant(*command.split(), "--help")
        assert code == 0 and f"unlearn-peft tenant {command}" in shown, f"an example for {command}"
