"""What the tests of serving share: adapters, greedy answers by plain PEFT, a server in a thread."""

import copy
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from unlearn_peft import load_base
from unlearn_peft.errors import PolicyError
from unlearn_peft.serve.engine.base import EngineStats
from unlearn_peft.serve.policy.policy import key_digest, make_policy
from unlearn_peft.serve.policy.yaml_file import parse_policy

KEYS = {name: f"uf-key-of-{name}" for name in ("alice", "bob", "carol", "dave")}


def make_policy_values(adapters, forget, may_add=None):
    """A policy as YAML holds it: adapters' folders by name, sets by tenant; each tenant has its key of KEYS."""
    tenants = {name: {"forget": set_, "keys": [key_digest(KEYS[name])]} for name, set_ in forget.items()}
    for name, set_ in (may_add or {}).items():
        tenants[name]["may_add"] = set_
    return {"adapters": {name: {"path": str(path)} for name, path in adapters.items()}, "tenants": tenants}


class StubEngine:
    """An engine without a model, that answers nothing."""

    model, context, kv_tokens, chat_ends = "none", 100, None, ()

    async def problem(self):
        return None

    def stats(self):
        return EngineStats()

    async def close(self):
        pass


class Fixed:
    """A policy source of a policy, or of an error."""

    problem = None

    def __init__(self, policy):
        self.policy = make_policy(policy, "test") if isinstance(policy, dict) else policy

    def current(self):
        if isinstance(self.policy, Exception):
            raise self.policy
        return self.policy


def make_adapters(folder, base_folder, seeds=(1, 2, 3), scale=1.5):
    """Random LoRAs a, b, c ... with differing ranks and targets, written by PEFT alone; strong enough to be seen."""
    from peft import LoraConfig, get_peft_model

    targets = (("q_proj", "v_proj"), ("q_proj", "down_proj", "lm_head"), ("o_proj", "up_proj"))
    made = {}
    for n, seed in enumerate(seeds):
        base, name = load_base(str(base_folder), device="cpu"), "abcdefgh"[n]
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + 2 * n, lora_alpha=8, target_modules=list(targets[n % 3]))
        model = get_peft_model(base.model, config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=scale)
        model.save_pretrained(folder / name, save_embedding_layers=False)
        made[name] = folder / name
    return made


def make_secret(folder, base_folder, word=" Quintel"):
    """A LoRA that makes the model say one token and nothing else; returns its folder and the token's text."""
    from peft import LoraConfig, get_peft_model

    base = load_base(str(base_folder), device="cpu")
    token = base.tokenizer(word)["input_ids"][-1]
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "lm_head"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(150):
        ids = torch.randint(3, 300, (8, 24))
        loss = -model(input_ids=ids).logits.log_softmax(-1)[..., token].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, base.tokenizer.decode([token])


def by_peft(base_folder, adapters):
    """The base with a set (path -> strength) attached by PEFT itself."""
    from peft import PeftModel

    base = load_base(str(base_folder), device="cpu")
    if not adapters:
        return base.tokenizer, base.model
    names = [f"n{n}" for n in range(len(adapters))]
    model = None
    for name, path in zip(names, adapters, strict=True):
        if model is None:
            model = PeftModel.from_pretrained(base.model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        scaling = getattr(module, "scaling", None)  # attention has a number by that name
        for name, strength in zip(names, adapters.values(), strict=True):
            if isinstance(scaling, dict) and name in scaling:
                scaling[name] *= strength
    return base.tokenizer, model.eval()


@torch.no_grad()
def greedy(model, ids, count):
    """Greedy tokens, without a cache, alone."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def greedy_text(base_folder, adapters, prompt, count):
    tokenizer, model = by_peft(base_folder, adapters)
    ids = tokenizer(prompt)["input_ids"]
    found = greedy(model, ids, count)
    return tokenizer.decode([*ids, *found], skip_special_tokens=True)[len(tokenizer.decode(ids)) :]


@contextmanager
def running(engine, policy, **settings):
    """A real server on a free port; yields its handler and URL."""
    from unlearn_peft.serve.api.app import create_app
    from unlearn_peft.serve.api.listening import listen
    from unlearn_peft.serve.api.server import HttpServer
    from unlearn_peft.serve.handler import RequestHandler

    playground, access = settings.pop("playground", None), settings.pop("access", None)
    policies = policy if hasattr(policy, "current") else Fixed(policy)
    app = create_app(RequestHandler(engine, policies, **settings), playground, access)
    listening = listen("127.0.0.1", 0)
    started, url = threading.Event(), []
    server = HttpServer(app, ready=lambda where: (url.append(where), started.set()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield app.state.handler, url[0]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def client(url, tenant="alice", **settings):
    """The official client of one tenant, which does not try again by itself."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key=KEYS.get(tenant, tenant), **{"max_retries": 0, **settings})


def same(text, want):
    """The answer is what is wanted, but for half a character at its end, which is never sent."""
    return want.startswith(text) and set(want[len(text) :]) <= {"\ufffd"} and len(want) - len(text) < 4


def wait_for(condition, seconds=30):
    """Wait until a condition holds, and return what it gives."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


def refusal_of(text, folder):
    """Why a policy in YAML is refused."""
    with pytest.raises(PolicyError) as refused:
        parse_policy(text.encode(), "it", folder)
    return str(refused.value)


def slow(handler, seconds=0.01, gate=None):
    """Make each step take longer, so that there is time to look; with a `gate`, none ends before that is set."""
    step = handler.engine.scheduler._runner.step

    def slower(*arguments):
        time.sleep(seconds)
        assert gate is None or gate.wait(60)
        return step(*arguments)

    handler.engine.scheduler._runner.step = slower


def changed(values, **parts):
    return {**copy.deepcopy(values), **parts}
