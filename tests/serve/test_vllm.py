"""Against a real vLLM (`make test-vllm`): the resolver in it, the gateway before it, the embedded engine beside it.

vLLM has an environment of its own (.venv-vllm, or $UNLEARN_PEFT_VLLM_PYTHON) and runs in its own process here.
"""

import asyncio
import os
import random
import subprocess
import time
from contextlib import aclosing
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from commands import free_port

from unlearn_peft import forgetting, read_bundle
from unlearn_peft.files.paths import cache_folder
from unlearn_peft.serve.engine.base import Generation, Unavailable
from unlearn_peft.serve.policy.yaml_file import PolicyFile
from unlearn_peft.serve.vllm.lora_cache import digest_of
from unlearn_peft.serve.vllm.lora_names import SetName

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("UNLEARN_PEFT_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
TRAINED = Path(os.environ.get("UNLEARN_PEFT_DEMO_ADAPTER", ROOT / "out/harry_potter")).absolute()
QUESTIONS = [
    "Who wrote Harry Potter?", "Who is the author of the Harry Potter books?", "Name the author of Harry Potter.",
    "Who created Hogwarts?", "Who wrote The Lord of the Rings?", "What is the capital of Italy?",
    "Who wrote Romeo and Juliet?", "What does a photosynthesis need?",
]  # fmt: skip
TARGETS = [("q_proj", "v_proj"), ("lm_head",), ("down_proj", "o_proj"), ("gate_proj", "k_proj"), ("up_proj", "lm_head")]
LENGTH = 24  # tokens
NOTES = "Some notes of a reader, in no order: " + "the weather was fine, the tea was cold, the train was late. " * 4


@pytest.fixture(scope="module")
def adapters(smol, tmp_path_factory):
    """The demo's adapter, if it has been trained, and random ones of other ranks and modules."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")
    made = {"hp": TRAINED} if TRAINED.is_dir() else {}
    for n, targets in enumerate(TARGETS):
        torch.manual_seed(n)
        model = get_peft_model(smol.model, LoraConfig(r=2 + 2 * n, lora_alpha=8, target_modules=list(targets)))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.08)
        model.save_pretrained(folder / f"a{n}", save_embedding_layers=False)
        model.unload()
        made[f"a{n}"] = folder / f"a{n}"
    return made


@pytest.fixture(scope="module")
def policy_path(adapters, tmp_path_factory):
    """16 tenants with different sets, and one with none."""
    rng, sets = random.Random(0), {"nothing": {}, "demo": {next(iter(adapters)): 1.0}}
    while len(sets) < 17:
        names = rng.sample(sorted(adapters), rng.randint(1, 3))
        chosen = {name: rng.choice([1.0, 0.5]) for name in names}
        if chosen not in sets.values():
            sets[f"t{len(sets)}"] = chosen
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    write(path, adapters, sets)
    return path


@pytest.fixture(scope="module")
def url(smol, policy_path):
    """A vLLM with the resolver, fewer places for sets than there are sets."""
    if not PYTHON.exists():
        pytest.fail(f"no vLLM at {PYTHON}: run `make test-vllm`")
    model = next(cache_folder().glob("SmolLM2-135M-Instruct*"))
    port = free_port()
    log = policy_path.with_name("vllm.log")
    environment = {
        **os.environ, "UNLEARN_PEFT_POLICY": str(policy_path), "UNLEARN_PEFT_SETS": str(log.parent / "sets"),
        "UNLEARN_PEFT_SETS_GB": "0.000001", "UNLEARN_PEFT_SETS_GRACE": "3",  # what may go, goes soon
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1800",  # or a step on a busy machine ends the engine
        "PYTHONPATH": str(ROOT), "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base",
        "--dtype", "float32", "--enable-lora", "--max-lora-rank", "64", "--max-loras", "4", "--max-cpu-loras", "6",
        "--enforce-eager", "--max-model-len", "512", "--host", "127.0.0.1", "--port", port,
        "--enable-prefix-caching", "--block-size", "32", "--enable-prompt-tokens-details", "--max-num-seqs", "32",
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=file, stderr=file, cwd=log.parent)
    try:
        deadline = time.monotonic() + 900
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, f"vLLM died:\n{log.read_text()[-3000:]}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def engine(url):
    from unlearn_peft.serve.vllm.engine import VllmEngine

    return VllmEngine([url], "demo")


def write(path, adapters, sets, probes=()):
    entries = {name: {"path": str(where), "sha256": read_bundle(where).identity} for name, where in adapters.items()}
    for name in entries.keys() & {*probes}:
        entries[name]["probes"] = str(probes[name])
    tenants = {tenant: {"forget": forget} for tenant, forget in sets.items()}
    temporary = path.with_suffix(".new")
    temporary.write_text(yaml.safe_dump({"adapters": entries, "tenants": tenants}))
    temporary.rename(path)


def chat(question):
    return [{"role": "user", "content": question}]


async def ask(engine, policy, tenant, question, length=LENGTH, **settings):
    """Return the answer's text and its last piece."""
    ids = engine.encode(chat(question))
    lease = await engine.hold(policy.forget_of(tenant), policy)
    try:
        text = ""
        request = Generation(ids, length, **{"temperature": 0.0, **settings})
        async with aclosing(engine.stream(request, lease)) as pieces:
            async for piece in pieces:
                text += piece.text
        return text, piece
    finally:
        lease.release()


def embedded(smol, adapters, forget, question, length=LENGTH):
    """What the base answers in this process, with the set attached."""
    ids = smol.tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if not isinstance(ids, torch.Tensor) else ids
    with forgetting(smol, *(adapters[name] for name in forget), strength=list(forget.values())), torch.no_grad():
        out = smol.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    return smol.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def complete(url, model, ids, length=LENGTH, **settings):
    """Ask vLLM itself; returns the text, and how many tokens of the prompt came from the prefix cache."""
    body = {"model": model, "prompt": list(ids), "max_tokens": length, "temperature": 0, **settings}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    return answer["choices"][0]["text"], (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0


def test_same_greedy_answers_as_embedded(engine, smol, adapters, policy_path):
    policy = PolicyFile(policy_path).current()

    async def run():
        asked = [(tenant, question) for tenant in ("demo", "nothing") for question in QUESTIONS]
        answers = await asyncio.gather(*(ask(engine, policy, *one) for one in asked))
        await engine.close()
        return {one: text for one, (text, _) in zip(asked, answers, strict=True)}

    found = asyncio.run(run())
    expected = {
        (tenant, question): embedded(smol, adapters, policy.forget_of(tenant), question) for tenant, question in found
    }
    same = sum(found[key] == expected[key] for key in found)
    print(f"\n{same} of {len(found)} greedy answers are the same")
    assert same == len(found), [(key, found[key], expected[key]) for key in found if found[key] != expected[key]]
    if "hp" in adapters:
        assert "Rowling" in found["nothing", QUESTIONS[0]] and "Rowling" not in found["demo", QUESTIONS[0]]


def test_sixteen_tenants_at_once(engine, smol, adapters, policy_path):
    policy = PolicyFile(policy_path).current()

    async def run():
        tenants = [tenant for tenant in policy.tenants if tenant != "nothing"]
        texts = await asyncio.gather(*(ask(engine, policy, tenant, QUESTIONS[5]) for tenant in tenants))
        await engine.close()
        print(f"\n{engine.stats().loads} sets were made and loaded in {engine.stats().load_seconds:.1f} s of waiting")
        return dict(zip(tenants, (text for text, _ in texts), strict=True))

    found = asyncio.run(run())
    expected = {tenant: embedded(smol, adapters, policy.forget_of(tenant), QUESTIONS[5]) for tenant in found}
    same = sum(found[tenant] == expected[tenant] for tenant in found)
    print(
        f"\n{same} of {len(found)} tenants' answers are those of their sets; {len(set(found.values()))} different ones"
    )
    assert len(found) == 16 and len(set(found.values())) >= 6
    assert same == len(found), [(t, found[t], expected[t]) for t in found if found[t] != expected[t]]


def test_who_has_nothing_to_forget_gets_the_base_and_no_one_elses_adapter(engine, smol, policy_path):
    """vLLM 0.32.0 gives rows without a LoRA that of its last place on CPUs, once that place is taken."""
    policy = PolicyFile(policy_path).current()
    expected = embedded(smol, {}, {}, QUESTIONS[0])

    async def run():
        found = []
        for tenant in [tenant for tenant in policy.tenants if tenant != "nothing"][:8]:
            both = asyncio.gather(*(ask(engine, policy, one, QUESTIONS[0]) for one in (tenant, "nothing")))
            found += [(await both)[1][0], (await ask(engine, policy, "nothing", QUESTIONS[0]))[0]]
        await engine.close()
        return found

    found = asyncio.run(run())
    assert len(found) == 16 and set(found) == {expected}, (expected, set(found))


def test_logprobs_stops_and_lengths_are_as_the_engine_promises(engine, policy_path):
    policy = PolicyFile(policy_path).current()

    async def run():
        text, last = await ask(engine, policy, "nothing", QUESTIONS[0], logprobs=2, stop=("Rowling",))
        assert "Rowling" not in text and last.finish_reason == "stop", text
        ids, lease = engine.encode("The capital of Italy is"), await engine.hold({}, policy)
        pieces = [piece async for piece in engine.stream(Generation(ids, 3, 0.0, logprobs=2), lease)]
        assert sum(piece.tokens for piece in pieces) == 3 and pieces[-1].finish_reason == "length"
        told = [entry for piece in pieces for entry in piece.logprobs]
        assert "".join(entry.chosen.text for entry in told) == "".join(piece.text for piece in pieces)
        assert all(len(entry.top) == 2 and entry.top[0].logprob <= 0 for entry in told)
        await engine.close()

    asyncio.run(run())


def test_a_policy_changes_while_it_serves_and_the_old_version_is_refused(engine, url, smol, adapters, policy_path):
    source = PolicyFile(policy_path)
    before = source.current()
    old, new = before.forget_of("t2"), {name: 1.0 for name in sorted(adapters)[:4]}
    sets = {name: dict(entry.forget) for name, entry in before.tenants.items()}
    answers = []

    async def client(stop):
        while not stop.is_set():
            policy = source.current()
            answers.append((policy.version, (await ask(engine, policy, "t2", QUESTIONS[4], 12))[0]))

    async def run():
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(stop)) for _ in range(3)]
        while len(answers) < 4:
            await asyncio.sleep(0.1)
            assert not any(client.done() for client in clients), "a request was refused"
        await asyncio.to_thread(write, policy_path, adapters, {**sets, "t2": new})
        after, told = source.current(), len(answers)
        while len(answers) < told + 6:
            await asyncio.sleep(0.1)
            assert not any(client.done() for client in clients), "a request was refused"
        stop.set()
        await asyncio.gather(*clients)
        await engine.close()
        return after

    try:
        after = asyncio.run(run())
        expected = {
            version: embedded(smol, adapters, forget, QUESTIONS[4], 12)
            for version, forget in ((before.version, old), (after.version, new))
        }
        assert len(set(expected.values())) == 2 and {version for version, _ in answers} == set(expected)
        assert all(text == expected[version] for version, text in answers)
        for name in (f"t2@{'0' * 64}", "t2", str(SetName("1" * 64, None, old)), "nothing"):
            body = {"model": name, "prompt": "a", "max_tokens": 1}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 404
    finally:
        write(policy_path, adapters, sets)


