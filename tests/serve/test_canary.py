"""A set in which a probe leaks again, though not with its adapter alone, is refused, or that is told."""

import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_vllm import FakeVllm, install_vllm, serving
from safetensors.torch import load_file, save_file
from serving import Fixed, client, make_adapters, make_policy_values, running, slow

from unlearn_peft import load_base
from unlearn_peft.errors import PolicyError
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.policy.policy import make_policy
from unlearn_peft.serve.vllm.engine import VllmEngine
from unlearn_peft.serve.vllm.plugin import Sets, make_resolver

QUESTIONS = ("Who wrote the blue book?", "Name the author.")
FORGET = {"alice": {"a": 1.0}, "bob": {"a": 1.0, "b": 1.0}, "carol": {}, "dave": {"a": 1.0, "against": 1.0}}
MAY_ADD = {"alice": {"against": 1.0, "b": 1.0, "a": 2.0}, "bob": {"against": 1.0}}


def negated(folder, path):
    """The opposite of an adapter, as an adapter of its own."""
    shutil.copytree(folder, path)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({k: -t if "lora_B" in k else t for k, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """Adapters; a probes file of what the base answers and `a` alone does not; these leak words."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = make_adapters(folder, tiny_folder, seeds=(1, 2))
    adapters["against"] = negated(adapters["a"], folder / "against")
    engine, rows = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny"), []
    with running(engine, make_policy_values(adapters, FORGET)) as (_, url):
        for question in QUESTIONS:
            base, own, beside = (ask(url, tenant, question) for tenant in ("carol", "alice", "bob"))
            words = {base[n : n + 8].strip() for n in range(len(base) - 8)}
            leak = next(word for word in sorted(words) if len(word) > 4 and word not in own and word not in beside)
            rows.append({"prompt": question, "leak": [leak]})
    (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return adapters, folder / "probes.jsonl", [row["leak"][0] for row in rows]


@pytest.fixture
def serve(made, tiny_folder, tmp_path):
    """Start a server whose policy has a canary for `a`; yields what the tests ask of it."""
    opened = []

    def start(values=None, **settings):
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny", max_batch=4)
        log = AuditLog(tmp_path / f"audit{len(opened) or ''}.jsonl")
        opened.append(running(engine, values or policy(made), audit=log, **settings))
        return opened[-1].__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def policy(made, probes=True, **entry):
    adapters, path, _ = made
    values = make_policy_values(adapters, FORGET, MAY_ADD)
    values["adapters"]["a"] |= {**({"probes": str(path)} if probes else {}), **entry}
    return values


def ask(url, tenant, question=QUESTIONS[0], forget=None, **settings):
    message = [{"role": "user", "content": question}]
    extra = {"forget": forget} if forget else {}
    answer = client(url, tenant).chat.completions.create(
        model="tiny", messages=message, temperature=0, max_tokens=64, extra_body=extra, **settings
    )
    return answer.choices[0].message.content


def checks(url):
    import httpx

    text = httpx.get(f"{url}/metrics").text
    return {
        result: int(float(line.split()[-1]))
        for line in text.splitlines()
        for result in ("passed", "leaked", "failed")
        if line.startswith(f'unlearn_peft_canary_checks_total{{result="{result}"}}')
    }


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]


def test_what_brings_a_fact_back_is_refused_and_the_rest_is_served(serve, made, tmp_path, caplog):
    _, url = serve()
    own = ask(url, "alice")
    assert checks(url) == {}, "an adapter alone needs no check"
    for _ in range(3):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            ask(url, "alice", "something else", ["against"])
        assert refused.value.code == "canary_leaks" and refused.value.body["adapter"] == "a"
        assert "what 'a' forgets comes back" in str(refused.value)
    assert checks(url) == {"leaked": 1}, "once for each set"
    assert ask(url, "alice", forget=["b"]) and checks(url) == {"leaked": 1, "passed": 1}
    assert ask(url, "alice") == own
    with pytest.raises(openai.InternalServerError) as refused:  # a tenant whose own set is so
        ask(url, "dave")
    assert refused.value.status_code == 503 and refused.value.code == "canary_leaks"
    assert checks(url) == {"leaked": 1, "passed": 1}, "the same contents and strengths as alice's"

    found = [line for line in lines(tmp_path) if line["event"] == "canary"]
    assert (
        found[0]["canary"] == {"a": {"probes": 2, "base": 2, "alone": 0, "back": 2}} and found[0]["tenant"] == "alice"
    )
    assert [one["name"] for one in found[0]["adapters"]] == ["a", "against"] and found[1]["canary"]["a"]["back"] == 0
    ended = [line for line in lines(tmp_path) if line["event"] == "finished"]
    assert [(line["status"], line.get("leaks")) for line in ended] == [
        (200, None), *[(403, ["a"])] * 3, (200, None), (200, None), (503, ["a"])
    ]  # fmt: skip
    assert [line["id"] for line in lines(tmp_path) if line["event"] == "admitted"] == [
        line["id"] for line in ended if line["status"] == 200
    ], "a refused request is not admitted"
    told = (tmp_path / "audit.jsonl").read_text() + caplog.text + str(refused.value)
    assert not [text for text in (*QUESTIONS, *made[2]) if text in told] and "2 of 2 probes of 'a' leak" in caplog.text


def test_a_warning_serves_it(serve, made, tmp_path, caplog):
    _, url = serve(policy(made, canary="warn"))
    base = ask(url, "carol")
    assert [ask(url, "alice", forget=["against"]) for _ in range(2)] == [base, base] and checks(url) == {"leaked": 1}
    assert caplog.text.count("2 of 2 probes of 'a' leak again; served all the same") == 1
    served = [line for line in lines(tmp_path) if line["event"] == "finished" and "leaks" in line]
    assert [(line["status"], line["leaks"]) for line in served] == [(200, ["a"])] * 2


def test_the_choice_counts_at_once_and_the_check_stays(serve, made):
    handler, url = serve(policy(made, canary="warn"))
    ask(url, "alice", forget=["against"])
    handler.policies.policy = make_policy(policy(made), "test")
    with pytest.raises(openai.PermissionDeniedError):
        ask(url, "alice", forget=["against"])
    handler.policies.policy = make_policy(policy(made, canary="off"), "test")
    assert ask(url, "alice", forget=["against"]) and checks(url) == {"leaked": 1}


def test_a_strength_beyond_the_policys_is_another_set(serve):
    _, url = serve()
    assert ask(url, "alice", forget={"a": 1.0}) and ask(url, "alice", forget={"a": 0.5}) and checks(url) == {}
    for _ in range(2):
        ask(url, "alice", forget={"a": 1.5})
    assert sum(checks(url).values()) == 1
    ask(url, "alice", forget={"a": 2.0})
    assert sum(checks(url).values()) == 2


def test_many_requests_for_a_set_wait_for_one_check(serve):
    handler, url = serve()
    slow(handler, 0.005)
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(ask, url, "alice", forget=["b"]) for _ in range(6)]
        assert len({job.result() for job in jobs}) == 1
        jobs = [pool.submit(ask, url, "alice", forget=["against"]) for _ in range(6)]
        assert all(isinstance(job.exception(), openai.PermissionDeniedError) for job in jobs)
    assert checks(url) == {"passed": 1, "leaked": 1} and not handler._canary._running


def test_others_are_answered_while_a_set_is_checked(serve):
    handler, url = serve()
    slow(handler, 0.03)
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(ask, url, "alice", forget=["b"])
        while not handler._canary._running:
            assert not checked.done()
            time.sleep(0.005)
        for _ in range(2):
            client(url, "carol").completions.create(model="tiny", prompt="x", max_tokens=2)
            assert handler._canary._running, "the check still runs"
        assert checked.result()


def test_the_check_goes_on_when_its_client_has_gone(serve):
    handler, url = serve()
    slow(handler, 0.02)
    with pytest.raises(openai.APITimeoutError):
        ask(url, "alice", forget=["b"], timeout=0.5)
    deadline = time.monotonic() + 60
    while handler._canary._running or handler.active:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert checks(url) == {"passed": 1}
    assert all(adapter.pins == 1 for adapter in handler.engine.bank.cache._loaded.values()), "no lease is left"
    assert ask(url, "alice", forget=["b"]) and checks(url) == {"passed": 1}


def test_another_version_of_an_adapter_is_checked_anew(serve, made, tmp_path):
    adapters, _, _ = made
    values = policy(made)
    values["adapters"]["b"]["path"] = str(shutil.copytree(adapters["b"], tmp_path / "new"))
    handler, url = serve(values)
    ask(url, "bob")
    ask(url, "bob")
    assert checks(url) == {"passed": 1}
    values = policy(made)
    values["adapters"]["b"]["path"] = str(negated(adapters["a"], tmp_path / "newer"))  # under the same name
    handler.policies.policy = make_policy(values, "test")
    with pytest.raises(openai.InternalServerError):
        ask(url, "bob")
    assert checks(url) == {"passed": 1, "leaked": 1}


def test_changed_probes_are_asked_anew(serve, made, tmp_path):
    values = policy(made, probes=False)
    probes = tmp_path / "probes.jsonl"
    probes.write_text(json.dumps({"prompt": QUESTIONS[0], "leak": ["nobody says this"]}))
    values["adapters"]["a"]["probes"] = str(probes)
    _, url = serve(values)
    assert ask(url, "dave") and checks(url) == {"passed": 1}
    shutil.copyfile(made[1], probes)
    with pytest.raises(openai.InternalServerError):
        ask(url, "dave")


def test_without_probes_or_with_off_nothing_is_asked(serve, made, caplog):
    for values in (policy(made, probes=False), policy(made, canary="off"), policy(made, probes=False, canary="warn")):
        _, url = serve(values)
        assert ask(url, "dave") and checks(url) == {}
    assert caplog.text.count("the canary of 'a' has no effect") == 1, "the last"


def test_probes_beside_the_folder_are_found(serve, made):
    adapters, path, _ = made
    beside = adapters["a"].with_name("a.probes.jsonl")
    shutil.copyfile(path, beside)
    try:
        _, url = serve(policy(made, probes=False))
        with pytest.raises(openai.PermissionDeniedError):
            ask(url, "alice", forget=["against"])
    finally:
        beside.unlink()


@pytest.mark.parametrize(
    "content", [None, "no JSON", '{"prompt": "SECRET"}', "", '{"prompt": "x", "leak": ["y"]}\n' * 101]
)
def test_probes_that_cannot_be_asked_refuse_unless_they_only_warn(content, serve, made, tmp_path, caplog):
    probes = tmp_path / "probes.jsonl"
    if content is not None:
        probes.write_text(content)
    values = policy(made, probes=False)
    values["adapters"]["a"]["probes"] = str(probes)
    handler, url = serve(values)
    with pytest.raises(openai.InternalServerError) as refused:
        ask(url, "dave")
    assert refused.value.status_code == 503 and refused.value.body["adapter"] == "a"
    assert "SECRET" not in str(refused.value) + caplog.text and str(tmp_path) not in str(refused.value)
    values["adapters"]["a"]["canary"] = "warn"
    handler.policies.policy = make_policy(values, "test")
    assert ask(url, "dave") and "'a' has no canary" in caplog.text


def test_a_check_that_fails_refuses_and_is_tried_again(serve, made, caplog):
    handler, url = serve()
    encode, broken = handler.engine.encode, threading.Event()

    def fail(prompt, variables=None):
        if not broken.is_set() and prompt[0]["content"] == QUESTIONS[1]:
            raise RuntimeError("broken")
        return encode(prompt, variables)

    handler.engine.encode = fail
    with pytest.raises(openai.InternalServerError) as refused:
        ask(url, "alice", forget=["b"])
    assert refused.value.status_code == 503 and checks(url) == {"failed": 1}
    broken.set()
    assert ask(url, "alice", forget=["b"]) and checks(url) == {"failed": 1, "passed": 1}
    broken.clear()
    handler.policies.policy = make_policy(policy(made, canary="warn"), "test")
    assert ask(url, "alice", forget={"b": 0.5}), "base and `a` alone are known; only the new set fails"
    assert "was not checked, and is served" in caplog.text


def test_what_is_kept_is_bounded(serve, monkeypatch):
    from unlearn_peft.serve import canary

    monkeypatch.setattr(canary, "_MAX_CACHED", 2)
    handler, url = serve()
    for strength in (0.2, 0.4, 0.6, 0.2):
        ask(url, "alice", forget={"b": strength})
    assert sum(checks(url).values()) == 4 and len(handler._canary._verdicts._entries) == 2


def test_a_base_that_answers_no_probe_is_told(serve, made, tmp_path, caplog):
    values = policy(made, probes=False)
    probes = tmp_path / "probes.jsonl"
    probes.write_text(json.dumps({"prompt": QUESTIONS[0], "leak": ["nobody says this"]}))
    values["adapters"]["a"]["probes"] = str(probes)
    _, url = serve(values)
    ask(url, "dave")
    ask(url, "bob")
    assert caplog.text.count("the base answers no probe of 'a': its canary shows nothing") == 1


def test_the_gateway_does_the_same_through_vllm(made, tiny_folder, tmp_path, monkeypatch, caplog):
    install_vllm(monkeypatch)
    source = Fixed(policy(made))
    sets = Sets(source, tmp_path / "sets", max_rank=64, max_error=0.01, budget_bytes=10**9)
    fake = FakeVllm(load_base(str(tiny_folder)), make_resolver(sets))
    with serving(fake) as where:
        engine = VllmEngine([where], str(tiny_folder), name="tiny")
        with running(engine, source) as (_, url):
            with pytest.raises(openai.PermissionDeniedError, match="what 'a' forgets comes back"):
                ask(url, "alice", forget={"against": 0.999})
            assert ask(url, "alice", forget=["b"]) and checks(url) == {"passed": 1, "leaked": 1}
            with pytest.raises(openai.InternalServerError):
                ask(url, "alice", forget=["against"])
    assert "it changes nothing" in caplog.text, "an exact opposite is like a lost set"


def test_a_policy_says_what_is_wrong_with_it(tmp_path):
    from unlearn_peft.serve.policy.yaml_file import dump_policy, parse_policy

    text = b"{adapters: {hp: {path: hp, probes: hp.jsonl, canary: off}, x: {path: x}}, tenants: {}}"
    found = parse_policy(text, "it", tmp_path)
    assert found.adapters["hp"].canary == "off" and found.adapters["hp"].probes == str(tmp_path / "hp.jsonl")
    assert found.adapters["x"].canary is None and "canary: null" not in dump_policy(found)
    assert parse_policy(dump_policy(found).encode(), "it", tmp_path) == found
    for canary in ("refused", True, 1, []):
        with pytest.raises(PolicyError, match="'adapters.hp.canary': expected refuse, warn or off"):
            make_policy({"adapters": {"hp": {"path": "hp", "canary": canary}}, "tenants": {}}, "it")
    with pytest.raises(PolicyError, match="'adapters.hp.probes': expected the path of a file of probes"):
        make_policy({"adapters": {"hp": {"path": "hp", "probes": ""}}, "tenants": {}}, "it")


@pytest.fixture(autouse=True)
def _logs(caplog):
    caplog.set_level(logging.WARNING)
    from unlearn_peft.serve import canary

    canary._log_idle.cache_clear()
