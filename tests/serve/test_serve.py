"""The server, asked by the official client over a real socket: answers, refusals, limits, metrics, audit log."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import (
    Fixed,
    by_peft,
    changed,
    client,
    greedy_text,
    make_adapters,
    make_policy_values,
    running,
    same,
    slow,
    wait_for,
)

from unlearn_peft import load_base
from unlearn_peft.errors import OutputError, PolicyError
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits

FORGET = {"alice": {"a": 1.0}, "bob": {"b": 1.0, "c": 0.5}, "carol": {}, "dave": {"a": 1.0, "b": 1.0, "c": 1.0}}
MAY_ADD = {"alice": {"c": 2.0}, "bob": {"a": 2.0}, "carol": {"b": 0.5}}
PROMPTS = ["who wrote the blue book", "green stars ?", "it was by Zorblax Quintel in a small town near sea", "I like"]
MODEL = "tiny"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


@pytest.fixture(scope="module")
def values(adapters):
    return make_policy_values(adapters, FORGET, MAY_ADD)


@pytest.fixture
def serve(tiny_folder, values):
    """Start a server over the tiny model; keyword arguments are the app's, `engine` holds the engine's."""
    open_ones = []

    def start(policy=values, engine=None, **settings):
        made = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL, **(engine or {}))
        context = running(made, policy, **settings)
        open_ones.append(context)
        return context.__enter__()

    yield start
    for context in open_ones:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def shared(tiny_folder, values):
    """A server for the tests that leave it as it was."""
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL, max_batch=4)
    with running(engine, values, limits=Limits(batch=4)) as (handler, url):
        yield handler, url


def complete(ask, prompt, count=12, **settings):
    settings = {"temperature": 0, "max_tokens": count, **settings}
    extra = {"ignore_eos": True, **settings.pop("extra_body", {})}
    return ask.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **settings)


def expected(tiny_folder, adapters, prompt, forget, count=12):
    text = greedy_text(tiny_folder, {adapters[name]: strength for name, strength in forget.items()}, prompt, count)
    return text


# ---- answers ----


def test_every_tenant_gets_what_its_set_gives_alone_with_plain_peft(shared, tiny_folder, adapters):
    _, url = shared
    asked = [(tenant, prompt, {}) for tenant in FORGET for prompt in PROMPTS]
    asked += [
        ("carol", PROMPTS[0], {"b": 0.5}),
        ("alice", PROMPTS[1], {"c": 2.0, "a": 0.25}),
        ("bob", PROMPTS[0], {"a": 1.0}),
    ]
    sets = []
    for tenant, _, extra in asked:
        both = {**FORGET[tenant]}
        for name, strength in extra.items():
            both[name] = max(both.get(name, 0), strength)
        sets.append(both)
    want = [expected(tiny_folder, adapters, prompt, s) for (_, prompt, _), s in zip(asked, sets, strict=True)]
    with ThreadPoolExecutor(12) as pool:
        jobs = [
            pool.submit(complete, client(url, tenant), prompt, extra_body={"forget": extra} if extra else {})
            for tenant, prompt, extra in asked * 3
        ]
        got = [job.result() for job in jobs]
    assert all(same(one.choices[0].text, text) for one, text in zip(got, want * 3, strict=True))
    assert len(set(want)) > 8, "the sets differ in what they say"
    prints = {repr(sorted(s.items())): one.system_fingerprint for s, one in zip(sets * 3, got, strict=True)}
    assert len(set(prints.values())) == len(prints) and prints["[]"] == "fp_base"


def test_a_request_can_add_but_never_take_away(shared, tiny_folder, adapters):
    _, url = shared
    want = expected(tiny_folder, adapters, PROMPTS[0], FORGET["alice"])
    base = expected(tiny_folder, adapters, PROMPTS[0], {})
    assert want != base
    ask = client(url, "alice")
    for forget in ([], {}, {"a": 0.001}, None):
        assert same(complete(ask, PROMPTS[0], extra_body={"forget": forget}).choices[0].text, want)
    for forget in ({"a": 0}, {"a": -1}, {"a": float(11)}, "a", {"a": None}, [["a"]]):
        with pytest.raises(openai.BadRequestError):
            complete(ask, PROMPTS[0], extra_body={"forget": forget})
    added = complete(ask, PROMPTS[0], extra_body={"forget": ["c"]}).choices[0].text
    assert same(added, expected(tiny_folder, adapters, PROMPTS[0], {"a": 1.0, "c": 1.0}))


def test_a_request_adds_nothing_but_what_its_tenant_is_allowed(shared):
    """Another adapter can oppose the tenant's own, and so can the own one where it is too strong."""
    handler, url = shared
    loads = handler.engine.bank.stats.loads
    told = {}
    for tenant, forget in {"alice": ["b", "zzz", {"c": 2.5}, {"a": 1.5}], "dave": ["c", {"c": 1.01}, "zzz"]}.items():
        for one in forget:
            body = {"forget": [one] if isinstance(one, str) else one}
            if (tenant, one) == ("dave", "c"):  # its own, as strong as it is anyway
                complete(client(url, tenant), PROMPTS[0], extra_body=body)
                continue
            with pytest.raises(openai.PermissionDeniedError, match="or ask the operator to allow it") as error:
                complete(client(url, tenant), PROMPTS[0], extra_body=body)
            assert error.value.code == "adapter_not_allowed" and error.value.param == "forget"
            told[tenant, str(one)] = str(error.value)
    assert "may add 'c' up to strength 2, found 'a' at strength 1.5" in told["alice", "{'a': 1.5}"]
    assert "may add no adapters, found 'zzz' at strength 1:" in told["dave", "zzz"]
    assert told["alice", "b"] == told["alice", "zzz"].replace("'zzz'", "'b'"), "whether it exists is not told"
    assert handler.engine.bank.stats.loads <= loads + 3 and handler.active == 0


