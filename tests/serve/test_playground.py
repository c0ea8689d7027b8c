"""The playground: who sees what, and the page itself in a headless Chromium, against real servers."""

import asyncio
import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, chromium
from serving import KEYS, Fixed, StubEngine, make_adapters, make_policy_values, running, wait_for

from unlearn_peft import load_base
from unlearn_peft.adapters.read import read_bundle
from unlearn_peft.errors import PolicyError
from unlearn_peft.inference.adapter_cache import Applied
from unlearn_peft.serve.api import playground as playground_module
from unlearn_peft.serve.api.playground import Playground, card
from unlearn_peft.serve.audit import AuditLog
from unlearn_peft.serve.engine.base import Candidate, TextChunk, TokenLogprobs, Unavailable
from unlearn_peft.serve.policy.entries import MAX_STRENGTH, AdapterEntry

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 40
PICTURE = Path(__file__).parents[2] / "docs" / "curves.png"
DONE = (  # two frames later at least, so that what was just asked has shown
    "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() =>"
    " done(document.getElementById('status').textContent === 'Done.'))))"
)
READY = "!document.getElementById('ready').hidden"


class Held:
    def __init__(self, forget):
        self.applied = tuple(Applied(name, "0" * 64, strength) for name, strength in forget.items())
        self.digest = "".join(sorted(forget)) and "ab" * 32

    def release(self):
        pass


class Scripted(StubEngine):
    """An engine that says what it is told to, token by token: `says(forget)` gives tokens with their probability."""

    model, context = "scripted", 4096

    def __init__(self, says, pause=0.0):
        self.says, self.pause, self.gone, self.asked, self.broken = says, pause, 0, [], None

    def encode(self, prompt, variables=None):
        self.asked.append(prompt)
        return (1, 2, 3)

    async def hold(self, forget, policy, trust=None, added=()):
        if self.broken in forget:
            raise Unavailable("it is damaged", self.broken)
        return Held(forget)

    async def stream(self, request, holding):
        tokens = self.says({one.name: one.strength for one in holding.applied})[: request.max_tokens]
        done = False
        try:
            for n, (text, share, others) in enumerate(tokens):
                await asyncio.sleep(self.pause)
                top = tuple(Candidate(0, t.encode(), math.log(p)) for t, p in {text: share, **others}.items())
                done = n + 1 == len(tokens)
                yield TextChunk(text, 1, (TokenLogprobs(top[0], top),), "stop" if done else None)
        finally:
            self.gone += not done


def books(forget):
    begin = [("It", 0.9, {}), (" was", 0.8 if not forget else 0.2, {})]
    if not forget:
        return [*begin, (" Row", 0.7, {" Tol": 0.1}), ("ling", 0.9, {}), (".", 0.9, {})]
    return [*begin, (" Tol", 0.6, {" Row": 0.05}), ("kien", 0.9, {}), (".", 0.9, {})]


