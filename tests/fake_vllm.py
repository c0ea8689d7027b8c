"""Stand-ins for vLLM: its resolver classes, and a server that keeps names, resolves and streams as vLLM 0.32.0 does.

The server generates with the tiny model and the LoRA at the path that the resolver gave, so that the whole way from a
policy to tokens is walked; what vLLM's own code does to it is tested by test_vllm.py.
"""

import asyncio
import json
import sys
import threading
import time
import types
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from unlearn_peft import forgetting


def install_vllm(monkeypatch):
    """Put modules with vLLM's resolver classes where `import vllm...` finds them; returns the registry."""

    @dataclass(eq=False)
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str = ""

        def __init_subclass__(cls, **_):  # msgspec.Struct takes weakref=True here
            pass

    class LoRAResolver:
        pass

    class Registry:
        def __init__(self):
            self.resolvers = {}

        def get_supported_resolvers(self):
            return self.resolvers.keys()

        def register_resolver(self, name, resolver):
            self.resolvers[name] = resolver

    registry = Registry()
    parts = {
        "vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }  # fmt: skip
    for name, contents in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return registry


class FakeVllm:
    """`trouble`: None, or validation (it answers for unknown names), model, break, busy, error or grammar.

    `applied`: which LoRARequest is applied for one; `asked` are bodies of streams, `scored` those of other completions.
    """

    def __init__(self, base, resolver, trouble=None, context=128):
        self.base, self.resolver, self.trouble, self.context = base, resolver, trouble, context
        self.known, self.asked, self.scored, self.unloaded, self.aborted = {}, [], [], [], 0
        self.applied = lambda request: request
        self._lock, self._locks = threading.Lock(), {}
        self.app = FastAPI()
        self.app.get("/health")(self.health)
        self.app.get("/v1/models")(self.models)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/v1/completions")(self.completions)
        self.app.post("/v1/unload_lora_adapter")(self.unload)

    async def health(self):
        return {}

    async def models(self):
        cards = [{"id": "base", "parent": None, "max_model_len": self.context}]
        return {"data": cards + [{"id": name, "parent": "base"} for name in self.known]}

    async def tokenize(self, body: dict):
        if refused := await self._resolve(body["model"]):
            return refused
        return {"tokens": self.base.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}

    async def unload(self, body: dict):
        self.unloaded.append(body["lora_name"])
        self.known.pop(body["lora_name"], None)
        return {}

    async def completions(self, body: dict):
        if refused := await self._resolve(body["model"]):
            return refused
        (self.asked if body.get("stream") else self.scored).append(body)
        if self.trouble in ("busy", "error"):
            status = {"busy": 503, "error": 500}[self.trouble]
            return JSONResponse({"error": {"message": "no", "code": status}}, status)
        if self.trouble == "grammar" and "structured_outputs" in body:
            return JSONResponse({"error": {"message": "The provided JSON schema is not supported", "code": 400}}, 400)
        request = self.known.get(body["model"])
        told = "base" if request is None or self.trouble == "model" else request.lora_name
        if not body.get("stream"):
            choices = [] if request is None else await asyncio.to_thread(self._score, body, request)
            return {"model": told, "choices": choices}
        return StreamingResponse(self._events(body, request, told))

    async def _resolve(self, name):
        """As BaseServing._check_model and OpenAIServingModels.resolve_lora: once for a name, the id is vLLM's own."""
        if name == "base" or name in self.known or self.trouble == "validation":
            return None
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self.known:
                return None
            request = await self.resolver.resolve_lora(self.base.name, name)
            if request is None:
                return JSONResponse({"error": {"message": f"The model `{name}` does not exist.", "code": 404}}, 404)
            request.lora_int_id = len(self.known) + 1
            self.known[name] = request

    async def _events(self, body, request, told):
        ids, random = list(body["prompt"]), torch.Generator().manual_seed(body["seed"] or 0)
        try:
            for n in range(body["max_tokens"]):
                logits = await asyncio.to_thread(self._logits, ids, request)
                logprobs = logits.log_softmax(-1)
                token = int(logits.argmax())
                if body["temperature"]:
                    token = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=random))
                ids.append(token)
                ends = token == self.base.tokenizer.eos_token_id and not body["ignore_eos"]
                ends = ends or token in body["stop_token_ids"]  # as vLLM has it, whatever ignore_eos says
                reason = "stop" if ends else "length" if n == body["max_tokens"] - 1 else None
                choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": reason, "logprobs": None}
                if body["logprobs"] is not None:
                    top = {token, *logprobs.topk(max(1, body["logprobs"])).indices.tolist()}
                    choice["logprobs"] = {
                        "tokens": [f"token_id:{token}"], "token_logprobs": [logprobs[token].item()],
                        "top_logprobs": [{f"token_id:{t}": logprobs[t].item() for t in top}],
                    }  # fmt: skip
                yield f"data: {json.dumps({'model': told, 'choices': [choice]})}\n\n"
                if self.trouble == "break" and n == 1:
                    yield 'data: {"error": {"message": "EngineCore encountered an issue."}}\n\n'
                    break
                if reason:
                    break
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.aborted += 1
            raise

    def _score(self, body, request):
        """Choices with greedy tokens, and the likeliest ones at each place."""
        choices = []
        for index, ids in enumerate(body["prompt"]):
            logprobs = {"tokens": [], "top_logprobs": []}
            for _ in range(body["max_tokens"]):
                values, tokens = self._logits(ids, request).log_softmax(-1).topk(body["logprobs"])
                names = [f"token_id:{token}" for token in tokens.tolist()]
                logprobs["tokens"].append(names[0])
                logprobs["top_logprobs"].append(dict(zip(names, values.tolist(), strict=True)))
                ids = [*ids, tokens[0].item()]
            choices.append({"index": index, "text": "", "logprobs": logprobs})
        return choices

    @torch.no_grad()
    def _logits(self, ids, request):
        request = request and self.applied(request)
        with self._lock, forgetting(self.base, request.lora_path) if request else nullcontext():
            return self.base.model(input_ids=torch.tensor([ids])).logits[0, -1].float()


@contextmanager
def serving(fake):
    """Run it on a free port; yields its URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