def test_an_adapter_that_brings_a_fact_back_is_not_added(tiny_folder, adapters, tmp_path):
    """One with a negated scale cancels the tenant's own: whoever may add it gets the base's answer."""
    against = shutil.copytree(adapters["a"], tmp_path / "against")
    config = json.loads((against / "adapter_config.json").read_text())
    (against / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": -config["lora_alpha"]}))
    values = make_policy_values({**adapters, "against": against}, {"alice": ["a"], "bob": ["a"]}, {"bob": ["against"]})
    base, own = (expected(tiny_folder, adapters, PROMPTS[0], forget) for forget in ({}, {"a": 1.0}))
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL)
    with running(engine, values) as (_, url):
        with pytest.raises(openai.PermissionDeniedError):
            complete(client(url, "alice"), PROMPTS[0], extra_body={"forget": ["against"]})
        assert same(complete(client(url, "alice"), PROMPTS[0]).choices[0].text, own)
        added = complete(client(url, "bob"), PROMPTS[0], extra_body={"forget": ["against"]})
        assert same(added.choices[0].text, base) and base != own, "the fault itself, where the operator lets it in"


def test_chat_streams_what_it_answers(shared):
    _, url = shared
    ask = client(url, "bob")
    messages = [
        {"role": "system", "content": "be red"},
        {"role": "user", "content": [{"type": "text", "text": "who ?"}]},
    ]
    settings = dict(model=MODEL, messages=messages, temperature=0, max_tokens=15, extra_body={"ignore_eos": True})
    whole = ask.chat.completions.create(**settings)
    events = list(ask.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content and whole.choices[0].message.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length" == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage and whole.usage.completion_tokens == 15
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 15
    assert {e.id for e in events} == {events[0].id} and events[0].choices[0].delta.role == "assistant"
    plain = list(ask.chat.completions.create(**settings, stream=True))
    assert all(e.usage is None for e in plain) and len({e.system_fingerprint for e in [*plain, whole]}) == 1
    developer = [{**messages[0], "role": "developer"}, messages[1]]
    assert ask.chat.completions.create(**{**settings, "messages": developer}).choices == whole.choices
    assert ask.chat.completions.create(**{**settings, "max_tokens": None}).usage.completion_tokens > 15


def test_stop_seed_n_logprobs(shared):
    _, url = shared
    ask = client(url, "dave")
    text = complete(ask, PROMPTS[0], 20).choices[0].text
    stopped = complete(ask, PROMPTS[0], 20, stop=[text[5:7], "zz"]).choices[0]
    assert stopped.text == text[: text.find(text[5:7])] and stopped.finish_reason == "stop"
    assert complete(ask, PROMPTS[0], 20, stop=text[5:7]).choices[0].text == stopped.text
    sampled = dict(temperature=1.0, top_p=0.9, seed=5, n=3)
    first = complete(ask, PROMPTS[0], 20, **sampled)
    again = complete(ask, PROMPTS[0], 20, **sampled)
    assert first.choices == again.choices and len({c.text for c in first.choices}) == 3
    assert first.usage.completion_tokens == 60 and [c.index for c in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for event in complete(ask, PROMPTS[0], 20, stream=True, **sampled):
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in first.choices]
    two = complete(ask, PROMPTS[:2], 5, n=2, temperature=0)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == two.choices[1].text
    tokens = two.usage.prompt_tokens
    assert tokens == sum(complete(ask, prompt, 1).usage.prompt_tokens for prompt in PROMPTS[:2])
    scored = complete(ask, "who wrote", 6, logprobs=2).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.text_offset) <= 6
    assert all(len(top) == 2 for top in scored.top_logprobs) and scored.text_offset[0] == 0
    chat = ask.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "x"}],
        logprobs=True,
        top_logprobs=3,
        max_tokens=4,
        temperature=0,
    )
    content = chat.choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
    assert all(entry.token == entry.top_logprobs[0].token for entry in content), "greedy takes the likeliest"
    assert complete(ask, [5, 6, 7], 3).usage.prompt_tokens == 3, "ids are taken too"


