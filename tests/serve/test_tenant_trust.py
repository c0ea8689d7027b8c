"""Trusted keys of a tenant's own: in policies and stores, in the server, through the gateway, inside vLLM."""

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
import sys
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import yaml
from fake_vllm import FakeVllm, install_vllm, serving
from serving import Fixed, client, make_adapters, make_policy_values, running

from unlearn_peft import cli, load_base
from unlearn_peft.adapters.signing import new_key, sign
from unlearn_peft.adapters.transform.export_vllm import export_vllm
from unlearn_peft.adapters.trust import SIGNATURE, Trust
from unlearn_peft.errors import AdapterError, PolicyError, TrustError
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.policy import schema
from unlearn_peft.serve.policy.policy import make_policy
from unlearn_peft.serve.policy.store import PolicyStore
from unlearn_peft.serve.policy.yaml_file import PolicyFile, dump_policy, parse_policy
from unlearn_peft.serve.vllm.engine import VllmEngine
from unlearn_peft.serve.vllm.lora_cache import digest_of
from unlearn_peft.serve.vllm.plugin import Sets, make_resolver

ME = {"who": "tester"}
OLD_STORE = Path(__file__).parents[1] / "fixtures" / "store_v1.sql"
SETS = {"alice": ["a"], "bob": ["b"], "carol": ["c"], "dave": ["a", "b"]}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: new_key(folder / name) for name in ("alice", "bob")}


@pytest.fixture(scope="module")
def pems(keys):
    return {name: public.read_text() for name, (_, public) in keys.items()}


@pytest.fixture
def adapters(tmp_path, tiny_folder, keys):
    """`a` signed by alice, `b` by bob, `c` by nobody."""
    made = make_adapters(tmp_path / "adapters", tiny_folder)
    for adapter, signer in (("a", "alice"), ("b", "bob")):
        sign(made[adapter], keys[signer][0])
    return made


def trusting(adapters, **trusted):
    """A policy as YAML has it; tenants that are named trust these keys."""
    values = make_policy_values(adapters, SETS, {"alice": ["b", "c"]})
    for tenant, pems in trusted.items():
        values["tenants"][tenant]["trusted_keys"] = pems
    return values


def ask(url, tenant, forget=()):
    extra = {"ignore_eos": True, **({"forget": list(forget)} if forget else {})}
    answer = client(url, tenant).completions.create(
        model="tiny", prompt="who wrote the blue book", max_tokens=4, temperature=0, extra_body=extra
    )
    return answer.choices[0].text


def refused(url, tenant, adapter, forget=()):
    with pytest.raises(openai.InternalServerError) as told:
        ask(url, tenant, forget)
    assert (told.value.status_code, told.value.body["adapter"]) == (503, adapter)


# ---- the server, and the gateway before a stand-in for vLLM ----


@contextmanager
def served(kind, folder, tmp_path, policy, **settings):
    """A server of either kind; `policy` is a mapping or a source."""
    source = policy if hasattr(policy, "current") else Fixed(policy)
    if kind == "local":
        engine = LocalEngine(load_base(str(folder), device="cpu"), name="tiny", trust=settings.pop("trust", None))
        with running(engine, source, **settings) as (handler, url):
            yield handler, url
        return
    with pytest.MonkeyPatch.context() as patch:
        install_vllm(patch)
        sets = Sets(source, tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=10**9)
        with serving(FakeVllm(load_base(str(folder)), make_resolver(sets))) as where:
            engine = VllmEngine([where], str(folder), name="tiny", trust=settings.pop("trust", None))
            with running(engine, source, **settings) as (handler, url):
                yield handler, url


@pytest.fixture(params=["local", "vllm"])
def kind(request):
    return request.param


def test_each_tenant_gets_adapters_that_its_own_keys_signed(kind, adapters, pems, tiny_folder, tmp_path):
    alice, bob = ({name: pems[name]} for name in ("alice", "bob"))
    values = trusting(adapters, alice=alice, bob=alice, carol=bob, dave={"ann": pems["alice"], "rob": pems["bob"]})
    log = tmp_path / "audit.jsonl"
    with served(kind, tiny_folder, tmp_path, values, audit=AuditLog(log)) as (handler, url):
        assert ask(url, "alice") and ask(url, "dave")
        refused(url, "bob", "b")  # signed, by another
        refused(url, "carol", "c")  # not signed
        refused(url, "alice", "b", forget=["b"])  # what a request adds itself
        refused(url, "alice", "c", forget=["c"])
        assert ask(url, "dave", forget=["a"]) and handler.active == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    admitted = [{one["name"]: one["signed_by"] for one in x["adapters"]} for x in lines if x["event"] == "admitted"]
    assert admitted == [{"a": "alice"}, {"a": "ann", "b": "rob"}, {"a": "ann", "b": "rob"}]


