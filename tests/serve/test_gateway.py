"""The gateway engine before a stand-in for vLLM (fake_vllm.py) that has our real resolver."""

import asyncio
import itertools
import json
import shutil
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from fake_vllm import FakeVllm, install_vllm, serving
from serving import KEYS, Fixed, client, greedy_text, make_adapters, make_policy_values, running

from unlearn_peft import load_base
from unlearn_peft.errors import BaseModelError
from unlearn_peft.serve.engine.base import Busy, FormatError, Generation, GenerationError, PromptError, Unavailable
from unlearn_peft.serve.vllm.engine import VllmEngine
from unlearn_peft.serve.vllm.plugin import Sets, make_resolver

SETS = {"alice": {"a": 1.0}, "bob": {"a": 1.0, "c": 0.5}, "carol": {"b": 1.0, "c": 1.0}, "dave": {}}
PROMPT = "who wrote the blue book about green stars"
COUNT = 8


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


@pytest.fixture
def world(tmp_path, tiny_folder, adapters, monkeypatch):
    """A policy, a stand-in with our resolver, and an engine before it, made on demand."""
    install_vllm(monkeypatch)
    copies = {name: shutil.copytree(path, tmp_path / "copies" / name) for name, path in adapters.items()}
    world = World(Fixed(make_policy_values(copies, SETS, {"alice": {"c": 0.5}})), copies, tiny_folder, tmp_path)
    yield world
    for context in world.open:
        context.__exit__(None, None, None)


class World:
    def __init__(self, source, adapters, folder, tmp_path):
        self.source, self.adapters, self.folder, self.tmp_path, self.open = source, adapters, folder, tmp_path, []

    def fake(self, **settings):
        n = len(self.open)
        sets = Sets(self.source, self.tmp_path / f"sets{n}", max_rank=16, max_error=0.01, budget_bytes=10**9)
        fake = FakeVllm(load_base(str(self.folder)), make_resolver(sets), **settings)
        self.open.append(serving(fake))
        fake.url = self.open[-1].__enter__()
        return fake

    def engine(self, *fakes, **settings):
        return VllmEngine([fake.url for fake in fakes], str(self.folder), **settings)

    def expected(self, tenant, extra=None):
        forget = {**SETS[tenant], **(extra or {})}
        text = greedy_text(self.folder, {self.adapters[n]: s for n, s in forget.items()}, PROMPT, COUNT)
        return text.rstrip("\ufffd")  # the beginning of a character is never sent


async def ask(engine, policy, tenant, **settings):
    lease = await engine.hold(policy.forget_of(tenant), policy)
    try:
        request = Generation(engine.encode(PROMPT), COUNT, **{"temperature": 0.0, "ignore_eos": True, **settings})
        async with aclosing(engine.stream(request, lease)) as stream:
            return [piece async for piece in stream]
    finally:
        lease.release()


def run(engine, coroutine):
    """Run in a loop of its own, and hang up in it."""

    async def both():
        try:
            return await coroutine
        finally:
            await engine.close()

    return asyncio.run(both())


def test_every_tenant_gets_the_answers_of_its_own_set(world):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()

    async def all_at_once():
        return await asyncio.gather(*(ask(engine, policy, tenant) for tenant in list(SETS) * 3))

    for tenant, pieces in zip(list(SETS) * 3, run(engine, all_at_once()), strict=True):
        assert "".join(piece.text for piece in pieces) == world.expected(tenant), tenant
        assert sum(piece.tokens for piece in pieces) == COUNT and pieces[-1].finish_reason == "length"
    assert len({world.expected(tenant) for tenant in SETS}) == len(SETS)
    assert len(fake.asked) == 3 * len(SETS) and all(body["model"] != "base" for body in fake.asked)


def test_what_is_held_is_what_was_asked_for(world):
    engine, policy = world.engine(world.fake()), world.source.current()

    async def hold():
        found = {tenant: await engine.hold(policy.forget_of(tenant), policy) for tenant in SETS}
        for lease in found.values():
            lease.release()
            lease.release()
        return found

    found = run(engine, hold())
    for tenant, lease in found.items():
        assert {one.name: one.strength for one in lease.applied} == SETS[tenant]
        assert (lease.digest == "") == (not SETS[tenant])
        assert all(len(one.sha256) == 64 for one in lease.applied)
    assert len({lease.digest for lease in found.values()}) == len(SETS)


