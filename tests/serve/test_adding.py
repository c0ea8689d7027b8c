"""What requests add takes no memory from what tenants must have forgotten."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import client, make_adapters, make_policy_values, running, slow

from unlearn_peft import load_base
from unlearn_peft.adapters.read import count_numbers, read_bundle
from unlearn_peft.inference.bank import Bank
from unlearn_peft.serve.engine.local import LocalEngine

MORE = tuple(f"more{n}" for n in range(4))  # adapters that bob's requests may add


@pytest.fixture
def adapters(tmp_path, tiny_folder):
    """One that alice must have forgotten, and four of its size."""
    own = make_adapters(tmp_path, tiny_folder, seeds=(1,))["a"]
    made = {"own": own}
    for n, name in enumerate(MORE, 1):
        made[name] = shutil.copytree(own, tmp_path / name)
        config = json.loads((own / "adapter_config.json").read_text())
        (made[name] / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8 + n}))
    return made


@pytest.fixture
def served(adapters, tiny_folder):
    """A server with memory for four adapters, and its URL."""
    base = load_base(str(tiny_folder), device="cpu")
    engine = LocalEngine(base, name="tiny", budget_bytes=4 * size_of(adapters["own"]))
    values = make_policy_values(adapters, {"alice": ["own"], "bob": []}, {"bob": list(MORE)})
    with running(engine, values) as (handler, url):
        yield handler, url


def size_of(adapter):
    return 4 * count_numbers(adapter)  # bytes, in float32


def ask(url, tenant, forget=(), count=2):
    extra = {"ignore_eos": True, **({"forget": list(forget)} if forget else {})}
    return client(url, tenant).completions.create(model="tiny", prompt="x", max_tokens=count, extra_body=extra)


def test_a_set_that_cannot_fit_is_refused_unread(served):
    """The old server read as many as fitted, pushed the others' adapters out, and refused then."""
    handler, url = served
    bank = handler.engine.bank
    ask(url, "alice")
    for _ in range(2):
        with pytest.raises(openai.InternalServerError) as refused:
            ask(url, "bob", MORE)
        assert refused.value.status_code == 503 and refused.value.body["adapter"] == MORE[0]
    assert (bank.stats.loads, bank.stats.evictions, bank.stats.resident) == (1, 0, 1)
    for forget in (MORE[:2], MORE[2:], MORE[1:3]):  # half of the memory is for these, one after the other
        ask(url, "bob", forget)
    loads = bank.stats.loads
    ask(url, "alice")
    assert bank.stats.loads == loads and bank.stats.resident == 3, "its adapter is still there"


def test_a_tenant_finds_room_while_another_adds_all_that_it_may(served):
    handler, url = served
    slow(handler, 0.02)
    with ThreadPoolExecutor(2) as pool:
        adding = [pool.submit(ask, url, "bob", forget, 60) for forget in (MORE[:2], MORE[:2])]
        while handler.engine.bank.stats.resident < 2:
            assert not all(job.done() for job in adding)
        with pytest.raises(openai.InternalServerError):
            ask(url, "bob", MORE[2:3])  # these hold the half for additions
        assert ask(url, "alice").choices and not any(job.done() for job in adding)
        assert all(job.result().choices for job in adding)
    ask(url, "bob", MORE[2:])


def test_who_has_no_policy_has_all_of_the_memory(adapters, tiny_folder):
    engine = LocalEngine(
        load_base(str(tiny_folder), device="cpu"), name="tiny", budget_bytes=4 * size_of(adapters["own"])
    )
    values = {**make_policy_values(adapters, {}), "tenants": {"local": {"forget": [], "may_add": list(MORE)}}}
    with running(engine, values, open_tenant="local") as (_, url):
        assert ask(url, "anyone", MORE).choices


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_the_header_promises_is_what_an_adapter_takes(bits, tiny, make_adapter, tmp_path):
    from unlearn_peft.adapters.transform.shrink import shrink

    adapter = make_adapter(tiny, "it")
    if bits:
        adapter = shrink(adapter, tmp_path / "packed", bits=bits).path
    bank = Bank(tiny.model)
    bank.load("it", adapter)
    assert bank.stats.resident_bytes == size_of(adapter) and read_bundle(adapter).deltas