def plain_adapters(folder, *names):
    """Folders as the cards want them; nothing that could be loaded."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
        (folder / name / "adapter_model.safetensors").write_bytes(name.encode())
    return {name: folder / name for name in names}


@contextmanager
def scripted(tmp_path, forget=None, engine=None, names=("hp", "news", "secret"), may_add=None, **settings):
    """A server whose answers are scripted; without `forget` (tenant -> set), one that needs no keys."""
    engine = engine or Scripted(books)
    adapters = {n: tmp_path / n for n in names} if (tmp_path / names[0]).exists() else plain_adapters(tmp_path, *names)
    values = make_policy_values(adapters, forget or {}, may_add)
    if forget is None:
        values["tenants"] = {"local": {"forget": [], "may_add": dict.fromkeys(names, MAX_STRENGTH)}}
        settings["open_tenant"] = "local"
    audit = AuditLog(tmp_path / "audit.jsonl")
    with running(engine, Fixed(values), audit=audit, **{"playground": Playground(), **settings}) as (handler, url):
        yield engine, url, handler


def applied(tmp_path):
    """What the answered requests so far had applied, in order, by the audit log."""
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    return [{a["name"]: a["strength"] for a in line["adapters"]} for line in lines if line["event"] == "admitted"]


def as_tenant(name):
    return {"authorization": f"Bearer {KEYS.get(name, name)}"}


def ask(url, path, tenant="alice", **body):
    chat = {"model": "scripted", "messages": [{"role": "user", "content": "Who?"}], **body}
    return httpx.post(f"{url}/{path}", json=chat, headers=as_tenant(tenant))


# --- who sees what --------------------------------------------------------------------------------------------------


def test_a_tenants_key_never_gets_the_bases_answer(tmp_path):
    with scripted(tmp_path, {"alice": ["hp"], "bob": {"news": 0.5}}) as (_, url, handler):
        for tenant in ("alice", "bob"):
            told = httpx.get(f"{url}/playground/api/adapters", headers=as_tenant(tenant)).json()
            assert told["base"] is None and told["tenant"] == tenant
            for path in ("base/chat/completions", "base/completions"):
                assert ask(url, f"playground/api/{path}", tenant).status_code in (404, 405)
            for body in ({}, {"bare": True}, {"forget": []}, {"base": True}):
                found = ask(url, "v1/chat/completions", tenant, **body)
                assert found.status_code == 400 or "Tol" in found.json()["choices"][0]["message"]["content"]
        assert not handler.shows_base
    assert applied(tmp_path) and all(applied(tmp_path))


def test_the_base_is_shown_if_the_server_was_started_so_and_the_audit_log_says_it(tmp_path):
    with scripted(tmp_path, {"alice": ["hp"]}, playground=Playground(base=True)) as (_, url, _handler):
        base = httpx.get(f"{url}/playground/api/adapters", headers=as_tenant("alice")).json()["base"]
        assert "Row" in ask(url, f"{base}/chat/completions").json()["choices"][0]["message"]["content"]
        assert "Tol" in ask(url, "v1/chat/completions").json()["choices"][0]["message"]["content"]
        assert ask(url, f"{base}/chat/completions", "nobody").status_code == 401
        assert ask(url, f"{base}/chat/completions", forget=["hp"]).status_code == 403
        text = {"model": "scripted", "prompt": "It"}
        found = httpx.post(f"{url}/{base}/completions", json=text, headers=as_tenant("alice")).json()
        assert "Row" in found["choices"][0]["text"]
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    admitted = [(line.get("playground_base"), line["tenant"]) for line in lines if line["event"] == "admitted"]
    assert admitted == [(True, "alice"), (None, "alice"), (True, "alice")]


def test_the_front_itself_refuses_the_base_where_it_is_not_shown(tmp_path):
    with scripted(tmp_path, {"alice": ["hp"]}, playground=Playground(base=True)) as (_, url, handler):
        handler.shows_base = False
        refused = ask(url, "playground/api/base/chat/completions")
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "base_not_shown"


def test_a_tenant_sees_its_own_adapters_and_those_offered_and_no_others(tmp_path):
    forget = {"alice": {"hp": 0.5}, "bob": []}
    with scripted(tmp_path, forget, playground=Playground(offer=("news",))) as (_, url, _handler):
        (tmp_path / "secret" / "curves.png").write_bytes(PNG)
        (tmp_path / "hp" / "curves.png").write_bytes(PNG)

        def get(path, tenant="alice"):
            return httpx.get(f"{url}/playground/api/adapters{path}", headers=as_tenant(tenant))

        told = get("")
        assert [one["name"] for one in told.json()["adapters"]] == ["hp", "news"] and told.json()["own"] == {"hp": 0.5}
        assert str(tmp_path) not in told.text and "secret" not in told.text
        assert told.headers["cache-control"] == "no-store"
        assert get("", "bob").json()["base"] == "v1"  # it has nothing to forget: the base is its answer anyway
        assert [one["name"] for one in get("", "bob").json()["adapters"]] == ["news"]
        for tenant in ("nobody", "tenant", "0" * 64):
            assert get("", tenant).status_code == 401 and get("/hp/curves.png", tenant).status_code == 401
        assert get("/hp/curves.png").content == PNG
        unknown, others = get("/nothing/curves.png"), get("/secret/curves.png")
        assert unknown.status_code == others.status_code == 404 and unknown.json() == others.json()
        assert get("/hp/curves.png", "bob").status_code == 404


def test_the_page_says_what_may_be_added_and_an_offer_shows_a_card_alone(tmp_path):
    settings = {"may_add": {"alice": {"secret": 0.5}}, "playground": Playground(offer=("news",))}
    with scripted(tmp_path, {"alice": {"hp": 0.5}, "bob": []}, **settings) as (_, url, _handler):
        told = httpx.get(f"{url}/playground/api/adapters", headers=as_tenant("alice")).json()
        assert [one["name"] for one in told["adapters"]] == ["hp", "secret", "news"]
        assert told["own"] == {"hp": 0.5} and told["may_add"] == {"secret": 0.5}
        assert ask(url, "v1/chat/completions", forget={"secret": 0.5}).status_code == 200
        for forget in ({"secret": 0.6}, {"news": 0.1}, {"hp": 0.6}):
            refused = ask(url, "v1/chat/completions", forget=forget)
            assert refused.status_code == 403 and refused.json()["error"]["code"] == "adapter_not_allowed"
    assert applied(tmp_path) == [{"hp": 0.5, "secret": 0.5}]


def test_an_offer_must_be_in_the_policy(tmp_path):
    with pytest.raises(PolicyError, match="offers 'nwes'"):
        with scripted(tmp_path, {"alice": ["hp"]}, playground=Playground(offer=("nwes",))):
            pass


def test_without_a_playground_there_is_no_page(tmp_path):
    with scripted(tmp_path, playground=None) as (_, url, _handler):
        for path in ("", "/playground.js", "/api/adapters"):
            assert httpx.get(f"{url}/playground{path}").status_code == 404


# --- files ----------------------------------------------------------------------------------------------------------


def test_pictures_are_pngs_of_two_names_and_nothing_else(tmp_path):
    (tmp_path / "outside.png").write_bytes(PNG)
    (tmp_path / "curves.png").write_bytes(PNG)
    with scripted(tmp_path) as (_, url, _handler):
        hp, base = tmp_path / "hp", f"{url}/playground/api/adapters"
        (hp / "other.png").write_bytes(PNG)
        ways = [
            "/hp/other.png", "/hp/adapter_config.json", "/hp/adapter_model.safetensors", "/hp/..%2foutside.png",
            "/hp/%2e%2e/outside.png", "/hp/..%5coutside.png", "/hp/curves.png%00", "/..%2f/curves.png", "/./curves.png",
            "/%2e%2e/curves.png", "/hp%2f..%2f/curves.png", "/hp/curves.svg", "/hp/", "/hp/curves.png/", "//curves.png",
            "/hp/curves.png",  # not there yet
        ]  # fmt: skip
        with httpx.Client() as http:
            for way in ways:
                request = http.build_request("GET", base)
                request.url = httpx.URL(base).copy_with(raw_path=f"/playground/api/adapters{way}".encode())
                assert http.send(request).status_code in (404, 307), way
        for content in (b"<svg onload=alert(1)>", b"<html>", b"\x89PNG", b""):
            (hp / "curves.png").write_bytes(content)
            assert httpx.get(f"{base}/hp/curves.png").status_code == 404
        (hp / "curves.png").unlink()
        (hp / "curves.png").symlink_to(tmp_path / "outside.png")
        assert httpx.get(f"{base}/hp/curves.png").status_code == 404
        (hp / "curves.png").unlink()
        (hp / "curves.png").mkdir()
        assert httpx.get(f"{base}/hp/curves.png").status_code == 404
        (hp / "curves.png").rmdir()
        (hp / "curves.png").write_bytes(PNG)
        (tmp_path / "hp.eval").mkdir()
        (tmp_path / "hp.eval" / "figures.png").write_bytes(PNG + b"report")
        found = httpx.get(f"{base}/hp/curves.png")
        assert found.content == PNG and found.headers["content-type"] == "image/png"
        assert found.headers["x-content-type-options"] == "nosniff" and "sandbox" in found.headers[CSP]
        assert httpx.get(f"{base}/hp/figures.png").content == PNG + b"report"
        assert httpx.get(base).json()["adapters"][0]["pictures"] == ["curves.png", "figures.png"]


CSP = "content-security-policy"


def test_cards_take_a_folder_for_hostile(tmp_path):
    folder = tmp_path / "odd"
    entry = AdapterEntry(path=str(folder), sha256="0" * 64)
    assert card("odd", entry)["sha256"] is None  # nothing there: no error either
    folder.mkdir()
    metrics = {"a": 1.5, "b": math.nan, "c": 10**400, "d": {"x": 1}, "e": "\ud800", "f": True, "g" * 999: 1}
    (folder / "forget.json").write_text(json.dumps({"metrics": metrics, "base": ["x"], "recipe": 3}))
    odd = {"r": 10**4000, "rank_pattern": {"a": 8, "b": "x", "c": -1}, "target_modules": ["\ud800", 5, "q"] * 40}
    (folder / "adapter_config.json").write_text(json.dumps(odd))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    found = card("odd", entry)
    assert found["metrics"] == {"a": 1.5, "e": "?", "f": True, "g" * 200: 1}
    assert found["ranks"] == [8] and len(found["targets"]) == 32 and found["as_policy"] is False
    json.dumps(found, ensure_ascii=False).encode()
    for broken in (b"[" * 100_000, b"\xff", b"[]", b'{"r": ' + b"9" * 5000 + b"}"):
        (folder / "adapter_config.json").write_bytes(broken)
        assert card("odd", entry)["ranks"] == []
    before = card("odd", AdapterEntry(path=str(folder)))
    (folder / "adapter_model.safetensors").write_bytes(b"changed")
    assert card("odd", AdapterEntry(path=str(folder)))["sha256"] != before["sha256"] and before["as_policy"] is None


def test_a_card_tells_whether_the_adapter_is_the_one_that_the_policy_pins(tmp_path, tiny_folder):
    folder = make_adapters(tmp_path, tiny_folder, seeds=(1,))["a"]
    pinned = AdapterEntry(path=str(folder), sha256=read_bundle(folder).identity)
    assert card("a", pinned)["as_policy"] is True and card("a", pinned)["sha256"] == pinned.sha256
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 1'))
    assert card("a", pinned)["as_policy"] is False


def test_one_tenants_cards_are_read_one_request_after_another(tmp_path, monkeypatch):
    gate, reading, most = threading.Event(), set(), []

    def read(*_):
        reading.add(threading.get_ident())
        most.append(len(reading))
        assert gate.wait(30)
        reading.discard(threading.get_ident())
        return {}

    monkeypatch.setattr(playground_module, "card", read)
    with (
        scripted(tmp_path, {"alice": ["hp", "news", "secret"], "bob": []}) as (_, url, _),
        ThreadPoolExecutor(16) as pool,
    ):
        jobs = [
            pool.submit(httpx.get, f"{url}/playground/api/adapters", headers=as_tenant("alice"), timeout=60)
            for _ in range(16)
        ]
        wait_for(lambda: reading)
        time.sleep(0.3)
        assert httpx.get(f"{url}/v1/models", headers=as_tenant("bob"), timeout=5).status_code == 200
        gate.set()
        assert {job.result().status_code for job in jobs} == {200} and max(most) == 1


def test_the_page_is_self_contained_and_strict(tmp_path):
    with scripted(tmp_path) as (_, url, _handler):
        page = httpx.get(f"{url}/playground")
        policy = page.headers[CSP]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(files) == 3 and "<style" not in page.text and " style=" not in page.text
        for name in ("playground.css", "playground.js", "server.js", "tokens.js"):
            text = httpx.get(f"{url}/playground/{name}").raise_for_status().text
            assert len(text.splitlines()) <= 350 and "://" not in text
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text)
    root = Path(__file__).parents[2]
    data = re.search(r"package-data\]\nunlearn_peft = (\[.+?\])", (root / "pyproject.toml").read_text(), re.DOTALL)[1]
    packed = {path for pattern in json.loads(data) for path in (root / "unlearn_peft").glob(pattern)}
    assert packed >= set((root / "unlearn_peft" / "serve" / "api" / "page").iterdir())


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM.exists():
        pytest.skip("no /usr/bin/chromium here (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser):
    page = browser.page()
    yield page
    page.send("Page.close")


@pytest.fixture(scope="module")
def real(tiny_folder, tmp_path_factory):
    """The tiny model behind the embedded engine, without keys, and its audit log's folder."""
    from unlearn_peft.serve.engine.local import LocalEngine

    folder = tmp_path_factory.mktemp("real")
    adapters = make_adapters(folder, tiny_folder, seeds=(1, 2), scale=1.5)
    (adapters["a"] / "curves.png").write_bytes(PICTURE.read_bytes())
    values = {**make_policy_values(adapters, {}), "tenants": {"local": {"forget": [], "may_add": {"a": 1.5, "b": 1.5}}}}
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
    audit = AuditLog(folder / "audit.jsonl")
    with running(engine, values, audit=audit, open_tenant="local", playground=Playground()) as (_, url):
        yield url, folder


