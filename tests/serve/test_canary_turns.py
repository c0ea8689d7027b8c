"""Whose rows a canary is asked in: a tenant's sets are checked one at a time, and no other tenant waits for them."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from serving import make_policy_values

from unlearn_peft.inference.adapter_cache import Applied
from unlearn_peft.serve.canary import Canary
from unlearn_peft.serve.engine.base import EngineStats, TextChunk
from unlearn_peft.serve.fair_queue import FairQueue
from unlearn_peft.serve.metrics import Metrics
from unlearn_peft.serve.policy.policy import make_policy
from unlearn_peft.serve.request import Call


class Engine:
    context, chat_ends = 1000, ()

    def __init__(self):
        self.asked, self.gate = list[str](), asyncio.Event()

    def encode(self, prompt):
        return (1,)

    async def hold(self, forget, policy, trust=None, added=()):
        return held(forget)

    async def stream(self, generation, lease):
        self.asked.append(lease.digest)
        await self.gate.wait()
        yield TextChunk("nothing", 1, (), "stop")


def held(forget):
    applied = tuple(Applied(name, name * 64, strength) for name, strength in forget.items())
    return SimpleNamespace(applied=applied, digest=json.dumps(forget) if forget else "", release=lambda: None)


@pytest.fixture
def policy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Who?", "leak": ["Zorblax"]}')
    values = make_policy_values({"a": tmp_path, "b": tmp_path}, {"alice": ["a"], "bob": ["a", "b"]})
    values["adapters"]["a"]["probes"] = str(tmp_path / "a.jsonl")
    return make_policy(values, "test")


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about")


async def nothing(*_, **__):
    pass


def canary_of(engine, rows):
    return Canary(engine, rows, nothing, Metrics(EngineStats), 30)


def check(canary, policy, tenant, forget):
    call = Call(tenant, policy, forget=forget)
    return asyncio.ensure_future(canary.check(call, held(forget), policy.tenants[tenant].forget, ("b",)))


def test_one_tenants_sets_are_checked_one_at_a_time_and_not_for_who_has_gone(policy):
    async def main():
        canary = canary_of(engine := Engine(), FairQueue(100))
        sets = [{"a": 1.0, "b": n / 50} for n in range(1, 30)]
        tasks = [check(canary, policy, "alice", one) for one in sets]
        await until(lambda: engine.asked)
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.gate.set()
        await until(lambda: not canary._running)
        assert set(engine.asked) == {"", '{"a": 1.0}', json.dumps(sets[0])}
        await asyncio.wait_for(check(canary, policy, "alice", sets[1]), 10)

    asyncio.run(main())


def test_nobody_waits_for_a_check_that_another_tenant_began(policy):
    async def main():
        canary = canary_of(engine := Engine(), rows := FairQueue(2, per_tenant=1))
        engine.gate.set()
        await rows.acquire("alice")  # by its own answers
        both = {"a": 1.0, "b": 1.0}
        waits = check(canary, policy, "alice", both)
        await until(lambda: canary._running)
        await asyncio.wait_for(check(canary, policy, "bob", both), 10)
        assert not waits.done()
        rows.release("alice")
        await asyncio.wait_for(waits, 10)

    asyncio.run(main())
