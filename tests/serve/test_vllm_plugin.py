"""Sets' names, their cache on disk, and the resolver, with stand-ins for vLLM's classes."""

import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from conftest import logits
from fake_vllm import install_vllm
from hypothesis import given
from hypothesis import strategies as st
from serving import Fixed, make_adapters

from unlearn_peft import forgetting, read_bundle
from unlearn_peft.errors import AdapterError, PolicyError
from unlearn_peft.serve.vllm import plugin as vllm_resolver
from unlearn_peft.serve.vllm.lora_cache import SetCache, digest_of
from unlearn_peft.serve.vllm.lora_names import SetName, parse_set_name, set_digest
from unlearn_peft.serve.vllm.plugin import Sets, make_resolver

WEIGHTS = "adapter_model.safetensors"
DIGEST = "ab" * 32


@pytest.fixture
def adapters(tmp_path, tiny_folder):
    return make_adapters(tmp_path / "adapters", tiny_folder)


@pytest.fixture
def source(adapters):
    return Fixed(values(adapters))


@pytest.fixture
def sets(source, tmp_path):
    return Sets(source, tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=10**9)


@pytest.fixture
def resolver(sets, monkeypatch):
    install_vllm(monkeypatch)
    return make_resolver(sets)


def values(adapters, pinned=True, **forget):
    """A policy that pins its adapters, or not."""
    entries = {
        name: {"path": str(path), **({"sha256": read_bundle(path).identity} if pinned else {})}
        for name, path in adapters.items()
    }
    tenants = {"alice": {"a": 1.0}, "bob": {"a": 1.0, "c": 0.5}, "none": {}, **forget}
    return {"adapters": entries, "tenants": {name: {"forget": set_} for name, set_ in tenants.items()}}


def name_of(source, tenant):
    policy = source.current()
    return f"{tenant}@{digest_of(policy.forget_of(tenant), policy)}"


def asked(resolver, name, base):
    return asyncio.run(resolver.resolve_lora(str(base), name))


NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,9}", fullmatch=True)


@given(forget=st.dictionaries(NAMES, st.floats(1e-300, 1e300), min_size=1, max_size=5))
def test_a_name_says_what_it_means(forget):
    name = SetName(set_digest((n, f) for n, f in forget.items()), None, forget)
    assert parse_set_name(str(name)) == name
    tenant = SetName(DIGEST, "acme", {})
    assert parse_set_name(str(tenant)) == parse_set_name(f"acme@{DIGEST}") == tenant


@pytest.mark.parametrize("name", [
    "acme", "acme@", f"acme@{DIGEST[:-1]}", "set:a=1.0", "set:@", f"set:+@{DIGEST}", f"set:a@{DIGEST}",
    f"set:a=0@{DIGEST}", f"set:a=-1@{DIGEST}", f"set:a=1+a=1@{DIGEST}", f"set:a=1e999@{DIGEST}", f"set:../a=1@{DIGEST}",
    f"set:{'a' * 20_000}=1@{DIGEST}", f"acme@{DIGEST.upper()}", f"set:a=1 @{DIGEST}",
])  # fmt: skip
def test_names_that_are_none(name):
    with pytest.raises(PolicyError):
        parse_set_name(name)


def test_a_digest_is_of_contents_and_strengths_alone():
    assert set_digest([("x", 1), ("y", 0.5)]) == set_digest([("y", 0.5), ("x", 1.0)])
    others = [[("x", 1)], [("x", 0.5), ("y", 1)], [("x", 1), ("y", 0.25)], [("x", 1), ("z", 0.5)]]
    assert len({set_digest(parts) for parts in [*others, [("x", 1), ("y", 0.5)]]}) == 5


def test_a_tenants_name_becomes_its_composed_set(resolver, source, adapters, tiny_folder):
    first = asked(resolver, name_of(source, "bob"), tiny_folder)
    bundle = read_bundle(first.lora_path)
    for module, delta in bundle.deltas.items():
        expected = 0
        for name, factor in (("a", 1.0), ("c", 0.5)):
            if part := read_bundle(adapters[name]).deltas.get(module):
                expected = expected + factor * part.scale * part.up @ part.down
        assert torch.allclose(delta.up @ delta.down, expected, atol=1e-5)
    again = asked(resolver, name_of(source, "bob"), tiny_folder)
    by_set = asked(resolver, str(SetName(name_of(source, "bob").split("@")[1], None, {"c": 0.5, "a": 1})), tiny_folder)
    assert first.lora_path == again.lora_path == by_set.lora_path
    assert first.lora_int_id == again.lora_int_id == by_set.lora_int_id > 0
    other = asked(resolver, name_of(source, "alice"), tiny_folder)
    assert other.lora_int_id != first.lora_int_id < 2**31 and other.lora_path != first.lora_path
    kind, fields = first.__reduce__()
    assert kind.__name__ == "LoRARequest" and fields == (first.lora_name, first.lora_int_id, first.lora_path)