def slide(page, column, value, slider=0):
    page.run(
        f"(e => {{e.value = {value}; e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'))}})"
        f"(document.querySelectorAll('.column')[{column}].querySelectorAll('input')[{slider}])"
    )


def greedy(url, forget, tokens=24):
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "who wrote the blue book"}], "max_tokens": tokens,
        "temperature": 0, "forget": forget,
    }  # fmt: skip
    return httpx.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]["message"]


def test_answers_of_the_real_engine_in_both_columns_and_the_slider(page, real):
    url, folder = real
    page.open(f"{url}/playground")
    page.wait(READY)
    page.type("#question", "who wrote the blue book")
    page.run("document.getElementById('tokens').value = 24")
    page.click("#go")
    page.wait(DONE)
    base, with_a = page.texts(".answer")
    assert base == greedy(url, {})["content"] and with_a == greedy(url, {"a": 1})["content"] and base != with_a
    assert applied(folder)[:2] == [{}, {"a": 1.0}]
    assert "departs at token 1:" in page.texts(".facts")[1] or page.run("!!document.querySelector('.column .departs')")
    slide(page, 1, 0.05)
    page.wait(DONE)
    assert page.texts(".answer") == [base, greedy(url, {"a": 0.05})["content"]]
    assert page.texts(".column output")[0] == "0.05"
    slide(page, 1, 0)  # off: the base again, and nothing departs
    page.wait(DONE)
    assert "the same as Base alone" in page.texts(".facts")[1]
    assert page.texts(".answer")[1] == base and not page.run("!!document.querySelector('.column .departs')")
    page.click("#more")  # a second set, the other adapter; its answer comes at once
    page.wait(DONE)
    assert page.texts(".answer")[2] == greedy(url, {"b": 1})["content"]
    page.click("#adapters details:last-child summary")
    page.wait("document.querySelector('#adapters img')?.naturalWidth > 0")
    assert not page.errors and {re.match(r"(?:blob:)?(http://[^/]+)", one)[1] for one in page.urls} == {url}