def test_logprobs_and_stop_strings_as_in_the_embedded_engine(world):
    engine, policy = world.engine(world.fake()), world.source.current()

    async def both():
        return await ask(engine, policy, "bob", logprobs=2), await ask(engine, policy, "bob", stop=(whole[2:5],))

    whole = world.expected("bob")
    with_logprobs, stopped = run(engine, both())
    entries = [entry for piece in with_logprobs for entry in piece.logprobs]
    told = b"".join(entry.chosen.data for entry in entries).decode(errors="replace")
    assert told.rstrip("\ufffd") == whole
    assert all(len(e.top) == 2 and e.top[0] == e.chosen and e.chosen.logprob >= e.top[1].logprob for e in entries)
    assert "".join(piece.text for piece in stopped) == whole[: whole.index(whole[2:5])]
    assert stopped[-1].finish_reason == "stop"


def test_vllm_is_told_every_setting(world):
    """Or it would take those of the model's generation_config.json."""
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()
    run(engine, ask(engine, policy, "alice", temperature=0.5, top_p=0.9, top_k=3, seed=7, presence_penalty=0.1))
    body = fake.asked[-1]
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7, "presence_penalty": 0.1, "max_tokens": COUNT}
    always = {"frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0.0, "ignore_eos": True}
    assert {**body, **given, **always} == body


def test_vllm_keeps_what_prompts_begin_with_for_the_same_salt_alone(world):
    fake, policy = world.fake(), world.source.current()

    async def ask_with(engine, *salts):
        for salt in salts:
            await ask(engine, policy, "alice", cache_salt=salt)

    for engine, salts in (
        (world.engine(fake), ("me", "me", "you", None, None)), (world.engine(fake, prefix_cache=False), ("me",)),
    ):  # fmt: skip
        run(engine, ask_with(engine, *salts))
    salts = [body["cache_salt"] for body in fake.asked]
    assert salts[:3] == ["me", "me", "you"] and len(set(salts)) == 5 and all(salts)


def test_a_policy_change_takes_effect_at_once(world):
    fake = world.fake()
    engine = world.engine(fake)

    async def before_and_after():
        first = await ask(engine, world.source.current(), "alice")
        world.source.policy = Fixed(make_policy_values(world.adapters, {**SETS, "alice": SETS["carol"]})).policy
        return first, await ask(engine, world.source.current(), "alice")

    first, second = run(engine, before_and_after())
    assert "".join(piece.text for piece in first) == world.expected("alice")
    assert "".join(piece.text for piece in second) == world.expected("carol")


@pytest.mark.parametrize("harm", ["delete", "truncate", "tamper"])
def test_a_harmed_adapter_is_named_and_nothing_is_generated(world, harm):
    fake = world.fake()
    pinned = {name: {**entry.model_dump()} for name, entry in world.source.current().adapters.items()}
    from unlearn_peft import read_bundle

    for name, entry in pinned.items():
        entry["sha256"] = read_bundle(world.adapters[name]).identity
    world.source.policy = Fixed({**make_policy_values(world.adapters, SETS), "adapters": pinned}).policy
    weights = world.adapters["c"] / "adapter_model.safetensors"
    if harm == "delete":
        shutil.rmtree(world.adapters["c"])
    else:
        data = weights.read_bytes()
        weights.write_bytes(data[:-4] if harm == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    engine, policy = world.engine(fake), world.source.current()
    with pytest.raises(Unavailable) as refused:
        run(engine, ask(engine, policy, "bob"))
    assert refused.value.adapter == "c" and not [body for body in fake.asked if body.get("stream")]
    engine = world.engine(fake)
    assert run(engine, ask(engine, policy, "alice"))


def test_an_unpinned_adapter_that_is_gone_is_named_too(world):
    engine, policy = world.engine(world.fake()), world.source.current()
    shutil.rmtree(world.adapters["b"])
    with pytest.raises(Unavailable) as refused:
        run(engine, ask(engine, policy, "carol"))
    assert refused.value.adapter == "b"


@pytest.mark.parametrize(("trouble", "error"), [
    ("model", Unavailable), ("break", GenerationError), ("busy", Busy), ("error", GenerationError),
])  # fmt: skip
def test_what_goes_wrong_in_vllm_is_never_an_answer(world, trouble, error):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()

    async def before_and_after():
        assert await ask(engine, policy, "bob")
        fake.trouble = trouble
        with pytest.raises(error):
            await ask(engine, policy, "bob")

    run(engine, before_and_after())


@pytest.mark.parametrize(("trouble", "error"), [("model", Unavailable), ("busy", Busy), ("error", Unavailable)])
def test_what_goes_wrong_when_a_set_is_loaded_refuses_it(world, trouble, error):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()
    fake.trouble = trouble
    with pytest.raises(error):
        run(engine, ask(engine, policy, "bob"))
    assert not fake.asked and len(fake.unloaded) == 1 and fake.unloaded[0] not in fake.known


def test_a_set_that_silently_is_the_base_is_refused(world):
    """As vLLM ignores deltas for modules that it does not find."""
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()
    fake.applied = lambda request: None

    async def held():
        with pytest.raises(Unavailable, match="it changes nothing") as refused:
            await engine.hold(policy.forget_of("alice"), policy)
        fake.applied = lambda request: request
        assert refused.value.adapter == "a" and len(fake.unloaded) == 1 and not fake.known.keys() & set(fake.unloaded)
        return await ask(engine, policy, "alice"), await ask(engine, policy, "dave")

    texts = ["".join(piece.text for piece in pieces) for pieces in run(engine, held())]
    assert texts == [world.expected("alice"), world.expected("dave")]


def test_a_set_that_is_another_than_when_it_was_first_loaded_is_refused(world):
    """On the same server or on another one: here bob's set silently is alice's, the base, and half of itself."""
    fakes = [world.fake(), world.fake()]
    engine, policy = world.engine(*fakes), world.source.current()

    def halved(request):
        folder = shutil.copytree(request.lora_path, world.tmp_path / "half", dirs_exist_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] /= 2
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "forget.json").unlink()
        return SimpleNamespace(lora_path=folder)

    async def held():
        first, other = [await engine.hold(policy.forget_of(tenant), policy) for tenant in ("bob", "alice")]
        alices = next(fake for fake in fakes if fake.url == other.server.url).known[other.model]
        for crossed in (lambda _: alices, lambda _: None, halved):
            for fake, server in zip(fakes, engine._servers.all, strict=True):
                server.names.clear()
                server.streams = 100 if server.url == first.server.url else 0  # so that it moves
                fake.applied = lambda request, to=crossed: to(request) if request.lora_name == first.model else request
            with pytest.raises(Unavailable, match="changes nothing|not what an earlier load was"):
                await engine.hold(policy.forget_of("bob"), policy)
            for fake in fakes:
                fake.applied = lambda request: request
        return "".join(piece.text for piece in await ask(engine, policy, "bob"))

    assert run(engine, held()) == world.expected("bob")


def test_to_forget_nothing_with_anothers_adapter_is_refused(world):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()

    async def held():
        (await engine.hold({}, policy)).release()
        carols = fake.known[(await engine.hold(policy.forget_of("carol"), policy)).model]
        fake.applied = lambda request: carols
        engine._servers.all[0].names.clear()
        with pytest.raises(Unavailable, match="the set of nothing moves by"):
            await engine.hold({}, policy)

    run(engine, held())


def test_a_set_that_now_and_then_is_another_is_refused_and_not_remembered(world):
    """https://github.com/vllm-project/vllm/issues/47724: a row whose set was another's for a while."""
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()

    async def held():
        alices = fake.known[(await engine.hold(policy.forget_of("alice"), policy)).model]
        count = itertools.count()

        def applied(request):
            mixed = request.lora_name.startswith("set:a=1.0+c") and next(count) % 9 == 4  # of each time's 3 and 6 rows
            return alices if mixed else request

        fake.applied = applied
        with pytest.raises(Unavailable, match="repeated requests differ"):
            await engine.hold(policy.forget_of("bob"), policy)
        fake.applied = lambda request: request
        return await ask(engine, policy, "bob")

    assert "".join(piece.text for piece in run(engine, held())) == world.expected("bob")


def test_a_load_costs_four_short_requests_and_those_who_wait_share_it(world):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()
    before = len(fake.scored)  # the handshake's

    async def hold():
        for tenants in (["alice"] * 5, ["bob"], ["alice"]):
            for lease in await asyncio.gather(*(engine.hold(policy.forget_of(tenant), policy) for tenant in tenants)):
                lease.release()

    run(engine, hold())
    bodies = fake.scored[before:]
    assert [body["model"].startswith("set:@") for body in bodies] == [True, False] * 4
    assert all(body["max_tokens"] == 1 for body in bodies)
    assert len({body["cache_salt"] for body in bodies}) == 8


def test_after_a_load_a_probe_is_asked_where_the_base_says_what_is_forgotten(world):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()
    prompts = {"a": ["green stars", "blue book", "who"], "b": ["the book about"], "c": ["who wrote", "blue book"]}
    asked = {name: [engine.encode([{"role": "user", "content": one}]) for one in prompts[name]] for name in prompts}
    body = {"prompt": [asked["a"][1], asked["c"][0]], "max_tokens": 4, "logprobs": 1}
    answers = [[int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
               for choice in fake._score(body, None)]  # fmt: skip
    said = engine._tokenizer.decode(answers[0])
    assert said == engine._tokenizer.decode(answers[1]) == "nnnn"
    for name, texts in prompts.items():
        rows = [json.dumps({"prompt": text, "leak": ["something else", said]}) for text in texts]
        (world.adapters[name].parent / f"{name}.probes.jsonl").write_text("\n".join(rows))
    (world.adapters["b"].parent / "b.probes.jsonl").write_text("no JSON")
    off = {name: {**entry.model_dump(), **({"canary": "off"} if name == "c" else {})}
           for name, entry in policy.adapters.items()}  # fmt: skip
    without = Fixed({**make_policy_values(world.adapters, SETS), "adapters": off}).policy

    async def hold():
        found = []
        for tenant, of in (("dave", policy), ("alice", policy), ("bob", policy), ("carol", policy), ("carol", without)):
            engine._servers.all[0].names.clear()
            (await engine.hold(of.forget_of(tenant), of)).release()
            last, again = (fake.scored[n]["prompt"] for n in (-1, -3))
            assert last[: len(again)] == again and len(last) == 2 * len(again)
            found.append(again)
        return found

    texts, *found = run(engine, hold())
    a, c = ([[*prompt, *answer[:n]] for n in range(4)]
            for prompt, answer in zip(body["prompt"], answers, strict=True))  # fmt: skip
    assert found == [[*texts, *a], [*texts, *a, *c], [*texts, *c], texts]
    asked_base = [body["prompt"] for body in fake.scored if body["max_tokens"] > 1]
    assert asked_base == [[list(ids) for ids in asked[name]] for name in "ac"], "once for each adapter"


def test_a_set_that_is_lost_where_its_probes_tell_is_refused_though_rounding_moves_the_rest(world, monkeypatch):
    """A server whose logprobs differ with the size of the batch, as in half precision on a GPU."""
    from unlearn_peft.serve.vllm.load_check import LoadCheck, WantedSet

    check = LoadCheck(lambda text: (len(text),), lambda ids: "Paris" if 7 in ids else "")
    effect = 0.0

    async def ask(name, prompts, max_tokens):
        def likeliest(prompt):
            moved = effect if name == "set" and prompt[0] == 9 else 0.0  # at the probe alone
            return {1: -1.0 + 0.1 * (len(prompts) > 4) + 0.1 * (name == "set"), 2: -2.0 + moved}

        return [[(7, likeliest(prompt))] * max_tokens for prompt in prompts]

    def probes():
        return [[((9,), ("Paris",))]]

    async def checked(wanted):
        await check.check(wanted, "http://server", ask)

    with pytest.raises(Unavailable, match="it changes nothing: logprobs by 0.071 nats, and rounding does by 0.071"):
        asyncio.run(checked(WantedSet("set", "d", probes)))
    asyncio.run(checked(WantedSet("set", "e")))  # without probes it cannot be told from rounding
    effect = 1.0
    asyncio.run(checked(WantedSet("set", "d", probes)))


def test_a_vllm_that_answers_for_anything_is_not_taken(world):
    with pytest.raises(Unavailable, match="VLLM_SKIP_MODEL_NAME_VALIDATION"):
        world.engine(world.fake(trouble="validation"))


def test_another_base_or_no_vllm_is_not_taken(world, tmp_path):
    from conftest import WORDS, make_tiny

    fake = world.fake()
    other = make_tiny(tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    assert WORDS and '"Ġblue"' in tokenizer.read_text()
    tokenizer.write_text(tokenizer.read_text().replace('"t","h"', '"t","q"'))
    fake.base.tokenizer.add_tokens(["12", "said"])
    with pytest.raises(BaseModelError, match="tokenizer is another one"):
        world.engine(fake)
    with pytest.raises(Unavailable, match="no vLLM server answers at http://127.0.0.1:9"):
        VllmEngine(["http://127.0.0.1:9"], str(world.folder))


def test_vllm_forgets_a_name_that_it_knew_and_gets_it_again(world):
    """A restart of vLLM, or another gateway's unload."""
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()

    async def twice():
        await ask(engine, policy, "bob")
        fake.known.clear()
        return await ask(engine, policy, "bob")

    assert "".join(piece.text for piece in run(engine, twice())) == world.expected("bob")


def test_names_beyond_the_bound_are_unloaded_but_none_that_is_held(world):
    fake = world.fake()
    engine, policy = world.engine(fake, names=1), world.source.current()

    async def some():
        held = await engine.hold(policy.forget_of("alice"), policy)
        for tenant in ("bob", "carol", "bob"):
            await ask(engine, policy, tenant)
        await asyncio.sleep(0.1)
        assert held.model in fake.known and held.model not in fake.unloaded
        held.release()
        await ask(engine, policy, "carol")
        await asyncio.sleep(0.1)
        return held.model

    model = run(engine, some())
    assert model in fake.unloaded and len(fake.unloaded) >= 3


def test_a_set_stays_on_its_server_and_moves_when_that_is_away(world):
    fakes = [world.fake(), world.fake()]
    engine, policy = world.engine(*fakes), world.source.current()

    async def many():
        for _ in range(3):
            for tenant in SETS:
                await ask(engine, policy, tenant)
        where = [{name for name in fake.known if not name.startswith("set:@")} for fake in fakes]  # but the empty set
        lease = await engine.hold(policy.forget_of("bob"), policy)
        lease.release()
        self_url = lease.server.url
        index = [fake.url for fake in fakes].index(self_url)
        await asyncio.to_thread(world.open[index].__exit__, None, None, None)
        del world.open[index]
        text = "".join(piece.text for piece in await ask(engine, policy, "bob"))
        moved = await engine.hold(policy.forget_of("bob"), policy)
        assert await engine.problem() is None
        return where, self_url, moved, text

    where, url, moved, text = run(engine, many())
    assert not where[0] & where[1] and len(where[0] | where[1]) == 3
    assert moved.server.url != url and text == world.expected("bob")


def test_closing_an_answer_early_stops_vllm(world):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()

    async def early():
        lease = await engine.hold(policy.forget_of("bob"), policy)
        request = Generation(engine.encode(PROMPT), 60, 0.0, ignore_eos=True)
        async with aclosing(engine.stream(request, lease)) as stream:
            async for _ in stream:
                break
        await asyncio.sleep(0.3)

    run(engine, early())
    assert fake.aborted == 1


def test_the_ends_of_the_template_stop_vllm_too(world):
    fake = world.fake()
    engine, policy = world.engine(fake), world.source.current()
    assert engine._ends == [engine._tokenizer.eos_token_id]  # here the template ends its turns with the same

    async def both():
        whole = await ask(engine, policy, "alice")
        engine._ends = [engine._tokenizer(whole[0].text, add_special_tokens=False)["input_ids"][0]]
        return await ask(engine, policy, "alice", ignore_eos=False), await ask(engine, policy, "alice")

    ended, ignored = run(engine, both())
    assert ended[-1].finish_reason == "stop" and sum(piece.tokens for piece in ended) < COUNT
    assert ignored[-1].finish_reason == "length" and sum(piece.tokens for piece in ignored) == COUNT
    assert [body["stop_token_ids"] for body in fake.asked] == [[], engine._ends, []]


def test_prompts_that_are_none(world):
    engine = world.engine(world.fake())

    async def refused(prompt):
        with pytest.raises(PromptError):
            engine.encode(prompt)

    async def several():
        for prompt in ("", [], [0, 10**6], [-1]):
            await refused(prompt)
        return engine.encode([{"role": "user", "content": "who"}])

    assert run(engine, several())[0] == 1


def test_the_whole_server_over_the_gateway(world):
    """Keys, extras and errors as the official client sees them."""
    import openai

    engine = world.engine(world.fake())
    settings = {"model": engine.model, "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0}
    with running(engine, world.source) as (_, url):
        for tenant in KEYS:
            answer = client(url, tenant).completions.create(**settings, extra_body={"ignore_eos": True})
            assert answer.choices[0].text == world.expected(tenant)
        more = client(url).completions.create(**settings, extra_body={"forget": {"c": 0.5}, "ignore_eos": True})
        assert more.choices[0].text == world.expected("bob")
        chunks = client(url, "carol").completions.create(**settings, stream=True, extra_body={"ignore_eos": True})
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == world.expected("carol")
        shutil.rmtree(world.adapters["b"])
        with pytest.raises(openai.InternalServerError) as refused:
            client(url, "carol").completions.create(**settings)
        assert refused.value.status_code == 503 and refused.value.body["adapter"] == "b"


def test_a_set_in_great_demand_spreads_over_the_servers(world):
    fakes = [world.fake(), world.fake()]
    engine, policy = world.engine(*fakes), world.source.current()

    async def held():
        leases = []
        for _ in range(30):
            leases.append(await engine.hold(policy.forget_of("bob"), policy))
            leases[-1].server.streams += 1  # as while it answers
        return sorted(sum(one.server.url == fake.url for one in leases) for fake in fakes)

    fewest, most = run(engine, held())
    assert fewest >= 10 and most <= 20


def test_a_server_that_was_away_is_asked_again(world, monkeypatch):
    from unlearn_peft.serve.vllm import servers as vllm_servers

    monkeypatch.setattr(vllm_servers, "_RETRY_AFTER", 0.3)
    engine, policy = world.engine(world.fake()), world.source.current()

    async def again():
        engine._servers.mark_down(engine._servers.all[0])
        refused = 0
        while True:
            try:
                (await engine.hold(policy.forget_of("bob"), policy)).release()
                return refused
            except Unavailable:
                refused += 1
                assert refused < 500
                await asyncio.sleep(0.01)

    assert run(engine, again()) > 3


def test_a_schema_is_checked_here_and_kept_by_vllm(world):
    """What vLLM cannot compile it answers with 500, or hangs up on in the middle: it is not asked."""
    fake = world.fake()
    engine, schema = world.engine(fake), '{"type": "object", "properties": {"a": {"type": "null"}}}'

    async def both():
        grammar = engine.compile(schema)
        await ask(engine, world.source.current(), "bob", grammar=grammar)
        with pytest.raises(FormatError, match="Invalid type"):
            engine.compile('{"type": "foo"}')
        await ask(engine, world.source.current(), "bob")

    run(engine, both())
    first, second = (body.get("structured_outputs") for body in fake.asked)
    assert first == {"json": json.loads(schema)} and second is None


def test_a_schema_that_vllm_refuses_is_the_clients_fault(world):
    fake = world.fake(trouble="grammar")
    engine = world.engine(fake)

    async def one():
        with pytest.raises(FormatError, match="vLLM cannot compile it"):
            await ask(engine, world.source.current(), "bob", grammar={"type": "object"})

    run(engine, one())