def test_the_empty_set_is_an_adapter_of_zeros(resolver, source, tiny, tiny_folder):
    """And not the bare base: vLLM gives rows without a LoRA another's, on CPUs."""
    found = asked(resolver, name_of(source, "none"), tiny_folder)
    assert found.lora_path == asked(resolver, str(SetName(set_digest([]), None, {})), tiny_folder).lora_path
    assert found.lora_path == asked(resolver, name_of(source, "none"), tiny_folder).lora_path
    bare = logits(tiny)
    with forgetting(tiny, found.lora_path):
        assert torch.equal(logits(tiny), bare)
    (delta,) = read_bundle(found.lora_path).deltas.values()
    assert delta.rank == 1 and not delta.up.any() and not delta.down.any()


def test_whatever_cannot_be_had_exactly_is_nothing(resolver, source, adapters, tiny_folder, caplog):
    good = name_of(source, "alice")
    for name in (
        "alice",
        f"alice@{DIGEST}",
        f"nobody@{DIGEST}",
        f"none@{DIGEST}",
        f"set:@{DIGEST}",
        f"set:zz=1@{DIGEST}",
    ):
        assert asked(resolver, name, tiny_folder) is None
    assert asked(resolver, good, "/no/such/base") is None
    source.policy = PolicyError("the database is away")
    assert asked(resolver, good, tiny_folder) is None
    source.policy = RuntimeError("a bug")
    assert asked(resolver, good, tiny_folder) is None
    assert "the database is away" in caplog.text and "RuntimeError" in caplog.text


def test_a_changed_policy_refuses_the_old_name_even_if_its_set_is_cached(resolver, source, adapters, tiny_folder):
    old = name_of(source, "alice")
    assert asked(resolver, old, tiny_folder)
    source.policy = Fixed(values(adapters, alice={"a": 1.0, "b": 1.0})).policy
    new = name_of(source, "alice")
    assert asked(resolver, old, tiny_folder) is None and asked(resolver, new, tiny_folder)


@pytest.mark.parametrize("pinned", [True, False])
def test_another_version_of_an_adapter_is_another_set(resolver, source, adapters, tiny_folder, pinned, tmp_path):
    source.policy = Fixed(values(adapters, pinned)).policy
    old = name_of(source, "alice")
    first = asked(resolver, old, tiny_folder)
    newer = make_adapters(tmp_path / "newer", tiny_folder, seeds=(9,))["a"]
    shutil.copy(newer / WEIGHTS, adapters["a"] / WEIGHTS)
    if pinned:
        source.policy = Fixed(values(adapters, pinned)).policy
    new = name_of(source, "alice")
    assert new != old and asked(resolver, old, tiny_folder) is None
    second = asked(resolver, new, tiny_folder)
    assert (second.lora_int_id, second.lora_path) != (first.lora_int_id, first.lora_path)


@pytest.mark.parametrize("harm", ["delete", "truncate", "tamper", "replace"])
def test_a_harmed_adapter_is_refused(resolver, source, adapters, tiny_folder, harm):
    name = name_of(source, "bob")
    weights = adapters["c"] / WEIGHTS
    if harm == "delete":
        shutil.rmtree(adapters["c"])
    elif harm == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif harm == "tamper":
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)
    else:
        shutil.copy(adapters["b"] / WEIGHTS, weights)
        shutil.copy(adapters["b"] / "adapter_config.json", adapters["c"] / "adapter_config.json")
    assert asked(resolver, name, tiny_folder) is None
    assert asked(resolver, name_of(source, "alice"), tiny_folder)


@pytest.mark.parametrize("pinned", ["identity", None])
def test_another_config_is_another_set_where_more_than_the_weights_is_pinned(
    resolver, source, adapters, tiny_folder, pinned
):
    """Its lora_alpha scales the effect, down to nothing."""
    source.policy = Fixed(values(adapters, pinned)).policy
    old = name_of(source, "alice")
    config = adapters["a"] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1e-9}))
    assert asked(resolver, old, tiny_folder) is None
    assert (name_of(source, "alice") == old) == (pinned == "identity")


@pytest.mark.parametrize("harm", ["delete", "truncate", "tamper", "manifest"])
def test_a_harmed_cached_set_is_made_again(resolver, source, tiny_folder, harm):
    name = name_of(source, "bob")
    first = asked(resolver, name, tiny_folder)
    folder = os.fspath(first.lora_path)
    weights = os.path.join(folder, WEIGHTS)
    good = open(weights, "rb").read()
    if harm == "delete":
        shutil.rmtree(folder)
    elif harm == "manifest":  # whoever changes the weights may change what is noted of them too
        import hashlib

        bad = good[:-2] + bytes([good[-2] ^ 1, good[-1]])
        open(weights, "wb").write(bad)
        path = os.path.join(folder, "forget.json")
        manifest = json.load(open(path))
        manifest["files"][WEIGHTS] = hashlib.sha256(bad).hexdigest()
        json.dump(manifest, open(path, "w"))
    else:
        open(weights, "wb").write(good[:-9] if harm == "truncate" else good[:-1] + bytes([good[-1] ^ 1]))
    assert asked(resolver, name, tiny_folder).lora_path == first.lora_path
    assert open(weights, "rb").read() == good