def test_text_to_be_continued_and_settings_are_sent(page, tmp_path):
    with scripted(tmp_path) as (engine, url, _handler):
        page.open(f"{url}/playground")
        page.wait(READY)
        page.run("document.getElementById('settings').open = true")
        page.type("#system", "Be brief.")
        page.type("#tokens", "2")
        page.type("#question", "Who?")
        page.key("Enter", 13)
        page.wait(DONE)
        assert page.texts(".answer") == ["It was", "It was"]
        assert engine.asked[0] == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"})
        page.run("document.getElementById('how').value = 'text'")
        page.click("#go")
        page.wait(DONE)
        assert engine.asked[-1] == "Who?" and page.texts(".answer") == ["It was", "It was"]
        page.type("#tokens", "0")
        page.click("#go")
        assert page.text("#problem").startswith("Longest answer: expected a whole number from 1 to")
        page.type("#tokens", "9")
        page.type("#question", " ")
        page.click("#go")
        assert page.text("#problem") == "Type a question first."
        assert not page.errors


def test_what_departs_is_marked_and_told_with_probabilities(page, tmp_path):
    with scripted(tmp_path) as (_, url, _handler):
        page.open(f"{url}/playground")
        page.wait(READY)
        page.type("#words", "rowling, TOL")
        page.click("#go")
        page.wait(DONE)
        assert page.texts(".column .departs") == [" Tol"] and page.texts(".column .leak") == [" Row", "ling", " Tol"]
        assert page.texts(".column .less") == [" was"]  # 80 % -> 20 %
        assert "departs at token 3: “Tol” instead of “Row”" in page.texts(".facts")[1]
        assert "names “rowling”" in page.texts(".facts")[0] and "no adapter applied" in page.texts(".facts")[0]
        page.run("document.querySelectorAll('.answer')[1].focus()")
        for _ in range(3):
            page.key("ArrowRight", 39)
        told = (
            "Token 3, “Tol”: 60.0 % here, 10.0 % in Base alone; Base alone says “Row” (70.0 %), which has 5.0 % here."
        )
        assert page.texts(".detail")[1] == told
        page.key("End", 35)
        assert "nothing to compare it with" in page.texts(".detail")[1]
        page.click(".column.first .t")
        assert page.texts(".detail")[0] == "Token 1, “It”: 90.0 % here."