def test_models_and_health(shared):
    _, url = shared
    assert [model.id for model in client(url).models.list()] == [MODEL]
    assert client(url).models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("gpt-4")
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{url}/readyz")
    assert ready.status_code == 200 and ready.json()["status"] == "ready"
    assert httpx.get(f"{url}/nowhere").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{url}/v1/completions").status_code == 405


# ---- refusals ----


def test_keys(shared):
    _, url = shared
    for key in ("wrong", "uf-key-of-alic", "Bearer"):
        with pytest.raises(openai.AuthenticationError) as told:
            complete(client(url, key), "x")
        assert told.value.code == "invalid_api_key" and key not in str(told.value.body)
    for headers in ({}, {"Authorization": "Basic uf-key-of-alice"}, {"Authorization": "uf-key-of-alice"}):
        for path in ("models", "chat/completions"):
            call = httpx.get if path == "models" else httpx.post
            found = call(f"{url}/v1/{path}", headers=headers)
            assert found.status_code == 401 and found.json()["error"]["type"] == "authentication_error"


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "secret words"}]}
TEXT = {"model": MODEL, "prompt": "secret words"}
WRONG = [
    ("chat/completions", {"tools": [{"type": "function"}]}, "invalid_value", "tools.0.function"),
    ("completions", {"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    ("chat/completions", {"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
    ("chat/completions", {"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
    ("chat/completions", {"temprature": 1}, "unsupported_parameter", "temprature"),
    ("chat/completions", {"messages": []}, "invalid_value", "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "secret"}]}, "invalid_value", "messages.0"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", None),
    ("chat/completions", {"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ("chat/completions", {"temperature": 3}, "invalid_value", "temperature"),
    ("chat/completions", {"temperature": "secret"}, "invalid_value", "temperature"),
    ("chat/completions", {"n": 0}, "invalid_value", "n"),
    ("chat/completions", {"n": 17}, "too_many_answers", "n"),
    ("chat/completions", {"seed": 2**80}, "invalid_value", "seed"),
    ("chat/completions", {"max_tokens": 0}, "invalid_value", "max_tokens"),
    ("completions", {"max_tokens": 5000}, "context_length_exceeded", "max_tokens"),
    ("completions", {"max_tokens": 255}, "context_length_exceeded", "max_tokens"),
    ("completions", {"prompt": "blue " * 300}, "context_length_exceeded", None),
    ("completions", {"prompt": []}, "invalid_value", None),
    ("completions", {"prompt": ""}, "invalid_value", None),
    ("completions", {"prompt": [3, 100000]}, "invalid_prompt", None),
    ("completions", {"prompt": [3, -1]}, "invalid_prompt", None),
    ("completions", {"echo": True}, "unsupported_parameter", "echo"),
    ("completions", {"best_of": 2}, "unsupported_parameter", "best_of"),
    ("completions", {"suffix": "secret"}, "unsupported_parameter", "suffix"),
    ("chat/completions", {"chat_template_kwargs": {"tokenize": "secret"}}, "invalid_value", "chat_template_kwargs"),
    ("chat/completions", {"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
    ("chat/completions", {"chat_template_kwargs": {"add_generation_prompt": False}}, "invalid_value", None),
    ("chat/completions", {"chat_template_kwargs": {"chat_template": "secret"}}, "invalid_value", None),
    ("chat/completions", {"chat_template_kwargs": ["secret"]}, "invalid_value", "chat_template_kwargs"),
    ("completions", {"chat_template_kwargs": {"enable_thinking": False}}, "unsupported_parameter", None),
    ("completions", {"stop": ["secret"] * 17}, "invalid_value", "stop"),
    ("completions", {"stop": ""}, "invalid_value", "stop.0"),
]


@pytest.mark.parametrize(
    "path, fields, code, param", WRONG, ids=[f"{next(iter(w[1]))}-{n}" for n, w in enumerate(WRONG)]
)
def test_wrong_requests_are_told_what_is_wrong_and_not_quoted(shared, path, fields, code, param):
    handler, url = shared
    body = {**(CHAT if path.startswith("chat") else TEXT), **fields}
    found = httpx.post(f"{url}/v1/{path}", json=body, headers={"Authorization": "Bearer uf-key-of-alice"})
    error = found.json()["error"]
    assert found.status_code == 400 and error["code"] == code and error["type"] == "invalid_request_error", error
    assert param is None or error["param"] == param, error
    assert "secret" not in found.text and handler.active == 0
    assert found.headers["x-request-id"].startswith("req-")


HALF = "half of a character \ud83d"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}], "stream": True}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("chat/completions", {"messages": [{"role": HALF, "content": "x"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "name": HALF}]}),
        ("chat/completions", {"chat_template_kwargs": {"x": [HALF]}}),
        ("completions", {"prompt": HALF}),
        ("completions", {"prompt": ["x", HALF]}),
        ("completions", {"stop": [HALF]}),
        ("completions", {"model": HALF}),
        ("completions", {"forget": [HALF]}),
        ("completions", {"forget": {HALF: 1}}),
        ("completions", {"user": HALF}),
        ("completions", {"metadata": {"a": {"b": [HALF]}}}),
        ("completions", {HALF: 1}),
        ("completions", {"\udfff": None}),
        ("completions", {"stream_options": {HALF: 1}}),
    ],
)
def test_half_of_a_character_anywhere_is_the_clients_fault(shared, path, fields):
    handler, url = shared
    body = {**(CHAT if path.startswith("chat") else TEXT), "max_tokens": 1, **fields}
    for content in (json.dumps(body).encode(), json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")):
        found = httpx.post(f"{url}/v1/{path}", content=content, headers={"Authorization": "Bearer uf-key-of-alice"})
        error = found.json()["error"]
        assert found.status_code == 400 and error["code"] == "invalid_value", error
        assert set(error) == {"message", "type", "param", "code"} and handler.active == 0
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_half_of_a_character_in_an_address_or_a_key(shared):
    _, url = shared
    headers = {"Authorization": "Bearer uf-key-of-alice"}
    for place in ("models/%ED%A0%BD", "models/%FF", "models?x=%ED%A0%BD&y=%FF", "%ED%A0%BD"):
        found = httpx.get(f"{url}/v1/{place}", headers=headers)
        assert found.status_code == (200 if "?" in place else 404) and "models?" in place or "error" in found.json()
    for key in (b"Bearer \xed\xa0\xbd", b"Bearer \xff"):
        assert (
            httpx.get(f"{url}/v1/models", headers={"Authorization": key}).json()["error"]["type"]
            == "authentication_error"
        )


def test_an_error_that_nobody_expected_has_the_shape_too(shared, monkeypatch):
    handler, url = shared

    async def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(handler, "identify", broken)
    for found in (httpx.get(f"{url}/v1/models"), httpx.post(f"{url}/v1/completions", json=TEXT)):
        assert (
            found.status_code == 500
            and found.json()["error"]["code"] == "internal_error"
            and "secret" not in found.text
        )


def test_the_template_gets_its_variables(shared, monkeypatch):
    handler, url = shared
    prompts = handler.engine._prompts
    template = prompts._tokenizer.chat_template + "{% if enable_thinking is false %}<think></think>{% endif %}"
    monkeypatch.setattr(prompts._tokenizer, "chat_template", template)
    seen = []
    monkeypatch.setattr(handler.engine, "_prompts", lambda *asked: seen.append(prompts(*asked)) or seen[-1])
    for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": None}):
        headers = {"Authorization": "Bearer uf-key-of-alice"}
        body = {**CHAT, "max_tokens": 1, **more}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    texts = [prompts._tokenizer.decode(ids) for ids in seen]
    assert texts[1] == texts[0] + "<think></think>" and texts[2] == texts[0]


def test_what_changes_nothing_is_accepted(shared):
    _, url = shared
    neutral = {"user": "x", "metadata": {}, "store": False, "tools": [], "response_format": {"type": "text"}, "n": None,
               "tool_choice": "none", "logit_bias": {}, "stream": False, "stop": None, "max_tokens": 2}  # fmt: skip
    headers = {"Authorization": "Bearer uf-key-of-alice"}
    assert httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **neutral}, headers=headers).status_code == 200
    for content in (b"{", b"[]", b"\xff", b""):
        found = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
        assert found.status_code == 400 and found.json()["error"]["code"] == "invalid_json"
    wrong = httpx.post(f"{url}/v1/completions", json={**TEXT, "model": "gpt-4"}, headers=headers)
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"


def test_no_policy_no_answer(serve, values):
    source = Fixed(values)
    handler, url = serve(policy=source)
    assert complete(client(url), "x").choices
    source.policy = PolicyError("the file /etc/policy is gone")
    with pytest.raises(openai.InternalServerError) as told:
        complete(client(url), "x")
    assert told.value.status_code == 503 and told.value.code == "policy_unavailable" and "/etc" not in str(told.value)
    ready = httpx.get(f"{url}/readyz")
    assert ready.status_code == 503 and ready.json()["problem"] == "there is no valid policy"


def test_without_a_policy_anyone_is_the_local_tenant(serve, values):
    tenants = {"local": {"forget": [], "may_add": ["a"]}}
    _, url = serve(policy=changed(values, tenants=tenants), open_tenant="local")
    assert complete(client(url, "anything"), "green", extra_body={"forget": ["a"]}).system_fingerprint != "fp_base"
    for name, status in (("localhost:1", 200), ("[::1]", 200), ("evil.example", 400)):  # a page's own name, rebound
        assert httpx.get(f"{url}/v1/models", headers={"Host": name}).status_code == status


# ---- limits ----


def test_limits_of_body_prompt_and_tokens(serve):
    _, url = serve(limits=Limits(body_bytes=500, prompt_tokens=5, max_tokens=7))
    ask = client(url)
    with pytest.raises(openai.APIStatusError) as told:
        complete(ask, "x" * 600)
    assert told.value.status_code == 413 and told.value.code == "body_too_large"
    with pytest.raises(openai.BadRequestError, match="at most 5"):
        complete(ask, PROMPTS[2])
    with pytest.raises(openai.BadRequestError, match="at most 7"):
        complete(ask, "x", 8)
    assert complete(ask, "x", 7).usage.completion_tokens == 7


def test_a_full_queue_says_when_to_come_again(serve):
    handler, url = serve(engine={"max_batch": 1}, limits=Limits(batch=1, queue=2, per_tenant=2))
    slow(handler)
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(complete, client(url, "alice"), "green", 100) for _ in range(2)]
        wait_for(lambda: handler.active == 2)
        with pytest.raises(openai.RateLimitError) as told:
            complete(client(url, "alice"), "green")
        assert told.value.code == "queue_full" and 1 <= int(told.value.response.headers["retry-after"]) <= 60
        jobs.append(pool.submit(complete, client(url, "bob"), "green", 100))
        wait_for(lambda: handler.active == 3)
        with pytest.raises(openai.RateLimitError):
            complete(client(url, "carol"), "green")
        assert all(job.result().usage.completion_tokens == 100 for job in jobs) and handler.active == 0
        patient = client(url, "carol", max_retries=8)
        assert all(one.choices for one in pool.map(lambda _: complete(patient, "green", 20), range(4)))


def test_time(serve):
    handler, url = serve(engine={"max_batch": 1}, limits=Limits(batch=1, seconds=0.2))
    with pytest.raises(openai.APIStatusError) as told:
        complete(client(url), "green", 245, n=16)
    assert told.value.status_code == 504 and told.value.code == "timeout"
    with pytest.raises(openai.APIError, match="too long"):
        list(complete(client(url), "green", 245, n=16, stream=True))
    wait_for(
        lambda: handler.active == 0 and handler.engine.stats().running == 0 and handler.engine.stats().waiting == 0
    )
    assert complete(client(url), "green", 2).choices


def test_a_client_that_goes_away_stops_its_answer(serve):
    handler, url = serve(engine={"max_batch": 1}, limits=Limits(batch=1))
    slow(handler)
    engine, headers = handler.engine, {"Authorization": "Bearer uf-key-of-alice"}
    body = {**TEXT, "max_tokens": 240, "ignore_eos": True, "temperature": 0, "n": 12}
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, headers=headers) as response:
        next(response.iter_lines())
    wait_for(lambda: handler.active == 0 and engine.stats().running == 0 and engine.stats().waiting == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=0.5)
    wait_for(lambda: handler.active == 0 and engine.stats().running == 0 and engine.stats().waiting == 0)
    text = httpx.get(f"{url}/metrics").text
    assert 'unlearn_peft_requests_total{status="499",tenant="alice"} 2.0' in text
    assert engine.scheduler.alive and complete(client(url), "green", 2).choices