def test_a_tenant_without_keys_is_served_as_before(kind, adapters, pems, tiny_folder, tmp_path):
    with served(kind, tiny_folder, tmp_path, trusting(adapters, alice={"bob": pems["bob"]})) as (_, url):
        refused(url, "alice", "a")
        assert ask(url, "bob") and ask(url, "carol") and ask(url, "dave")


def test_keys_of_the_server_and_of_a_tenant_must_both_hold(kind, adapters, keys, pems, tiny_folder, tmp_path):
    values = trusting(adapters, alice={"mine": pems["alice"]}, bob={"mine": pems["bob"]})
    with served(kind, tiny_folder, tmp_path, values, trust=Trust.read(keys["alice"][1])) as (_, url):
        assert ask(url, "alice")
        refused(url, "bob", "b")  # bob's tenant trusts bob, the server does not
        refused(url, "carol", "c")


def test_the_servers_keys_change_while_serving(kind, adapters, keys, tiny_folder, tmp_path):
    """What is in memory, and was signed by a key that is trusted no longer, is refused from the next request on."""
    alice, bob = (Trust.read(keys[name][1]) for name in ("alice", "bob"))
    with served(kind, tiny_folder, tmp_path, trusting(adapters), trust=alice) as (handler, url):
        assert ask(url, "alice")
        refused(url, "bob", "b")
        handler.engine.set_trust(bob)
        refused(url, "alice", "a")
        assert ask(url, "bob")
        handler.engine.set_trust(Trust.read(keys["alice"][1], keys["bob"][1]))
        assert ask(url, "alice") and ask(url, "bob") and ask(url, "dave")
        refused(url, "carol", "c")


def test_trusted_keys_are_read_again_or_stay(keys, tmp_path, caplog):
    from types import SimpleNamespace

    from unlearn_peft.cli.serve import _read_trust_anew

    caplog.set_level("INFO")
    folder, given = tmp_path / "keys", []
    folder.mkdir()
    engine = SimpleNamespace(set_trust=given.append)
    _read_trust_anew(engine, [folder], True)
    assert given == [] and "trusted keys stay as they were: no public key in" in caplog.text
    shutil.copy(keys["alice"][1], folder / "alice.pub")
    _read_trust_anew(engine, [folder], True)
    assert list(given[0].signers) == ["alice"] and given[0].required and "trusted keys: alice" in caplog.text


def test_the_policy_changes_while_serving(kind, adapters, pems, tiny_folder, tmp_path):
    path = tmp_path / "policy.yaml"

    def write(**trusted):
        (tmp_path / "new").write_text(yaml.safe_dump(trusting(adapters, **trusted)))
        os.replace(tmp_path / "new", path)

    write()
    with served(kind, tiny_folder, tmp_path, PolicyFile(path)) as (_, url):
        before = ask(url, "alice")
        write(alice={"bob": pems["bob"]})
        refused(url, "alice", "a")
        assert ask(url, "dave")  # another tenant has the same adapter, and asks for nothing
        write(alice={"bob": pems["bob"], "alice": pems["alice"]})
        assert ask(url, "alice") == before


def test_an_adapter_that_is_signed_at_last_is_served(kind, adapters, keys, pems, tiny_folder, tmp_path):
    with served(kind, tiny_folder, tmp_path, trusting(adapters, carol={"alice": pems["alice"]})) as (_, url):
        refused(url, "carol", "c")
        sign(adapters["c"], keys["bob"][0])
        refused(url, "carol", "c")
        sign(adapters["c"], keys["alice"][0])
        for _ in range(2):  # the refusal before may have been of the one in memory
            try:
                assert ask(url, "carol")
                break
            except openai.InternalServerError:
                pass
        assert ask(url, "carol")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", SIGNATURE])