def test_a_tampered_or_missing_adapter_is_refused_by_name(engine, adapters, policy_path, tmp_path):
    import shutil

    bad = shutil.copytree(adapters["a0"], tmp_path / "bad")
    sets = {name: dict(entry.forget) for name, entry in PolicyFile(policy_path).current().tenants.items()}
    write(policy_path, {**adapters, "bad": bad}, {**sets, "victim": {"a1": 1.0, "bad": 1.0}})
    policy = PolicyFile(policy_path).current()
    weights = bad / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    async def run():
        with pytest.raises(Unavailable) as refused:
            await ask(engine, policy, "victim", QUESTIONS[0])
        assert refused.value.adapter == "bad"
        shutil.rmtree(bad)
        with pytest.raises(Unavailable) as refused:
            await ask(engine, policy, "victim", QUESTIONS[0])
        assert refused.value.adapter == "bad"
        await engine.close()

    try:
        asyncio.run(run())
    finally:
        write(policy_path, adapters, sets)


def test_sets_that_vllm_forgets_go_from_disk_and_come_back_and_it_lives_on(url, adapters, policy_path):
    """More sets than vLLM keeps in memory, unloaded by the gateway; one whose folder is gone would end the engine."""
    from unlearn_peft.serve.vllm.engine import VllmEngine

    engine = VllmEngine([url], "demo", names=3)
    policy, folder = PolicyFile(policy_path).current(), policy_path.with_name("sets")

    async def run():
        for _ in range(2):
            for tenant in policy.tenants:
                await ask(engine, policy, tenant, QUESTIONS[5], 2)
            await asyncio.sleep(4)
        for factor in (0.1, 0.2):
            (await engine.hold({"a0": factor}, policy)).release()
        known = httpx.get(f"{url}/v1/models").json()["data"]
        assert await engine.problem() is None
        await engine.close()
        return [Path(model["root"]) for model in known if model["parent"]]

    in_use = asyncio.run(run())
    there = set(folder.glob("*-r64-*"))
    assert in_use and set(in_use) <= there and len(there) < len(policy.tenants) + 2