# ---- metrics and audit ----


def test_metrics(serve):
    _, url = serve()
    usage = complete(client(url, "alice"), "green", 5).usage
    _fails(lambda: complete(client(url, "nobody"), "x"))
    _fails(lambda: complete(client(url, "bob"), "x", extra_body={"tools": [1]}))
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
    value = lambda name: float(lines[f"unlearn_peft_{name}"])  # noqa: E731
    assert value('requests_total{status="200",tenant="alice"}') == 1
    assert value('requests_total{status="400",tenant="bob"}') == 1
    assert value('tokens_total{kind="completion",tenant="alice"}') == 5
    assert value('tokens_total{kind="prompt",tenant="alice"}') == usage.prompt_tokens
    assert value('refusals_total{code="invalid_api_key"}') == 1
    assert value("resident_adapters") == 1 and value("resident_adapter_bytes") > 0
    assert value("adapter_loads_total") == 1 and value("adapter_load_seconds_total") > 0
    assert value("batch_size") == value("queue_size") == value("active_answers") == 0
    assert value("request_seconds_count") == 2 and value("first_token_seconds_count") == 1


def _fails(call):
    with pytest.raises(openai.APIStatusError):
        call()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_says_what_was_applied_and_no_prompt(serve, tmp_path, adapters, values):
    from unlearn_peft.adapters.read import read_bundle

    log = AuditLog(tmp_path / "logs" / "audit.jsonl", fsync=True)
    handler, url = serve(audit=log)
    answer = complete(client(url, "bob"), "green secret", 5, extra_body={"forget": {"a": 2.0}})
    list(complete(client(url, "carol"), "green secret", 5, stream=True))
    _fails(lambda: complete(client(url, "bob"), "secret", extra_body={"tools": [1]}))
    _fails(lambda: complete(client(url, "bob"), "secret", extra_body={"forget": ["zzz"]}))
    text = log.path.read_text()
    assert "secret" not in text and answer.choices[0].text not in text and "uf-" not in text
    lines = lines_of(log.path)
    assert [(line["event"], line["tenant"], line.get("status")) for line in lines] == [
        ("admitted", "bob", None), ("finished", "bob", 200), ("admitted", "carol", None), ("finished", "carol", 200),
        ("finished", "bob", 400), ("finished", "bob", 403),
    ]  # fmt: skip
    want = {"b": (1.0, "b"), "c": (0.5, "c"), "a": (2.0, "a")}
    assert {a["name"]: (a["strength"], a["sha256"]) for a in lines[0]["adapters"]} == {
        name: (strength, read_bundle(adapters[name]).identity) for name, (strength, _) in want.items()
    }
    assert lines[0]["id"] == lines[1]["id"] and answer.id.removeprefix("cmpl-") in lines[0]["id"]
    assert answer.system_fingerprint == "fp_" + lines[0]["set"][:16] and lines[2]["set"] == ""
    assert lines[1]["completion_tokens"] == 5 and lines[1]["prompt_tokens"] == answer.usage.prompt_tokens
    assert lines[0]["policy"] == handler.policies.current().version and lines[4]["adapters"] is None
    assert lines[4]["code"] == "unsupported_parameter" and log.path.stat().st_mode & 0o077 == 0