def test_a_flipped_byte_is_refused_through_the_gateway(name, adapters, pems, tiny_folder, tmp_path):
    """The embedded engine has its adapter in memory; vLLM reads files again, and so does the gateway."""
    with served("vllm", tiny_folder, tmp_path, trusting(adapters, alice={"alice": pems["alice"]})) as (_, url):
        assert ask(url, "alice")
        data = bytearray((adapters["a"] / name).read_bytes())
        data[len(data) // 2] ^= 1
        (adapters["a"] / name).write_bytes(data)
        refused(url, "alice", "a")


def test_an_engine_that_does_not_look_is_found_out(adapters, pems, tiny_folder, tmp_path):
    """The handler looks once more at who is said to have signed."""
    with served("local", tiny_folder, tmp_path, trusting(adapters, carol={"alice": pems["alice"]})) as (handler, url):
        hold = handler.engine.hold
        handler.engine.hold = lambda forget, policy, trust=None, added=(): hold(forget, policy)
        refused(url, "carol", "c")
        assert ask(url, "bob")


# ---- inside vLLM, and export ----


@pytest.fixture
def environment(monkeypatch, tmp_path, adapters):
    install_vllm(monkeypatch)
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(make_policy_values(adapters, SETS)))
    monkeypatch.setenv("UNLEARN_PEFT_POLICY", str(tmp_path / "policy.yaml"))
    monkeypatch.setenv("UNLEARN_PEFT_SETS", str(tmp_path / "sets"))
    return monkeypatch


def resolved(sets, policy, base, *tenants):
    """Which tenants' sets the resolver gives."""
    names = {tenant: f"tenant:{tenant}@{digest_of(policy.forget_of(tenant), policy)}" for tenant in tenants}
    resolver = make_resolver(sets)
    return [tenant for tenant in tenants if asyncio.run(resolver.resolve_lora(str(base), names[tenant]))]


def test_the_resolver_takes_keys_from_the_environment(environment, adapters, keys, tiny_folder, tmp_path):
    policy = PolicyFile(tmp_path / "policy.yaml").current()
    who = ("alice", "bob", "carol", "dave")
    assert resolved(Sets.from_environment(), policy, tiny_folder, *who) == list(who), "all are in the cache now"
    environment.setenv("UNLEARN_PEFT_TRUSTED_KEYS", str(keys["alice"][1]))
    assert resolved(Sets.from_environment(), policy, tiny_folder, *who) == ["alice", "carol"]
    environment.setenv("UNLEARN_PEFT_REQUIRE_SIGNATURE", "1")
    assert resolved(Sets.from_environment(), policy, tiny_folder, *who) == ["alice"]
    environment.setenv("UNLEARN_PEFT_TRUSTED_KEYS", os.pathsep.join(str(public) for _, public in keys.values()))
    assert resolved(Sets.from_environment(), policy, tiny_folder, *who) == ["alice", "bob", "dave"]
    environment.delenv("UNLEARN_PEFT_TRUSTED_KEYS")
    with pytest.raises(TrustError, match="nobody is trusted"):
        Sets.from_environment()
    environment.setenv("UNLEARN_PEFT_REQUIRE_SIGNATURE", "perhaps")
    with pytest.raises(PolicyError, match="'perhaps', expected 1 or 0"):
        Sets.from_environment()


def test_the_resolver_holds_to_a_tenants_keys(environment, adapters, pems, tiny_folder, tmp_path):
    source = Fixed(trusting(adapters, alice={"bob": pems["bob"]}, bob={"bob": pems["bob"]}))
    sets = Sets(source, tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=10**9)
    assert resolved(sets, source.current(), tiny_folder, "alice", "bob", "carol") == ["bob", "carol"]


def test_export_asks_for_signatures(adapters, keys, tmp_path, monkeypatch, capsys, tiny_folder):
    trust = Trust.read(keys["alice"][1])
    assert export_vllm([adapters["a"]], tmp_path / "one", trust=trust).path.is_dir()
    with pytest.raises(AdapterError, match="by none of the trusted keys") as told:
        export_vllm([adapters["a"], adapters["b"], adapters["c"]], tmp_path / "two", trust=trust)
    assert "has no signature" in str(told.value) and not (tmp_path / "two").exists()
    for name, code in (("a", 0), ("b", 2)):
        command = ["export", adapters[name], "--base", tiny_folder, "--output", tmp_path / "three"]
        need = ["--require-signature", "--trusted-keys", keys["alice"][1]]
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", *map(str, [*command, *need])])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert (done.value.code or 0) == code, capsys.readouterr().err


# ---- policies and stores ----


