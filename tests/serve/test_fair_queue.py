"""Tenants get places in turn, however many of one wait."""

import asyncio
import time

import pytest

from unlearn_peft.serve.fair_queue import FairQueue


async def flood(queue, tenants, order):
    """One task for each: takes a place, notes whose it was, and gives it back two steps later."""

    async def one(tenant):
        async with queue.place(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    tasks = []
    for tenant in tenants:
        tasks.append(asyncio.create_task(one(tenant)))
        await asyncio.sleep(0)
    return tasks


def test_waiting_tenants_get_places_in_turn():
    async def run():
        queue, order = FairQueue(1), []
        await queue.acquire("other")
        tasks = await flood(queue, "aaaaaabbc", order)
        queue.release("other")
        await asyncio.gather(*tasks)
        return "".join(order)

    assert asyncio.run(run()) == "abcabaaaa"


def test_one_tenant_cannot_have_all_places():
    async def run():
        queue = FairQueue(3, per_tenant=2)
        for tenant in "aab":
            await asyncio.wait_for(queue.acquire(tenant), 1)
        queue.release("b")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queue.acquire("a"), 0.05)
        await asyncio.wait_for(queue.acquire("b"), 1)
        queue.release("a")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(queue.acquire("a"), queue.acquire("a")), 0.05)

    asyncio.run(run())


@pytest.mark.parametrize("granted", [False, True])
def test_who_goes_away_while_waiting_holds_no_place(granted):
    async def run():
        queue = FairQueue(1)
        await queue.acquire("a")
        gone = asyncio.create_task(queue.acquire("a"))
        await asyncio.sleep(0)
        if granted:  # its place is given, and the task has not seen it yet
            queue.release("a")
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        if not granted:
            queue.release("a")
        for _ in range(2):
            await asyncio.wait_for(queue.acquire("b"), 1)
            queue.release("b")
        assert not queue._waiting and not queue._taken and queue._free == 1

    asyncio.run(run())


def test_the_last_places_are_for_those_that_have_none():
    async def run():
        queue = FairQueue(4, spare=1)
        for tenant in "aab":
            await asyncio.wait_for(queue.acquire(tenant), 1)
        for tenant in "ab":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(queue.acquire(tenant), 0.05)
        await asyncio.wait_for(queue.acquire("c"), 1)
        waiting = [asyncio.create_task(queue.acquire(tenant)) for tenant in "abd"]
        queue.release("a")
        await asyncio.wait_for(waiting[2], 1)
        assert not waiting[0].done() and not waiting[1].done()
        queue.release("b")
        queue.release("c")
        await asyncio.wait(waiting[:2], timeout=1)
        assert sum(task.done() for task in waiting[:2]) == 1, "one place stays free"
        for task in waiting:
            task.cancel()

    asyncio.run(run())


def test_a_share_that_changes_holds_from_the_next_place_on():
    async def run():
        share = 3
        queue = FairQueue(8, share=lambda: share)
        for _ in range(3):
            await asyncio.wait_for(queue.acquire("a"), 1)
        waiting = asyncio.create_task(queue.acquire("a"))
        await asyncio.wait_for(queue.acquire("b"), 1)
        share = 2
        queue.release("a")
        await asyncio.sleep(0.05)
        assert not waiting.done()
        queue.release("a")
        await asyncio.wait_for(waiting, 1)

    asyncio.run(run())


async def seconds_until(queue, tenant):
    began = time.monotonic()
    await asyncio.wait_for(queue.acquire(tenant), 5)
    queue.release(tenant)
    return time.monotonic() - began


def test_who_was_charged_waits_and_holds_no_place():
    async def run():
        queue = FairQueue(1)
        queue.charge("a", 0.2)
        queue.charge("a", 0.2)
        waiting = asyncio.create_task(seconds_until(queue, "a"))
        await asyncio.sleep(0)
        await seconds_until(queue, "b")
        assert not waiting.done() and await waiting > 0.35

    asyncio.run(run())


def test_a_burst_is_not_waited_for():
    async def run():
        queue = FairQueue(1, burst=5)
        took = []
        for _ in range(8):
            took.append(await seconds_until(queue, "a"))
            queue.charge("a", 1)
        assert max(took[:6]) < 0.8 and sum(took) > 0.8

    asyncio.run(run())


def test_nobody_waits_for_tenants_that_are_not_there_or_were_charged_as_much():
    async def run():
        present = {"a"}
        queue = FairQueue(2, present=lambda: present)
        queue.charge("a", 30)
        await seconds_until(queue, "a")
        present.add("b")
        queue.charge("b", 40)
        await seconds_until(queue, "a")  # it was charged less
        waiting = asyncio.create_task(seconds_until(queue, "b"))
        await asyncio.sleep(0.3)
        assert not waiting.done(), "a was charged less"
        present.remove("a")
        await waiting  # now it is alone

    asyncio.run(run())


def test_charges_that_are_over_are_forgotten():
    async def run():
        queue = FairQueue(1)
        for n in range(5000):
            queue.charge(f"address {n}", 0.0)
        assert len(queue._charged) < 2000

    asyncio.run(run())