def test_prompts_are_audited_only_when_asked_for(serve, tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", prompts=True)
    _, url = serve(audit=log)
    answer = complete(client(url), "green blue", 5)
    first, last = lines_of(log.path)
    assert first["asked"] == ["green blue"] and last["answers"] == [answer.choices[0].text]


def test_an_audit_log_that_cannot_be_written_refuses(serve, tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    handler, url = serve(audit=log)
    monkeypatch.setattr(log, "_append", _full)
    with pytest.raises(openai.InternalServerError) as told:
        complete(client(url), "green")
    assert told.value.status_code == 503 and told.value.code == "audit_unavailable"
    wait_for(lambda: handler.engine.stats().running == 0)
    log.required = False
    assert complete(client(url), "green").choices


def _full(line):
    raise OSError(28, "No space left on device")


def test_the_audit_log_is_moved_aside_whole(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=400, keep=3)
    for n in range(40):
        log.write("finished", number=n, text="é" * 10)
    log.close()
    files = [log.path, *(tmp_path / f"audit.jsonl.{n}" for n in (1, 2, 3))]
    assert sorted(tmp_path.iterdir()) == sorted(files) and all(f.stat().st_size <= 400 for f in files)
    numbers = [line["number"] for file in reversed(files) for line in lines_of(file)]
    assert numbers == list(range(numbers[0], 40))
    log = AuditLog(str(log.path), max_bytes=400)  # goes on where it was, and keeps all
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.write("x", number=n), range(200)))
    seen = [line.get("number") for file in tmp_path.iterdir() for line in lines_of(file) if line["event"] == "x"]
    assert sorted(seen) == list(range(200))
    with pytest.raises(OutputError, match="audit log"):
        AuditLog(tmp_path / "audit.jsonl.1" / "no")


def test_by_peft_differs_from_the_base(tiny_folder, adapters):
    """The reference itself: each set gives other logits than the base."""
    import torch

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = by_peft(tiny_folder, {})[1](input_ids=ids).logits
        for path in adapters.values():
            assert (by_peft(tiny_folder, {path: 1.0})[1](input_ids=ids).logits - base).abs().max() > 0.05