def test_a_policy_says_what_is_no_key(pems, keys, adapters):
    from cryptography.hazmat.primitives import serialization as write
    from cryptography.hazmat.primitives.asymmetric import ed25519

    how = write.Encoding.PEM, write.PublicFormat.SubjectPublicKeyInfo
    wrong = {
        "expected a public key or more": {},
        "itself and not its file's name": {"alice": "keys/alice.pub"},
        "'tenants.alice.trusted_keys.alice': this is a private key": {"alice": keys["alice"][0].read_text()},
        "'tenants.alice.trusted_keys.alice': expected one public key": {"alice": pems["alice"] + pems["bob"]},
        "holds no public key": {"alice": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"},
        "another kind of key": {"alice": ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*how).decode()},
        "'a b' is no name": {"a b": pems["alice"]},
        "expected text": {"alice": 3},
        "expected a mapping": [pems["alice"]],
    }
    for told, trusted in wrong.items():
        with pytest.raises(PolicyError) as error:
            make_policy(trusting(adapters, alice=trusted), "test")
        assert told in str(error.value) and "BEGIN PRIVATE" not in str(error.value)


def test_a_policy_reads_back_from_its_yaml(pems, adapters, tmp_path):
    policy = make_policy(trusting(adapters, alice=pems, bob={"x": pems["bob"].replace("\n", "\r\n")}), "test")
    text = dump_policy(policy)
    assert "alice: |\n" in text and "trusted_keys: null" not in text
    again = parse_policy(text.encode(), "x", tmp_path)
    assert again == policy and again.version == policy.version
    assert policy.tenants["bob"].trusted_keys == {"x": pems["bob"]}, "written in one form"
    assert policy.trust_of("alice") is again.trust_of("alice") and policy.trust_of("carol") is None
    others = [trusting(adapters), trusting(adapters, alice={"alice": pems["alice"]})]
    assert len({policy.version, *(make_policy(values, "x").version for values in others)}) == 3
    with pytest.raises(PolicyError, match="unknown tenant"):
        policy.trust_of("nobody")


def test_without_the_library_those_who_trust_keys_are_refused_and_others_served(
    kind, adapters, pems, tiny_folder, tmp_path, monkeypatch, caplog
):
    import unlearn_peft.adapters.trust as trust
    import unlearn_peft.serve.policy.policy as policy
    from unlearn_peft.serve.policy import entries

    for cached in (entries._check_public_key, policy._trust, trust._signed_by):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with served(kind, tiny_folder, tmp_path, trusting(adapters, alice={"alice": pems["alice"]})) as (_, url):
        refused(url, "alice", "a")
        assert ask(url, "bob") and "pip install 'unlearn-peft[trust]'" in caplog.text


def test_changes_of_a_store_and_their_history(pems, tmp_path):
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    store.add("acme", **ME)
    marks = {name: hashlib.sha256(pem.encode()).hexdigest()[:12] for name, pem in pems.items()}
    store.trust("acme", {"alice": pems["alice"]}, **ME)
    store.trust("acme", {"bob": pems["bob"]}, **ME)
    assert store.current().tenants["acme"].trusted_keys == pems
    wrong = {
        "trusts another key called 'alice'": lambda: store.trust("acme", {"alice": pems["bob"]}, **ME),
        "trusts no key called 'bop' (did you mean 'bob'?)": lambda: store.untrust("acme", "bop", **ME),
        "no tenant 'acne'": lambda: store.trust("acne", pems, **ME),
        "'a/b' is no name": lambda: store.trust("acme", {"a/b": pems["bob"]}, **ME),
    }
    for told, change in wrong.items():
        with pytest.raises(PolicyError) as error:
            change()
        assert told in str(error.value)
    store.untrust("acme", "alice", **ME)
    assert store.current().tenants["acme"].trusted_keys == {"bob": pems["bob"]}
    with pytest.raises(PolicyError, match="the last key that tenant 'acme' trusts"):
        store.untrust("acme", "bob", **ME)
    whole = store.read_all()
    store.untrust("acme", None, **ME)
    assert store.current().tenants["acme"].trusted_keys is None
    with pytest.raises(PolicyError, match="has no trusted keys"):
        store.untrust("acme", None, **ME)
    store.replace(whole, **ME)
    assert store.read_all() == whole
    store.remove("acme", **ME)
    entry = {"forget": {}, "keys": [], "trusted_keys": {"bob": marks["bob"]}}
    assert [(change.action, change.what) for change in reversed(store.history())][1:] == [
        ("trust", {"tenant": "acme", "trusted_keys": {"alice": marks["alice"]}}),
        ("trust", {"tenant": "acme", "trusted_keys": {"bob": marks["bob"]}}),
        ("untrust", {"tenant": "acme", "trusted_keys": {"alice": marks["alice"]}, "all": False}),
        ("untrust", {"tenant": "acme", "trusted_keys": {"bob": marks["bob"]}, "all": True}),
        ("import", {"adapters": {}, "tenants": {"acme": entry}}),
        ("remove", {"tenant": "acme", **entry}),
    ]  # fmt: skip
    store.close()


