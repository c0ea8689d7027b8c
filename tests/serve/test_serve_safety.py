"""The server fails closed, keeps tenants apart, and changes its policy and ends without losing a request."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import yaml
from serving import (  # fmt: skip
    KEYS,
    client,
    greedy_text,
    make_adapters,
    make_policy_values,
    make_secret,
    running,
    same,
    slow,
)

from unlearn_peft import load_base
from unlearn_peft.adapters.read import read_bundle
from unlearn_peft.inference.bank import Bank
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits
from unlearn_peft.serve.policy.policy import make_policy
from unlearn_peft.serve.policy.yaml_file import PolicyFile

MODEL, PROMPT = "tiny", "who wrote the blue book"


@pytest.fixture
def adapters(tmp_path, tiny_folder):
    return make_adapters(tmp_path / "adapters", tiny_folder)


def make_engine(folder, **settings):
    return LocalEngine(load_base(str(folder), device="cpu"), name=MODEL, **settings)


def ask(url, tenant, prompt=PROMPT, count=10, forget=(), **settings):
    extra = {"ignore_eos": True, **({"forget": list(forget)} if forget else {})}
    return client(url, tenant).completions.create(
        model=MODEL, prompt=prompt, max_tokens=count, temperature=0, extra_body=extra, **settings
    )


# ---- fails closed ----


def test_only_signed_adapters_are_served_and_one_flipped_byte_is_refused(adapters, tiny_folder, tmp_path):
    """A signature is needed: a signed adapter is served and its signer recorded; others, and changed ones, are not."""
    from unlearn_peft.adapters.signing import new_key, sign
    from unlearn_peft.adapters.trust import Trust
    from unlearn_peft.serve.audit import AuditLog

    private, public = new_key(tmp_path / "alice")
    for name in "ab":
        sign(adapters[name], private)
    with open(adapters["b"] / "adapter_config.json", "r+b") as file:  # b's signature no longer holds
        data = bytearray(file.read())
        data[-2] ^= 1
        file.seek(0)
        file.write(data)
    engine = make_engine(tiny_folder, trust=Trust.read(public))
    values = make_policy_values(adapters, {"alice": ["a"], "bob": ["b"], "carol": ["c"]})
    log = tmp_path / "audit.jsonl"
    with running(engine, values, audit=AuditLog(log)) as (_, url):
        assert ask(url, "alice").choices[0].text
        for tenant in ("bob", "carol"):
            with pytest.raises(openai.InternalServerError) as told:
                ask(url, tenant)
            assert told.value.status_code == 503
    signers = {one["signed_by"] for line in map(json.loads, open(log)) for one in line["adapters"] or () if one}
    assert signers == {"alice"}


def deleted(folder):
    shutil.rmtree(folder)


def truncated(folder):
    weights = folder / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 64)


def tampered(folder):
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")


def weakened(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "unpinned"])
def test_deleted_truncated_and_tampered_adapters_are_never_left_out(tmp_path, tiny_folder, adapters, pinned, caplog):
    forget = {"alice": ["a"], "bob": ["b"], "carol": ["a", "c"], "dave": ["b", "c"]}
    want = {
        tenant: greedy_text(tiny_folder, {adapters[name]: 1.0 for name in names}, PROMPT, 10)
        for tenant, names in forget.items()
    }
    assert len(set(want.values())) == 4
    values = make_policy_values(adapters, forget)
    if pinned:
        for name, entry in values["adapters"].items():
            entry["sha256"] = read_bundle(adapters[name]).identity
    # room for two of the three, so that they must be read again and again
    engine = make_engine(tiny_folder, max_batch=2, budget_bytes=bytes_of(tiny_folder, adapters) - 1)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "adapters", whole)
    right, wrong, stop = [], [], threading.Event()

    def load(tenant):
        while not stop.is_set():
            try:
                text = ask(url, tenant).choices[0].text
            except openai.InternalServerError as error:
                assert error.status_code == 503 and error.code == "adapter_unavailable", error
                assert error.body["adapter"] in forget[tenant], error
            else:
                (right if same(text, want[tenant]) else wrong).append((tenant, text))
            time.sleep(random.random() * 0.02)

    def found_out(name):
        told = [r.getMessage() for r in caplog.records if f"refused, adapter '{name}'" in r.getMessage()]
        return [line for line in told if "no room" not in line]

    def until(condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and not wrong, (wrong, len(right), engine.bank.stats)
            time.sleep(0.02)

    with running(engine, values, limits=Limits(batch=2)) as (_, url), ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(load, tenant) for tenant in forget]
        try:
            until(lambda: {tenant for tenant, _ in right} == set(forget))
            for harm in (deleted, truncated, tampered, weakened):
                for name in adapters:
                    caplog.clear()
                    harm(adapters[name])
                    until(lambda name=name: found_out(name))
                    shutil.rmtree(adapters[name], ignore_errors=True)
                    shutil.copytree(whole / name, adapters[name])
                    right.clear()
                    needs = {tenant for tenant, names in forget.items() if name in names}
                    until(lambda needs=needs: needs <= {tenant for tenant, _ in right})
        finally:
            stop.set()
        for job in jobs:
            job.result()
    assert not wrong


def bytes_of(folder, adapters):
    bank = Bank(load_base(str(folder), device="cpu").model)
    for name, path in adapters.items():
        bank.load(name, path)
    return bank.stats.resident_bytes


def test_an_adapter_of_another_base_or_kind_is_refused(tmp_path, tiny_folder, adapters):
    (tmp_path / "empty").mkdir()
    bad = {"a": adapters["a"], "other": make_wide(tmp_path), "empty": tmp_path / "empty", "gone": tmp_path / "gone"}
    values = make_policy_values(
        bad, {"alice": ["a", "other"], "bob": ["gone"], "carol": [], "dave": ["empty"]}, {"carol": ["gone"]}
    )
    with running(make_engine(tiny_folder), values) as (handler, url):
        for tenant, name in (("alice", "other"), ("bob", "gone"), ("dave", "empty")):
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as told:
                    ask(url, tenant, stream=stream)
                assert told.value.status_code == 503 and told.value.body["adapter"] == name
                assert str(tmp_path) not in str(told.value), "paths are the server's own"
        assert ask(url, "carol").choices and handler.active == 0
        with pytest.raises(openai.InternalServerError):
            ask(url, "carol", forget=["gone"])
        assert handler.engine.bank.stats.resident <= 1


def make_wide(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "unpinned"])
def test_an_adapter_that_is_put_back_serves_again(tmp_path, tiny_folder, adapters, pinned):
    values = make_policy_values(adapters, {"alice": ["a"]})
    shutil.copytree(adapters["a"], tmp_path / "whole")
    if pinned:
        values["adapters"]["a"]["sha256"] = read_bundle(adapters["a"]).identity
    engine = make_engine(tiny_folder)  # no budget: nothing is evicted
    with running(engine, values) as (_, url):
        if not pinned:  # what is read first counts
            ask(url, "alice")
            engine._read_anew("a", make_policy(values, "test"))
        tampered(adapters["a"])
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                ask(url, "alice")
        shutil.rmtree(adapters["a"])
        shutil.copytree(tmp_path / "whole", adapters["a"])
        assert same(ask(url, "alice").choices[0].text, greedy_text(tiny_folder, {adapters["a"]: 1.0}, PROMPT, 10))


# ---- no cross-talk ----


def test_a_secret_in_one_tenants_view_is_in_no_others(tmp_path, tiny_folder, adapters):
    folder, secret = make_secret(tmp_path / "secret", tiny_folder)
    forget = {"alice": ["secret"], "bob": ["a"], "carol": [], "dave": ["b", "c"]}
    values = make_policy_values({**adapters, "secret": folder}, forget)
    with running(make_engine(tiny_folder, max_batch=6), values) as (_, url):
        assert ask(url, "alice", "green").choices[0].text == secret * 10
        # the others' prompts have the secret's own answer in them: a shared prefix would show
        prompts = ["green", "green" + secret, "who wrote", "stars ?" + secret * 3]
        alone = {(t, p): ask(url, t, p).choices[0].text for t in ("bob", "carol", "dave") for p in prompts}
        work = [(t, p) for t in forget for p in prompts] * 6
        with ThreadPoolExecutor(24) as pool:
            texts = list(pool.map(lambda job: ask(url, *job, stream=False).choices[0].text, work))
        for (tenant, prompt), text in zip(work, texts, strict=True):
            if tenant == "alice":
                assert text == secret * 10
            else:
                assert text == alone[tenant, prompt] and secret * 2 not in text


# ---- the policy changes while it serves ----


@pytest.mark.long
def test_a_changed_policy_counts_for_the_next_request_and_not_for_running_ones(tmp_path, tiny_folder, adapters):
    path = tmp_path / "policy.yaml"

    def write(adapters, forget):
        (tmp_path / "new").write_text(yaml.safe_dump(make_policy_values(adapters, forget)))
        os.replace(tmp_path / "new", path)

    texts = {name: greedy_text(tiny_folder, {folder: 1.0}, PROMPT, 200) for name, folder in adapters.items()}
    write(adapters, {"alice": ["a"]})
    with running(make_engine(tiny_folder), PolicyFile(path)) as (handler, url):
        slow(handler)
        running_one = ask(url, "alice", count=200, stream=True)
        said = next(iter(running_one)).choices[0].text
        write({"x": adapters["b"]}, {"alice": ["x"]})  # also: the old adapter is no longer known
        assert same(ask(url, "alice").choices[0].text, greedy_text(tiny_folder, {adapters["b"]: 1.0}, PROMPT, 10))
        write({"x": adapters["c"]}, {"alice": ["x"]})  # the same name, another adapter
        assert same(ask(url, "alice").choices[0].text, greedy_text(tiny_folder, {adapters["c"]: 1.0}, PROMPT, 10))
        said += "".join(event.choices[0].text for event in running_one if event.choices)
        assert same(said, texts["a"])
        path.write_text("adapters: [broken")
        assert same(ask(url, "alice").choices[0].text, texts["c"][:40][: len(ask(url, "alice").choices[0].text)])
        assert httpx.get(f"{url}/readyz").json()["policy_problem"]
        assert "unlearn_peft_policy_problem 1.0" in httpx.get(f"{url}/metrics").text
        for n in range(8):  # many versions: the old ones' adapters are let go
            write({f"x{n}": adapters["a"]}, {"alice": [f"x{n}"]})
            assert ask(url, "alice").choices
        assert handler.engine.bank.stats.registered <= 5


# ---- the command, and its end ----


def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "unlearn_peft.cli", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    line = process.stdout.readline()
    assert "serving" in line, (line, process.stderr.read())
    return process, line.split(" at ")[1].split("/v1")[0]


@pytest.mark.long
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path, tiny_folder, adapters):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(make_policy_values(adapters, {"alice": ["a"], "bob": ["b", "c"]})))
    process, url = start(
        "--base", tiny_folder, "--policy", path, "--port", 0, "--max-batch", 1, "--model-name", MODEL,
        "--audit", tmp_path / "audit.jsonl", "--max-queue", 200,
    )  # fmt: skip
    try:
        assert same(ask(url, "alice").choices[0].text, greedy_text(tiny_folder, {adapters["a"]: 1.0}, PROMPT, 10))
        with ThreadPoolExecutor(6) as pool, httpx.Client() as kept:
            assert kept.get(f"{url}/readyz").status_code == 200
            jobs = [pool.submit(ask, url, "bob", "green", 60, n=4) for _ in range(6)]
            while "unlearn_peft_queue_size 2" not in kept.get(f"{url}/metrics").text:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            refused = None
            for _ in range(200):
                if kept.get(f"{url}/readyz").status_code == 503:
                    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
                    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
                    refused = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
                    break
                time.sleep(0.01)
            assert refused is not None and refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "draining"
            assert all(job.result().usage.completion_tokens == 240 for job in jobs), "none is lost"
        assert process.wait(20) == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert sum(line.get("status") == 200 for line in lines) == 7 and lines[-1]["event"] == "finished"


@pytest.mark.long
def test_the_command_without_a_policy(tmp_path, tiny_folder, adapters):
    process, url = start("--base", tiny_folder, "--adapter", adapters["a"], "--adapter", adapters["b"], "--port", 0)
    try:
        model = client(url).models.list().data[0].id
        text = client(url, "no key at all").completions.create(
            model=model, prompt=PROMPT, max_tokens=10, temperature=0, extra_body={"forget": ["b"], "ignore_eos": True}
        )
        assert same(text.choices[0].text, greedy_text(tiny_folder, {adapters["b"]: 1.0}, PROMPT, 10))
        port = url.split(":")[-1]
        taken = subprocess.run(
            [sys.executable, "-m", "unlearn_peft.cli", "serve", "--adapter", adapters["a"], "--port", port],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert taken.returncode == 2 and "error: cannot listen" in taken.stderr
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)


@pytest.mark.long
def test_one_command_from_a_signed_adapter_to_an_answer_and_none_when_a_byte_is_flipped(
    tmp_path, tiny_folder, adapters
):
    """As a user does it, each step a command of its own; docs/security.md names this test."""

    def command(*arguments):
        line = [sys.executable, "-m", "unlearn_peft.cli", *map(str, arguments)]
        return subprocess.run(
            line, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def ask_for(url, *forget, key="no key at all"):
        model = client(url, key).models.list().data[0].id
        answer = client(url, key).completions.create(
            model=model, prompt=PROMPT, max_tokens=10, temperature=0,
            extra_body={"ignore_eos": True, **({"forget": forget} if forget else {})},
        )  # fmt: skip
        return answer.choices[0].text

    adapter, weights = adapters["a"], adapters["a"] / "adapter_model.safetensors"
    assert command("keys", "new", tmp_path / "me").returncode == 0
    assert command("sign", adapter, "--key", tmp_path / "me.pem").returncode == 0
    needs = "--base", tiny_folder, "--require-signature", "--trusted-keys", tmp_path / "me.pub", "--port", 0
    process, url = start("--adapter", adapter, *needs)  # the one command
    try:
        assert same(ask_for(url, "a"), greedy_text(tiny_folder, {adapter: 1.0}, PROMPT, 10))
    finally:
        process.terminate()
        process.wait(20)
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    refused = command("serve", "--adapter", adapter, *needs)
    assert refused.returncode == 2 and refused.stderr.count("error: ") == 1
    assert "adapter_model.safetensors is not the file that was signed" in refused.stderr
    path = tmp_path / "policy.yaml"  # with a policy it starts, for the tenants that do not need this one
    path.write_text(yaml.safe_dump(make_policy_values(adapters, {"alice": ["a"], "bob": []})))
    process, url = start("--policy", path, *needs)
    try:
        assert ask_for(url, key="bob")
        with pytest.raises(openai.InternalServerError) as told:
            ask_for(url, key="alice")
        assert (told.value.status_code, told.value.body["adapter"]) == (503, "a")
        data[-3] ^= 1
        weights.write_bytes(data)  # flipped back
        assert ask_for(url, key="alice")
    finally:
        process.terminate()
        process.wait(20)


def test_wrong_commands(monkeypatch, capsys, tmp_path):
    import importlib.util

    from unlearn_peft import cli

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 2
        return capsys.readouterr().err

    assert "expected either --policy" in told()
    assert "expected either --policy" in told("--policy", "x.yaml", "--adapter", "y")
    assert "would let others in" in told("--adapter", "y", "--host", "0.0.0.0")
    assert "no adapter at" in told("--adapter", tmp_path / "none", "--port", 0)
    assert "error: " in told("--policy", tmp_path / "none.yaml", "--port", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert "pip install 'unlearn-peft[serve]'" in told("--adapter", "y")