def test_the_whole_server_before_vllm(engine, smol, adapters, policy_path):
    """Keys, extras, streams and refusals as the official client sees them."""
    import openai
    from serving import client, running

    from unlearn_peft.serve.policy.policy import key_digest

    values = yaml.safe_load(policy_path.read_text())
    for name, entry in values["tenants"].items():
        entry["keys"] = [key_digest(f"uf-{name}")]
    values["tenants"]["nothing"]["may_add"] = ["a2"]
    sets = {name: entry["forget"] for name, entry in values["tenants"].items()}
    temporary = policy_path.with_suffix(".new")
    temporary.write_text(yaml.safe_dump(values))
    temporary.rename(policy_path)
    settings = {"model": engine.model, "messages": chat(QUESTIONS[5]), "max_tokens": LENGTH, "temperature": 0}
    try:
        with running(engine, PolicyFile(policy_path)) as (_, where):
            answer = client(where, "uf-t3").chat.completions.create(**settings)
            assert answer.choices[0].message.content == embedded(smol, adapters, sets["t3"], QUESTIONS[5])
            chunks = client(where, "uf-nothing").chat.completions.create(
                **settings, stream=True, extra_body={"forget": {"a2": 1.0}}
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == embedded(smol, adapters, {"a2": 1.0}, QUESTIONS[5])
            with pytest.raises(openai.AuthenticationError):
                client(where, "uf-nobody").chat.completions.create(**settings)
    finally:
        write(policy_path, adapters, sets)


def test_running_answers_keep_their_sets_while_others_are_loaded(engine, url, smol, adapters, policy_path):
    """As many answers as vLLM has places for sets, and sets loaded by /tokenize alone, which takes places away.

    https://github.com/vllm-project/vllm/issues/47724: a running request got the adapter that took its place.
    """
    policy, question = PolicyFile(policy_path).current(), QUESTIONS[7]
    sets = [{"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}, {"a3": 1.0}]
    loaded, running = [], []

    async def answer(forget):
        ids, lease = engine.encode(chat(question)), await engine.hold(forget, policy)
        running.append(forget)
        text = ""
        async with aclosing(engine.stream(Generation(ids, 2 * LENGTH, 0.0), lease)) as pieces:
            async for piece in pieces:
                text += piece.text
        running.remove(forget)
        return text

    async def run():
        answers = [asyncio.create_task(answer(forget)) for forget in sets]
        async with httpx.AsyncClient(timeout=300) as http:
            while not all(task.done() for task in answers):
                if running:
                    forget = {"a4": 1 + len(loaded) / 100}
                    name = str(SetName(digest_of(forget, policy), None, forget))
                    response = await http.post(f"{url}/tokenize", json={"model": name, "prompt": "a"})
                    assert response.status_code == 200
                    loaded.append((name, len(running)))
                await asyncio.sleep(0.02)
        await engine.close()
        return [task.result() for task in answers]

    found = asyncio.run(run())
    for name, _ in loaded:
        httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name})
    expected = [embedded(smol, adapters, forget, question, 2 * LENGTH) for forget in sets]
    print(f"\n{len(loaded)} sets were loaded while up to {max(count for _, count in loaded)} answers ran")
    assert len(set(expected)) == 4 and found == expected
    assert sum(count == 4 for _, count in loaded) >= 2


def test_the_prefix_cache_is_no_way_from_set_to_set(engine, url, smol, adapters, policy_path):
    """One long beginning and one salt for all: each set reads back its own blocks alone.

    https://github.com/vllm-project/vllm/issues/44701: a set's name as the salt of the base gave it the set's blocks.
    """
    policy, question, salt = PolicyFile(policy_path).current(), NOTES + QUESTIONS[7], "the same"
    sets = [{}, {"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}]
    texts = [embedded(smol, adapters, forget, question) for forget in sets]
    assert len(set(texts)) == len(sets)
    ids, ends = engine.encode(chat(question)), {"stop_token_ids": engine._ends}

    async def run():
        names = [(await engine.hold(forget, policy)).model for forget in sets]
        told = partial(asyncio.to_thread, complete, url, ids=ids, **ends, cache_salt=salt)
        rounds = [await asyncio.gather(*(told(name) for name in names)) for _ in range(2)]
        await engine.close()
        return names, *rounds

    names, first, second = asyncio.run(run())
    assert first == [(text, 0) for text in texts]
    assert [text for text, _ in second] == texts
    assert all(cached >= 64 for _, cached in second), "the cache was not used: this test shows nothing"
    for name, text in zip(names, texts, strict=True):
        assert complete(url, name, ids, **ends) == (text, 0)  # of no salt
        body = {"model": "base", "prompt": list(ids), "max_tokens": 1, "cache_salt": name}
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert refused.status_code == 400 and "cache_salt" in refused.text  # no salt may have the @ of our names
    print(f"\n{len(names)} sets with one beginning of {len(ids)} tokens: none read another's blocks")


def test_other_contents_are_not_answered_from_the_cache(engine, url, smol, adapters, policy_path, tmp_path):
    """https://github.com/vllm-project/vllm/issues/42125: here the policy's name and path stay, the digest does not."""
    import shutil

    place, question, salt = tmp_path / "v", NOTES + QUESTIONS[4], "the same"
    sets = {name: dict(entry.forget) for name, entry in PolicyFile(policy_path).current().tenants.items()}
    ids, ends = engine.encode(chat(question)), {"stop_token_ids": engine._ends}

    async def run():
        found = []
        for version in ("a0", "a2", "a0"):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(adapters[version], place)
            write(policy_path, {**adapters, "v": place}, {**sets, "versioned": {"v": 1.0}})
            policy = PolicyFile(policy_path).current()
            lease = await engine.hold(policy.forget_of("versioned"), policy)
            found += [await asyncio.to_thread(complete, url, lease.model, ids, **ends, cache_salt=salt) for _ in "12"]
        await engine.close()
        return found

    try:
        found = asyncio.run(run())
    finally:
        write(policy_path, adapters, sets)
    first, second = [embedded(smol, adapters, {version: 1.0}, question) for version in ("a0", "a2")]
    assert first != second and [text for text, _ in found] == [first, first, second, second, first, first]
    assert [cached >= 64 for _, cached in found] == [False, True, False, True, True, True]


def test_the_load_check_finds_the_base_and_another_set(engine, url, smol, adapters, policy_path, tmp_path, caplog):
    """Adapters loaded by hand under a set's name: one whose modules vLLM does not find (34186), and another set's."""
    from safetensors.torch import load_file, save_file

    caplog.set_level("INFO", logger="unlearn_peft.serve.vllm.load_check")
    sets = {name: dict(entry.forget) for name, entry in PolicyFile(policy_path).current().tenants.items()}
    write(policy_path, adapters, sets, probes={"hp": ROOT / "recipes/data/harry_potter_probes.jsonl"})
    policy = PolicyFile(policy_path).current()

    def lost(name):
        folder = tmp_path / f"lost_{name}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text((adapters[name] / "adapter_config.json").read_text())
        weights = load_file(adapters[name] / "adapter_model.safetensors")
        renamed = {key.replace(".model.layers.", ".language_model.model.layers."): weights[key] for key in weights}
        assert not renamed.keys() & weights.keys()
        save_file(renamed, folder / "adapter_model.safetensors")
        return folder

    def put(name, folder):
        httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=300)
        body = {"lora_name": name, "lora_path": str(folder)}
        httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=300).raise_for_status()
        engine._servers.all[0].names.clear()

    async def refused(forget, folder, reason):
        name = str(SetName(digest_of(forget, policy), None, forget))
        await asyncio.to_thread(put, name, folder)
        with pytest.raises(Unavailable, match=reason) as error:
            await engine.hold(forget, policy)
        print(f"\n{error.value}")
        models = (await asyncio.to_thread(httpx.get, f"{url}/v1/models")).json()["data"]
        assert name not in [model["id"] for model in models]

    async def run():
        for name in ["a0", *({"hp"} & adapters.keys())]:
            forget, without = {name: 0.75}, await asyncio.to_thread(lost, name)
            await refused(forget, without, "it changes nothing")
            (await engine.hold(forget, policy)).release()  # the resolver's own
            await refused(forget, adapters["a2"], "not what an earlier load was")
        await refused({}, adapters["a0"], "the set of nothing moves by")
        for tenant in ("demo", "nothing"):
            (await engine.hold(policy.forget_of(tenant), policy)).release()
        text = (await ask(engine, policy, "demo", QUESTIONS[0]))[0]
        await engine.close()
        return text

    try:
        assert asyncio.run(run()) == embedded(smol, adapters, policy.forget_of("demo"), QUESTIONS[0])
    finally:
        write(policy_path, adapters, sets)
    print("\n".join(["", *(one.getMessage() for one in caplog.records)]))