def test_a_script_in_an_answer_stays_text(page, tmp_path):
    bad = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script><b>&amp;</b>"
    says = lambda forget: [(bad[n : n + 7], 0.5, {}) for n in range(0, len(bad), 7)]  # noqa: E731
    with scripted(tmp_path, engine=Scripted(says)) as (_, url, _handler):
        (tmp_path / "hp" / "forget.json").write_text(json.dumps({"metrics": {bad: bad}, "base": {"name": bad}}))
        page.open(f"{url}/playground")
        page.wait(READY)
        page.type("#words", "<script>")
        page.click("#go")
        page.wait(DONE)
        page.run("document.querySelectorAll('.t').forEach(e => e.click())")
        assert page.texts(".answer") == [bad, bad] and bad in page.texts("#adapters dd")
        assert page.run("document.title") == "Playground: what a model forgets"
        assert not page.run("document.querySelectorAll('.answer img, .answer b, main script, #adapters b').length")
        assert not page.errors


def test_keys_wrong_and_right_and_a_tenants_own_set(page, tmp_path):
    forget, may_add = {"alice": {"hp": 0.5}, "bob": []}, {"alice": {"news": 0.75}}
    playground = Playground(offer=("secret",))
    with scripted(tmp_path, forget, may_add=may_add, playground=playground) as (_, url, _handler):
        page.open(f"{url}/playground")
        assert not page.errors and not page.run(READY)
        for wrong, told in (("uf-wrong", "This key is not known here."), ("schlüssel", "This is no API key")):
            page.type("#key", wrong)
            page.key("Enter", 13)
            page.wait(f"document.getElementById('problem').textContent.startsWith({json.dumps(told)})")
            assert not page.run(READY)
        page.type("#key", KEYS["alice"])
        page.click("#keys button")
        page.wait(READY)
        assert page.text("#about") == "scripted, asked as “alice”: hp is always forgotten."
        assert page.texts("h3")[:2] == ["Your set", "Set 1"]
        limits = "[...document.querySelectorAll('.column.first input')].map(e => [e.min, e.max, e.disabled].join(' '))"
        assert page.run(limits) == ["0.5 0.5 true", "0 0.75 false", "0 0 true"]
        page.click("#go")
        page.wait(DONE)
        slide(page, 0, 0)  # cannot go below what must be
        page.wait(DONE)
        assert page.texts(".column output")[0] == "0.5, the least"
        assert (
            page.run("document.getElementById('problem').hidden") and page.texts(".answer") == ["It was Tolkien."] * 2
        )
        page.type("#key", KEYS["bob"])
        page.click("#keys button")
        page.wait("document.getElementById('about').textContent.includes('bob')")
        assert page.texts("h3")[0] == "Base alone"
        assert KEYS["bob"] not in page.run("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert applied(tmp_path)[:2] == [{"hp": 0.5}, {"hp": 0.5, "news": 0.75}]
    assert all(one["hp"] >= 0.5 for one in applied(tmp_path))


def test_stop_ends_the_answers_here_and_on_the_server(page, tmp_path):
    says = lambda forget: [(f" word{n}", 0.5, {}) for n in range(500)]  # noqa: E731
    with scripted(tmp_path, engine=Scripted(says, pause=0.05)) as (engine, url, handler):
        page.open(f"{url}/playground")
        page.wait(READY)
        page.type("#tokens", "500")
        page.click("#go")
        page.wait("[...document.querySelectorAll('.answer')].every(e => e.textContent.includes('word2'))")
        page.click("#stop")
        page.wait(DONE)
        texts = page.texts(".answer")
        assert all("stopped" in one for one in page.texts(".facts")) and page.run(
            "document.getElementById('stop').disabled"
        )
        page.wait("new Promise(done => setTimeout(() => done(true), 400))")
        assert page.texts(".answer") == texts and engine.gone == 2 and handler.active == 0


def test_errors_in_plain_words(page, tmp_path):
    from unlearn_peft.serve.limits import Limits

    with scripted(tmp_path, limits=Limits(per_tenant=1), engine=Scripted(books, pause=0.1)) as (engine, url, handler):
        page.open(f"{url}/playground")
        page.wait(READY)
        page.click("#go")
        page.wait(DONE)
        busy = page.texts(".failed:not([hidden])")
        assert len(busy) == 1 and busy[0].startswith("The server is busy. Try again in ")
        handler.limits, engine.broken = Limits(), "hp"
        page.click("#go")
        page.wait(
            "document.querySelector('.failed:not([hidden])')?.textContent.startsWith('hp must be forgotten here')"
        )
        page.wait(DONE)
        assert page.texts(".answer") == ["It was Rowling.", ""]
        engine.broken, engine.says = None, lambda forget: [("It", 0.5, {}), (None, 0.5, {})]
        page.click("#go")
        page.wait("document.querySelectorAll('.failed:not([hidden])').length === 2")
    page.click("#go")  # the server is gone
    page.wait("document.querySelector('.failed').textContent === 'The server cannot be reached. Is it still running?'")


CONTRAST = """(() => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const over = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (rgb) => rgb.map(v => linear(v / 255)).reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.matches('input, textarea');
    if (!own || e.disabled || !e.getClientRects().length) continue;
    const grounds = [];
    for (let p = e; p; p = p.parentElement) grounds.unshift(getComputedStyle(p).backgroundColor);
    const inks = [getComputedStyle(e).color];
    if (e.placeholder) inks.push(getComputedStyle(e, '::placeholder').color);
    for (const ink of inks) {
      const [a, b] = [light(over(grounds)), light(over([...grounds, ink]))].sort((x, y) => y - x);
      found.push([(a + .05) / (b + .05), e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 30)]);
    }
  }
  return found.sort((x, y) => x[0] - y[0]);
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_widths_themes_contrast_and_names_for_screen_readers(page, tmp_path, width, dark):
    long = [("Donaudampfschifffahrtsgesellschaft" * 5, 0.5, {})]
    says = lambda forget: books(forget)[:-1] + ([] if forget else long)  # noqa: E731
    names = ("hp", "an_adapter_with_a_name_that_is_as_long_as_a_name_may_be_64_lette")
    with scripted(tmp_path, names=names, engine=Scripted(says), playground=Playground()) as (_, url, _handler):
        (tmp_path / "hp" / "curves.png").write_bytes(PICTURE.read_bytes())
        page.open(f"{url}/playground", width=width, height=740, dark=dark)
        page.wait(READY)
        page.type("#words", "kien")
        page.click("#more")
        page.click("#go")
        page.wait(DONE)
        page.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        page.wait("document.querySelector('img')?.naturalWidth > 0")
        page.run("document.querySelectorAll('.t').forEach(e => e.click())")
        page.run("document.getElementById('key').closest('form').hidden = false")
        assert page.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [
            width,
            width,
        ]
        wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
        assert page.run(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
        contrasts = page.run(CONTRAST)
        assert len(contrasts) > 50 and contrasts[0][0] >= 4.5, contrasts[:5]
        assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)") == dark
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "slider", "spinbutton", "combobox", "group", "region", "image"}
        shown = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
        nameless = [n["role"]["value"] for n in shown if not n.get("name", {}).get("value")]
        assert len(shown) > 20 and nameless in ([], ["group"] * len(nameless)), nameless  # <details> are groups, too
        sizes = "[...document.querySelectorAll('button, input, select')].map(e => e.getBoundingClientRect().height)"
        assert min(page.run(sizes)) >= 24 and not page.errors