def test_a_store_of_the_version_before_is_read_and_brought_up_to_date(pems, tmp_path):
    """The tables as an early version wrote them: they are served as they are, and the first change adds what is new."""
    where = tmp_path / "tenants.db"
    with sqlite3.connect(where) as old:
        old.executescript(OLD_STORE.read_text())

    def version():
        return sqlite3.connect(where).execute("SELECT schema_version FROM unlearn_state").fetchone()[0]

    store, serving_ = PolicyStore(where), PolicyStore(where)
    policy = serving_.current()
    assert policy.forget_of("acme") == {"hp": 0.5} and policy.tenant_of("uf-key-of-alice") == "acme"
    assert policy.trust_of("acme") is None and len(store.history()) == 6
    assert version() == 1
    store.forget("globex", "news", **ME)
    assert version() == schema.SCHEMA_VERSION == 6
    assert serving_.current().forget_of("globex") == {"news": 1.0}
    indexes = {row[0] for row in sqlite3.connect(where).execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert {"unlearn_keys_tenant", "unlearn_forgets_adapter"} <= indexes, "or a change looks at every row"
    store.trust("acme", {"alice": pems["alice"]}, **ME)
    assert serving_.current().tenants["acme"].trusted_keys == {"alice": pems["alice"]}
    assert serving_.current().forget_of("acme") == {"hp": 0.5}
    store.allow("acme", "news", 2.0, **ME)
    assert serving_.current().forget_of("acme", {"news": 1.5}) == {"hp": 0.5, "news": 1.5}
    store.trust("globex", pems, **ME)
    with sqlite3.connect(where) as newer:
        newer.execute("UPDATE unlearn_state SET schema_version = 7, revision = revision + 1, token = 'x'")
    with pytest.raises(PolicyError, match="schema version 7, expected at most 6: update"):
        serving_.current()  # it cannot tell what the newer tables ask for
    for one in (store, serving_):
        one.close()


def test_the_commands(keys, pems, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("UNLEARN_PEFT_STORE", str(tmp_path / "tenants.db"))

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", "tenant", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out = capsys.readouterr()
        assert (done.value.code or 0) == code, out.err
        return out.err if code else out.out

    folder = tmp_path / "public"
    folder.mkdir()
    for name, (_, public) in keys.items():
        shutil.copy(public, folder / f"{name}.pub")
    run("add", "acme")
    assert "trusts alice, bob" in run("trust", "acme", folder, "--why", "contract 12")
    (tmp_path / "ci.yaml").write_text("ci: {identity: ci@example.org, issuer: https://x.org}\n")
    assert "identity of Sigstore" in run("trust", "acme", tmp_path / "ci.yaml", code=2)
    assert "holds a private key" in run("trust", "acme", keys["alice"][0], code=2)
    mark = hashlib.sha256(pems["bob"].encode()).hexdigest()[:12]
    assert f"trusts bob ({mark}...)" in run("show", "acme")
    assert json.loads(run("show", "acme", "--json"))["trusted_keys"]["bob"] == mark
    assert "no longer trusts 'alice'" in run("untrust", "acme", "alice")
    assert "which key?" in run("untrust", "acme", code=2) and "which key?" in run(
        "untrust", "acme", "bob", "--all", code=2
    )
    assert "the last key" in run("untrust", "acme", "bob", code=2)
    run("export", "--output", tmp_path / "policy.yaml")
    assert "asks for no signatures" in run("untrust", "acme", "--all")
    run("import", tmp_path / "policy.yaml")
    assert f"trusts bob ({mark}...)" in run("show", "acme")
    assert "contract 12" in run("history") and "PUBLIC KEY" not in run("history")
    assert "unlearn-peft tenant trust" in run("trust", "--help") and "tenant untrust" in run("untrust", "--help")
