"""What prompts begin with is read once: for one tenant, one exact set, and the same answers as without."""

import random
from types import SimpleNamespace

import pytest
import torch
from serving import by_peft, client, greedy, make_adapters, make_policy_values, running, wait_for
from test_prefill import FAMILIES, assert_same, make_lora, make_model, runs

from unlearn_peft import load_base
from unlearn_peft.inference.bank import Bank
from unlearn_peft.inference.model_runner import ModelRunner
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.engine.prefill import Prefill
from unlearn_peft.serve.engine.prefix_cache import BLOCK, Owner, PrefixCache
from unlearn_peft.serve.policy.policy import make_policy


@pytest.fixture
def run(tiny):
    with runs(tiny.tokenizer) as make:
        yield make


def some_ids(count, seed=0):
    return random.Random(seed).choices(range(5, 290), k=count)


def read(one, ids, forget=(), salt="me", **settings):
    """Answer a prompt; returns its entries and how many tokens ran through the layers for it."""
    before = len(one.tokens)
    entries = one.result(one.submit(ids, forget, cache_salt=salt, **settings))
    return entries, sum(one.tokens[before:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_request_with_1000_shared_tokens_costs_a_tenth_and_gets_the_same_answer(run, family, tmp_path):
    torch.manual_seed(0)
    model = make_model(family, 1200)
    adapters = {} if family == "gpt2" else {"a": make_lora(model, tmp_path / "a", 1)}
    one, plain = run(model, adapters), run(model, adapters)
    system, costs = some_ids(1000), []
    for n, tail in enumerate((20, 30, 40)):
        ids = system + some_ids(tail, 1 + n)
        found, cost = read(one, ids, [*adapters], max_tokens=4)
        assert_same(found, read(plain, ids, [*adapters], None, max_tokens=4)[0])
        costs.append(cost)
    assert costs[0] == 1023 and max(costs[1:]) <= costs[0] / 10
    assert one.scheduler.reused == 2 * (1000 // BLOCK * BLOCK) and plain.scheduler.prefixes.bytes == 0


def test_nothing_is_shared_between_sets_versions_strengths_and_tenants(run, tmp_path):
    model, ids = make_model("llama"), some_ids(100)
    adapters = {name: make_lora(model, tmp_path / name, seed) for seed, name in enumerate("abc")}
    one, plain = run(model, adapters), run(model, adapters)
    asked = [({}, "me"), ({"a": 1.0}, "me"), ({"a": 0.5}, "me"), ({"b": 1.0}, "me"), ({"a": 1.0, "b": 1.0}, "me"),
             ({"a": 1.0}, "you"), ({"a": 1.0}, None)]  # fmt: skip
    for forget, salt in asked:
        found, cost = read(one, ids, forget, salt)
        assert cost == len(ids) + 5, "read whole"
        assert_same(found, read(plain, ids, forget, None)[0])
    one.bank.swap("a", adapters["c"])  # another version under the same name
    found, cost = read(one, ids, {"a": 1.0})
    assert cost == len(ids) + 5
    assert_same(found, read(plain, ids, {"c": 1.0}, None)[0])
    for forget, salt in asked[1:-1]:
        found, cost = read(one, ids, forget, salt)
        assert cost < len(ids) / 3 or "a" in forget
    assert read(one, ids, {"a": 1.0}, None)[1] == len(ids) + 5, "nothing is kept where nothing may be"


def test_answers_to_prompts_that_begin_alike_are_those_of_plain_peft(run, tiny_folder, tmp_path):
    """Many rows at once, of several tenants and sets, whose prompts share beginnings of all lengths."""
    adapters = make_adapters(tmp_path, tiny_folder)
    base = load_base(str(tiny_folder), "float32", "cpu")
    one, rng = run(base.model, adapters, max_batch=4, prefill_tokens=48), random.Random(1)
    sets = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "c": 0.5}]
    whole, rows = some_ids(160, 9), []
    for n in range(32):
        ids = whole[: rng.randrange(1, 160)] + some_ids(rng.randrange(1, 20), 100 + n)
        forget = sets[rng.randrange(len(sets))]
        rows.append((ids, forget, one.submit(ids, forget, cache_salt=rng.choice("xy"))))
    models = {repr(s): by_peft(tiny_folder, {adapters[name]: k for name, k in s.items()})[1] for s in sets}
    for ids, forget, row in rows:
        found = [entry.chosen.id for entry in one.result(row)]
        assert found == greedy(models[repr(forget)], ids, 6)[: len(found)]
    assert one.scheduler.reused > 300


# ---- the cache itself ----


@pytest.fixture
def parts():
    """A runner, batches of prompts of it, and caches of their keys and values."""
    model = make_model("llama")
    runner = ModelRunner(model, Bank(model).rows)

    def batch(*prompts):
        return runner.prefill(prompts, [()])[0]

    def cache(blocks):
        made = PrefixCache(runner.token_bytes)
        made.set_limit(blocks * BLOCK * runner.token_bytes)
        return made

    return runner, batch, cache


ME, YOU = Owner("me", frozenset()), Owner("you", frozenset())


def test_keys_and_values_are_those_of_the_prompt(parts):
    _, batch, cache = parts
    kept, ids, other = cache(100), some_ids(3 * BLOCK + 5), some_ids(40, 1)
    both = batch(other, ids)  # padded
    kept.put(ME, ids, both, 1)
    alone, found = batch(ids), kept.find(ME, ids + [7])
    assert found.places == 3 * BLOCK and found.mask.all()
    for layer, want in zip(found.cache.layers, alone.cache.layers, strict=True):
        assert torch.allclose(layer.keys, want.keys[:, :, : 3 * BLOCK], atol=1e-4)
        assert torch.allclose(layer.values, want.values[:, :, : 3 * BLOCK], atol=1e-4)
    assert kept.find(ME, ids[: BLOCK + 9]).places == BLOCK and kept.find(ME, ids, 3 * BLOCK) is None
    assert kept.find(ME, ids[: BLOCK - 1]) is None and kept.find(YOU, ids) is None
    assert kept.find(ME, [1, *ids]) is None and kept.find(ME, [*ids[:BLOCK], 1, *ids[BLOCK + 1 :]]).places == BLOCK


def test_it_keeps_to_its_limit_and_forgets_what_was_used_longest_ago(parts):
    runner, batch, cache = parts
    kept, block = cache(6), BLOCK * runner.token_bytes
    first, second, third = (some_ids(2 * BLOCK, seed) for seed in range(3))
    for ids in (first, second, third):
        kept.put(ME, ids, batch(ids))
    assert kept.bytes == 6 * block
    assert kept.find(ME, first).places == 2 * BLOCK  # used last
    more = first + some_ids(2 * BLOCK, 7)
    kept.put(ME, more, batch(more))
    assert kept.bytes == 6 * block and kept.find(ME, more).places == 4 * BLOCK
    assert kept.find(ME, second) is None and kept.find(ME, third).places == 2 * BLOCK
    kept.set_limit(3 * block + 1)
    assert kept.bytes == 3 * block and kept.find(ME, third).places == 2 * BLOCK and kept.find(ME, more).places == BLOCK
    long = some_ids(9 * BLOCK, 8)
    kept.put(YOU, long, batch(long))
    assert kept.find(YOU, long).places == 3 * BLOCK and kept.find(ME, third) is None, "as far as there is room"
    kept.set_limit(block - 1)
    kept.put(ME, first, batch(first))
    assert kept.bytes == 0 and not kept._roots


def test_any_uses_leave_it_whole(parts):
    runner, batch, cache = parts
    kept, rng = cache(7), random.Random(0)
    one, two = (some_ids(40, seed) for seed in range(2))
    prompts = [a[:32] + b[:32] + c for a in (one, two) for b in (one, two) for c in (one, two)]
    batches = [batch(ids) for ids in prompts]
    for _ in range(400):
        n, owner = rng.randrange(8), rng.choice((ME, YOU))
        match rng.randrange(8):
            case 0:
                kept.set_limit(rng.randrange(9) * BLOCK * runner.token_bytes)
            case 1:
                kept.drop(lambda some, gone=owner: some == gone)
            case 2 | 3 | 4:
                kept.put(owner, prompts[n], batches[n])
            case _:
                found = kept.find(owner, prompts[n])
                want = batches[n].cache.layers[1].values[:, :, : found.places if found else 0]
                assert found is None or torch.equal(found.cache.layers[1].values, want)
        reached, todo = 0, list(kept._roots.values())
        while todo:
            node = todo.pop()
            todo += node.children.values()
            reached += len(node.children)
        assert reached == len(kept._used) and kept.bytes <= kept._limit
        assert all(root.children for root in kept._roots.values())


def test_what_is_not_finite_is_not_kept(parts):
    _, batch, cache = parts
    kept, ids = cache(100), some_ids(2 * BLOCK)
    spoilt = batch(ids)
    spoilt.cache.layers[-1].values[0, 0, BLOCK + 1, 0] = float("nan")
    kept.put(ME, ids, spoilt)
    assert kept.bytes == 0


def test_rows_have_the_memory_first(run):
    model = make_model("llama")
    token_bytes = ModelRunner(model, Bank(model).rows).token_bytes
    one = run(model, kv_bytes=600 * token_bytes)
    read(one, some_ids(250))
    assert one.scheduler.prefixes.bytes == 7 * BLOCK * token_bytes
    keep = one.submit(some_ids(100, 1), max_tokens=400, cache_salt="me")
    keep.pieces.get(timeout=60)
    assert one.scheduler.prefixes.bytes == 3 * BLOCK * token_bytes, "what fits beside 500 tokens"
    assert one.scheduler.kv_used_bytes <= one.scheduler.kv_bytes
    one.scheduler.cancel(keep)


# ---- the server ----

PROMPT = [7 + n % 250 for n in range(100)]


def ask(url, tenant="alice", prompt=PROMPT, **settings):
    settings["extra_body"] = {"ignore_eos": True, **settings.pop("extra", {})}
    answer = client(url, tenant).completions.create(
        model="tiny", prompt=prompt, max_tokens=6, temperature=0, **settings
    )
    return answer.choices[0].text


def test_tenants_do_not_share_and_may_have_nothing_kept(tiny_folder):
    values = make_policy_values({}, {"alice": [], "bob": [], "carol": []})
    values["tenants"]["carol"]["prefix_cache"] = False
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
    with running(engine, values) as (handler, url):
        reused = lambda: engine.stats().prefix_tokens  # noqa: E731
        texts = {ask(url), ask(url, "bob"), ask(url, "carol"), ask(url, "carol")}
        assert reused() == 0
        texts |= {ask(url), ask(url, "bob")}
        assert reused() == 2 * 96 and len(texts) == 1
        for extra, more in (({"cache_salt": "x"}, 0), ({"cache_salt": "x"}, 96), ({"cache_salt": "y"}, 0), ({}, 96)):
            before = reused()
            ask(url, extra=extra)
            assert reused() - before == more
        metrics = handler.metrics.text().decode()
        assert "unlearn_peft_prefix_cache_tokens_total 384.0" in metrics
        assert f"unlearn_peft_kv_bytes {float(engine.scheduler.kv_bytes)!r}" in metrics
        kept = f"unlearn_peft_kv_used_bytes {float(engine.scheduler.prefixes.bytes)!r}"
        wait_for(lambda: kept in handler.metrics.text().decode())  # when the last row has left the batch, too


def test_a_server_without_it(tiny_folder):
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny", prefix_cache=False)
    with running(engine, make_policy_values({}, {"alice": []})) as (_, url):
        assert ask(url) == ask(url) and engine.stats().prefix_tokens == engine.stats().prefix_bytes == 0


def test_what_was_computed_with_an_adapter_goes_with_it(tiny_folder, tmp_path):
    adapters = make_adapters(tmp_path, tiny_folder)
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
    values = make_policy_values(adapters, {"alice": ["a"], "bob": ["b"], "carol": []})
    with running(engine, values) as (handler, url):
        kept = lambda: {part[0] for owner in engine.scheduler.prefixes._roots for part in owner.adapters}  # noqa: E731
        before = {name: ask(url, name) for name in ("alice", "bob", "carol")}
        assert kept() == {"a", "b"} and len(set(before.values())) == 3
        values["adapters"]["a"]["path"] = str(adapters["c"])  # another adapter under the name
        handler.policies.policy = make_policy(values, "test")
        reused = engine.stats().prefix_tokens
        assert ask(url) not in before.values() and engine.stats().prefix_tokens == reused
        assert ask(url, "bob") == before["bob"] and engine.stats().prefix_tokens == reused + 96
        old = [owner for owner in engine.scheduler.prefixes._roots if owner.adapters]
        assert len(old) == 2
        del values["adapters"]["b"], values["tenants"]["bob"]
        handler.policies.policy = make_policy(values, "test")
        ask(url, "carol")
        assert kept() == {"a"}


def test_copying_what_is_known_of_a_prompt_is_charged(monkeypatch):
    times = iter([100.0, 100.5, 200.0, 200.25])
    monkeypatch.setattr("unlearn_peft.serve.engine.prefill.time", SimpleNamespace(monotonic=lambda: next(times)))
    found = [SimpleNamespace(places=64), None]
    prefixes = SimpleNamespace(find=lambda *_: found.pop(0))
    prefill, charged = Prefill(SimpleNamespace(splits=True), prefixes, 256), []
    request = SimpleNamespace(ids=range(100), prefilled=charged.append)
    row = SimpleNamespace(owner="alice", request=request, read=0, batch=None)
    prefill.use_prefix([row])
    assert charged == [0.5] and prefill.reused == row.read == 64
    prefill.use_prefix([row])
    assert charged == [0.5], "nothing more is known"