def test_a_set_that_loses_too_much_is_refused(source, tmp_path, tiny_folder, monkeypatch):
    install_vllm(monkeypatch)
    small = make_resolver(Sets(source, tmp_path / "small", max_rank=1, max_error=0.01, budget_bytes=10**9))
    assert asked(small, name_of(source, "bob"), tiny_folder) is None
    rough = make_resolver(Sets(source, tmp_path / "rough", max_rank=1, max_error=1.0, budget_bytes=10**9))
    assert asked(rough, name_of(source, "bob"), tiny_folder)


def test_only_what_nobody_uses_is_deleted(source, tmp_path, tiny_folder):
    """vLLM's engine dies if the folder of a set that it knows is gone."""
    policy = source.current()
    one = {"a": 1.0}
    base = str(tiny_folder)
    size = 2 * 10**9
    cache = SetCache(tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=size, grace=0.0)

    class User:
        pass

    user = User()
    used = cache.get(one, policy, digest_of(one, policy), base)
    cache.used_by(used, user)
    cache.budget_bytes = 0
    paths = []
    for strength in (0.1, 0.2, 0.3):
        forget = {"a": strength}
        paths.append(cache.get(forget, policy, digest_of(forget, policy), base))
    assert used.is_dir() and not any(path.is_dir() for path in paths)
    other = SetCache(tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=0, grace=0.0)  # another process's
    other.get({"b": 1.0}, policy, digest_of({"b": 1.0}, policy), base)
    assert used.is_dir()
    del user
    gc.collect()
    cache.get({"a": 0.1}, policy, digest_of({"a": 0.1}, policy), base)
    assert not used.is_dir()


def test_grace_keeps_what_was_just_let_go(source, tmp_path, tiny_folder):
    policy = source.current()
    cache = SetCache(tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=0, grace=3600.0)
    paths = [
        cache.get(forget, policy, digest_of(forget, policy), str(tiny_folder)) for forget in ({"a": 1.0}, {"b": 1.0})
    ]
    assert all(path.is_dir() for path in paths)


def test_many_threads_and_processes_make_a_set_once(source, adapters, tmp_path, tiny_folder):
    policy = source.current()
    forget = {"a": 1.0, "b": 0.5}
    digest, found = digest_of(forget, policy), []
    caches = [SetCache(tmp_path / "sets", max_rank=16, max_error=0.01, budget_bytes=10**9) for _ in range(2)]

    def work(cache):
        path = cache.get(forget, policy, digest, str(tiny_folder))
        found.append((path, path.stat().st_ino))

    threads = [threading.Thread(target=work, args=(caches[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_ids_never_meet(sets, monkeypatch):
    monkeypatch.setattr(vllm_resolver, "_LARGEST_ID", 5)
    digests = [f"{5 * n:016x}" + "0" * 48 for n in range(5)]  # all of them want number 1
    assert [sets._id_of(digest) for digest in digests] == [1, 2, 3, 4, 5]
    assert [sets._id_of(digest) for digest in digests] == [1, 2, 3, 4, 5]


def test_registering_does_nothing_without_a_policy_and_once_with_one(monkeypatch, tmp_path):
    registry = install_vllm(monkeypatch)
    monkeypatch.delenv("UNLEARN_PEFT_POLICY", raising=False)
    vllm_resolver.register()
    assert not registry.resolvers
    monkeypatch.setenv("UNLEARN_PEFT_POLICY", str(tmp_path / "not_there_yet.yaml"))
    monkeypatch.setenv("UNLEARN_PEFT_SETS", str(tmp_path / "sets"))
    vllm_resolver.register()
    first = registry.resolvers["unlearn_peft"]
    vllm_resolver.register()
    assert registry.resolvers == {"unlearn_peft": first} and not (tmp_path / "sets").exists()
    assert asyncio.run(first.resolve_lora("base", f"acme@{DIGEST}")) is None  # no policy: nothing is served
    monkeypatch.setenv("UNLEARN_PEFT_MAX_RANK", "many")
    with pytest.raises(PolicyError, match="UNLEARN_PEFT_MAX_RANK"):
        Sets.from_environment()


def test_the_plugin_is_announced_and_light():
    """Every process of every vLLM imports it, also where it has nothing to do."""
    code = (
        "import sys, unlearn_peft.serve.vllm.plugin as plugin; plugin.register(); "
        "print([m for m in ('torch', 'transformers', 'peft', 'vllm', 'sqlalchemy', 'pydantic') if m in sys.modules])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "UNLEARN_PEFT_POLICY"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "[]"


def test_an_unpinned_adapter_that_is_missing_is_named(source, adapters):
    source.policy = Fixed(values(adapters, pinned=None)).policy
    shutil.rmtree(adapters["c"])
    with pytest.raises(AdapterError) as refused:
        digest_of({"a": 1.0, "c": 1.0}, source.current())
    assert refused.value.adapter == "c"
