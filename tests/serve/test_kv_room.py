"""Room for keys and values: who finds none waits for it, takes none from others for ever, and is not forgotten."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serving import client, make_policy_values, running

from unlearn_peft import load_base
from unlearn_peft.errors import BaseModelError
from unlearn_peft.serve.engine import memory
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.fair_queue import FairQueue


async def gets(queue, tenant, size):
    """Whether a place is to be had at once; it is kept."""
    try:
        await asyncio.wait_for(queue.acquire(tenant, size), 0.05)
        return True
    except asyncio.TimeoutError:
        return False


def test_places_together_have_room_each_as_large_as_the_largest():
    async def run():
        queue = FairQueue(8, room=100)
        assert [await gets(queue, "a", 30) for _ in range(4)] == [True, True, True, False]
        assert not await gets(queue, "b", 20), "the others are as long as 30"
        queue.release("a", 30)
        assert not await gets(queue, "b", 40) and await gets(queue, "b", 33)
        for tenant, size in (("a", 30), ("a", 30), ("b", 33)):
            queue.release(tenant, size)
        assert await gets(queue, "b", 100) and not await gets(queue, "a", 1)
        queue.release("b", 100)
        assert not queue._sizes and queue._free == 8

    asyncio.run(run())


def test_a_tenant_that_has_some_leaves_room_for_another():
    async def run():
        queue = FairQueue(8, spare=2, room=100)
        assert [await gets(queue, "a", 30) for _ in range(3)] == [True, True, False]
        assert await gets(queue, "b", 30)

    asyncio.run(run())


def test_who_finds_no_room_is_overtaken_for_a_while_and_then_waited_for():
    async def run():
        queue, overtaken, size = FairQueue(4, room=100), 0, 10
        for _ in range(2):
            await queue.acquire("a", size)
        large = asyncio.create_task(queue.acquire("large", 90))
        await asyncio.sleep(0)
        while not large.done() and await gets(queue, "b", size):  # a steady stream of short ones
            overtaken += 1
            queue.release("b", size)
        assert overtaken == 4 and not large.done(), "as many as there are places"
        small = asyncio.create_task(queue.acquire("c", size))
        for _ in range(2):
            queue.release("a", size)
        await asyncio.wait_for(large, 1)
        assert not small.done()
        queue.release("large", 90)
        await asyncio.wait_for(small, 1)

    asyncio.run(run())


def test_others_go_on_when_who_was_waited_for_goes_away():
    async def run():
        queue = FairQueue(1 << 10, room=100)
        queue._patience = 0
        await queue.acquire("a", 10)
        large = asyncio.create_task(queue.acquire("large", 90))
        await asyncio.sleep(0)
        small = asyncio.create_task(queue.acquire("b", 10))
        await asyncio.sleep(0.02)
        assert not small.done()
        large.cancel()
        await asyncio.wait_for(small, 1)

    asyncio.run(run())


# ---- the server ----


def token_bytes(folder):
    engine = LocalEngine(load_base(str(folder), device="cpu"))
    asyncio.run(engine.close())
    assert engine.kv_tokens >= engine.context == 256 and engine.scheduler.kv_bytes == 8 * 256 * 2 * 2 * 2 * 8 * 4
    return engine.scheduler.kv_bytes // engine.kv_tokens


@pytest.fixture
def serve(tiny_folder):
    size, opened = token_bytes(tiny_folder), []

    def start(kv_tokens):
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny", kv_bytes=kv_tokens * size)
        opened.append(running(engine, make_policy_values({}, {"alice": [], "bob": []})))
        return opened[-1].__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def ask(url, tenant, length, max_tokens, seed=0):
    ids = [5 + (seed * 31 + n) % 200 for n in range(length)]
    answer = client(url, tenant, timeout=120).completions.create(
        model="tiny", prompt=ids, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.usage.completion_tokens


def test_what_can_never_fit_is_refused_unread(serve):
    handler, url = serve(100)
    runner, passes = handler.engine.scheduler._runner, []
    runner.model.register_forward_pre_hook(lambda *_: passes.append(1))
    for length, asked, told in (
        (90, 20, "max_tokens is 20: at most 10 for this prompt. Ask for fewer, or shorten it"),
        (120, 1, "the prompt has 120 tokens: at most 99. Shorten it"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask(url, "alice", length, asked)
        assert error.value.code == "context_length_exceeded" and told in str(error.value)
    assert not passes and ask(url, "alice", 90, 10) == 10
    assert "unlearn_peft_kv_bytes 25600.0" in handler.metrics.text().decode()


def test_rows_under_way_never_take_more_than_there_is(serve):
    """Long and short ones of two tenants, more than have room; all are answered."""
    handler, url = serve(256)
    scheduler, used = handler.engine.scheduler, []
    step = scheduler._runner.step
    scheduler._runner.step = lambda *what: used.append(scheduler.kv_used_bytes) or step(*what)
    asked = [("alice", 180, 40), *[("bob", 20 + n, 20) for n in range(12)], ("alice", 150, 60), ("bob", 200, 50)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda n: ask(url, *asked[n], seed=n), range(len(asked))))
    assert found == [count for _, _, count in asked]
    assert 0.5 * scheduler.kv_bytes < max(used) <= scheduler.kv_bytes
    assert not handler._rows._sizes


def test_a_room_for_nothing_is_refused_and_a_small_one_is_told(tiny_folder, caplog):
    base = load_base(str(tiny_folder), device="cpu")
    with pytest.raises(BaseModelError, match=r"room for 0 tokens, expected 64 or more: give more \(--kv-memory-gb\)"):
        LocalEngine(base, kv_bytes=100)
    engine = LocalEngine(base, kv_bytes=100 * 256)
    asyncio.run(engine.close())
    assert engine.context == 100 and "room for 100 tokens: longer prompts" in caplog.text


def test_the_default_is_at_most_half_of_what_is_free(tiny_folder, tmp_path, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.free_bytes(device)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.free_bytes(device) > whole / 2
    (tmp_path / "memory.max").write_text("201000\n")
    assert memory.free_bytes(device) == 200_000
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"))
    asyncio.run(engine.close())
    assert engine.scheduler.kv_bytes == 100_000 and engine.context == 256
