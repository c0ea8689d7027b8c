"""The gateway engine: our front keeps tenants, policy and audit; vLLM servers generate.

Each request asks vLLM for a model whose name says exactly what must be forgotten and in which version
(`set_names.py`); our resolver inside vLLM makes that model or refuses. The answer's own word for its model must be that
name. A set's requests go to the same server as long as it is up (rendezvous hashing), so that each set is resident on
one server rather than on all.

Tokens are made and read here, with the base's own tokenizer, as in the embedded engine: vLLM gets and gives ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from ..base import load_tokenizer
from ..bundle import read_bundle
from ..errors import AdapterError, BaseModelError
from .engine import (
    Applied,
    Busy,
    Candidate,
    EngineStats,
    Generation,
    GenerationError,
    Piece,
    TokenLogprobs,
    Unavailable,
)
from .prompts import Prompt, Prompts
from .set_cache import weights_of
from .set_names import LONGEST, SetName, set_digest
from .text import TextStream, TokenBytes

if TYPE_CHECKING:
    from .policy import Policy

_PROBE = "What was it that 12 of them said? Ünlearn — 3.14!"
_AWAY = 2.0  # seconds until a server that did not answer is asked again
logger = logging.getLogger(__name__)


@dataclass
class Server:
    """One vLLM server."""

    url: str
    base: str = ""  # its own name for the base; empty: not spoken to yet
    context: int = 0  # tokens
    away_until: float = 0.0
    streams: int = 0
    names: OrderedDict[str, int] = field(default_factory=OrderedDict)  # sets that it knows -> requests that hold them


@dataclass
class SetHolding:
    """A request's set, and the server that has it."""

    applied: tuple[Applied, ...]
    digest: str
    server: Server
    model: str
    released: bool = False

    def release(self) -> None:
        """See `Holding.release`."""
        if not self.released and self.model in self.server.names:
            self.server.names[self.model] -= 1
        self.released = True


class VllmEngine:
    """Generates through vLLM's OpenAI routes.

    Args:
        urls: of the servers, all with the same base, e.g. http://10.0.0.7:8000.
        base: as for `load_base`; only its tokenizer and config are read.
        name: the public name; the base's own by default.
        names: how many sets a server may know; the longest unused are unloaded beyond this.
        seconds: how long to wait for a server's next word.

    Raises:
        BaseModelError: if the base cannot be read, or is not the one that the servers have.
        Unavailable: if no server answers, or one answers for models that it does not know.
    """

    def __init__(
        self,
        urls: Sequence[str],
        base: str = "demo",
        *,
        name: str | None = None,
        names: int = 1000,
        seconds: float = 300.0,
    ) -> None:
        tokenizer, config, public = load_tokenizer(base)
        self.model = name or public
        self._tokenizer, self._bytes, self._names = tokenizer, TokenBytes(tokenizer), names
        self._prompts = Prompts(tokenizer, config.get_text_config().vocab_size, self.model)
        self._servers = [Server(url.rstrip("/").removesuffix("/v1")) for url in dict.fromkeys(urls)]
        self._timeout = httpx.Timeout(seconds, connect=5.0)
        key = os.environ.get("UNLEARN_PEFT_ENGINE_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None
        self._loads, self._load_seconds = 0, 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        for server in self._servers:
            try:
                self._greet(server)
            except httpx.HTTPError as error:
                logger.warning("%s does not answer yet (%s)", server.url, type(error).__name__)
        if not any(server.base for server in self._servers):
            raise Unavailable(f"no vLLM server answers at {', '.join(urls)}: start it, or give another --engine")
        self.context = min(server.context for server in self._servers if server.base)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return await asyncio.to_thread(self._prompts, prompt)

    async def hold(self, forget: Mapping[str, float], policy: Policy) -> SetHolding:
        """See `Engine.hold`; a server makes and loads the set before this returns."""
        try:
            applied = await asyncio.to_thread(_applied, forget, policy)
        except AdapterError as error:
            raise Unavailable(f"the adapter '{error.adapter}' cannot be used: {error}", error.adapter) from error
        if not forget:
            server = await self._first(sorted(self._servers, key=lambda server: server.streams), None)
            return SetHolding((), "", server, server.base)
        digest = set_digest((one.sha256, one.strength) for one in applied)
        name = str(SetName(digest, None, forget))
        if len(name) > LONGEST:
            raise Unavailable(f"{len(forget)} adapters are too many for one request to vLLM")
        near = sorted(self._servers, key=lambda s: hashlib.sha256(f"{s.url} {digest}".encode()).digest())
        try:
            server = await self._first(near, name)
        except Unavailable as refused:
            to_blame, why = await asyncio.to_thread(_culprit, forget, policy)
            raise Unavailable(f"{refused}{why}", to_blame) from refused
        return SetHolding(applied, digest, server, name)

    async def stream(self, request: Generation, holding: SetHolding) -> AsyncIterator[Piece]:
        """See `Engine.stream`."""
        text, untold = TextStream(self._tokenizer, request.ids, request.stop), 0
        server = holding.server
        server.streams += 1
        try:
            async with aclosing(self._chunks(request, holding)) as chunks:
                async for choice in chunks:
                    tokens, reason = choice.get("token_ids") or [], choice.get("finish_reason")
                    logprobs = self._logprobs(choice, request)
                    ended = reason == "stop" and not request.ignore_eos  # then the last token is the end token
                    for n, token in enumerate(tokens):
                        untold += 1
                        last = ended and n == len(tokens) - 1
                        if not last and text.push(token, logprobs[n] if logprobs else None):
                            reason = "stop"
                            break
                    if reason not in (None, "stop", "length"):
                        raise GenerationError(f"vLLM ended the answer: {reason}")
                    said, told = text.take(last=reason is not None)
                    if said or told or reason:
                        yield Piece(said, untold, told, reason)
                        untold = 0
                    if reason:
                        return
            raise GenerationError("vLLM's answer broke off")
        finally:
            server.streams -= 1

    async def problem(self) -> str | None:
        """See `Engine.problem`."""
        for server in self._servers:
            try:
                await self._ready(server, patient=False)
                if (await self._http().get(f"{server.url}/health", timeout=5.0)).status_code == 200:
                    return None
            except (httpx.HTTPError, Unavailable, BaseModelError):
                continue
        return "no vLLM server is well"

    def stats(self) -> EngineStats:
        """See `Engine.stats`; what vLLM keeps to itself is None."""
        running = sum(server.streams for server in self._servers)
        return EngineStats(running=running, loads=self._loads, load_seconds=self._load_seconds)

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._client is not None:
            await self._client.aclose()

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)
        return self._client

    async def _first(self, servers: Sequence[Server], name: str | None) -> Server:
        """Return the first server that answers, and make it know the set `name`, held from now on."""
        problem = Unavailable("no vLLM server answers")
        for server in servers:
            try:
                await self._ready(server)
                if name is not None:
                    await self._know(server, name)
                return server
            except httpx.HTTPError as error:
                server.away_until, server.base = time.monotonic() + _AWAY, ""
                server.names.clear()
                logger.warning("%s does not answer (%s)", server.url, type(error).__name__)
            except BaseModelError as error:
                problem = Unavailable(str(error))
        raise problem

    async def _ready(self, server: Server, patient: bool = True) -> None:
        """Speak to a server for the first time, or again after it was away."""
        if not server.base:
            if patient and time.monotonic() < server.away_until:
                raise httpx.ConnectError("away")
            await asyncio.to_thread(self._greet, server)

    async def _know(self, server: Server, name: str) -> None:
        """Let a server load a set, by a request that generates nothing: /tokenize with the set's name."""
        if name in server.names:
            server.names.move_to_end(name)
            server.names[name] += 1
            return
        began = time.monotonic()
        response = await self._http().post(f"{server.url}/tokenize", json={"model": name, "prompt": "a"})
        if response.status_code != 200:
            raise Unavailable(f"vLLM does not serve the set ({response.status_code}: {_told(response.content)})")
        self._loads, self._load_seconds = self._loads + 1, self._load_seconds + time.monotonic() - began
        server.names[name] = server.names.get(name, 0) + 1
        unused = [known for known, users in server.names.items() if users == 0]
        for known in unused[: max(0, len(server.names) - self._names)]:
            del server.names[known]
            task = asyncio.create_task(self._unload(server, known))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _unload(self, server: Server, name: str) -> None:
        """Let vLLM forget a set's name, so that its folder may go one day; asked for again, it is made again."""
        try:
            await self._http().post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name})
        except httpx.HTTPError as error:
            logger.warning("%s did not unload a set (%s)", server.url, type(error).__name__)

    def _greet(self, server: Server) -> None:
        """Find out what a server calls its base, that it has our tokenizer, and that it refuses what it doesn't know.

        Raises:
            httpx.HTTPError: if it does not answer.
            BaseModelError: if it has another tokenizer.
            Unavailable: if it answers for models that it does not know.
        """
        with httpx.Client(base_url=server.url, headers=self._headers, timeout=10.0) as http:
            models = http.get("/v1/models").raise_for_status().json()["data"]
            base = next(model for model in models if not model.get("parent"))
            asked = {"model": base["id"], "prompt": _PROBE, "add_special_tokens": False}
            ids = http.post("/tokenize", json=asked).raise_for_status().json()["tokens"]
            if ids != self._tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
                raise BaseModelError(f"{server.url} serves '{base['id']}', whose tokenizer is not that of {self.model}")
            unknown = str(SetName("0" * 64, None, {"none": 1.0}))
            answer = http.post("/v1/completions", json={"model": unknown, "prompt": ids[:1], "max_tokens": 1})
            if answer.status_code == 200:
                raise Unavailable(
                    f"{server.url} answers for models that it does not know, so a set could be answered by the base: "
                    "start vLLM without VLLM_SKIP_MODEL_NAME_VALIDATION"
                )
        server.base, server.context = base["id"], int(base["max_model_len"])

    async def _chunks(self, request: Generation, holding: SetHolding) -> AsyncIterator[dict[str, Any]]:
        """Yield the choices that vLLM streams, each checked to be the set's."""
        body = {
            "model": holding.model, "prompt": list(request.ids), "stream": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "max_tokens": request.max_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "top_k": request.top_k or -1, "seed": request.seed, "logprobs": request.logprobs,
            "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
            "ignore_eos": request.ignore_eos,
            # or vLLM takes what the model's generation_config.json says
            "min_p": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
        try:
            async with self._http().stream("POST", f"{holding.server.url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, await response.aread(), holding)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise GenerationError(f"vLLM could not finish the answer: {_told(data.encode())}")
                    if chunk.get("model") != holding.model:
                        raise Unavailable("vLLM answered with another model than the set that was asked for")
                    for choice in chunk["choices"]:
                        yield choice
        except (httpx.HTTPError, ValueError) as error:
            raise GenerationError(f"vLLM's answer broke off ({type(error).__name__})") from error

    def _refusal(self, status: int, body: bytes, holding: SetHolding) -> Exception:
        told = f"vLLM refuses ({status}: {_told(body)})"
        if status in (429, 503):
            return Busy(told)
        if status in (400, 404):  # of the two, 400 is also for a set that was found and could not be loaded
            holding.server.names.pop(holding.model, None)
            return Unavailable(told)
        return GenerationError(told)

    def _logprobs(self, choice: Mapping[str, Any], request: Generation) -> list[TokenLogprobs] | None:
        """Read vLLM's logprobs, whose tokens are `token_id:N`; the chosen token stands among the likeliest there."""
        found = choice.get("logprobs")
        if request.logprobs is None or not found:
            return None
        entries = []
        for n, (token, logprob) in enumerate(zip(found["tokens"], found["token_logprobs"], strict=True)):
            top: tuple[Candidate, ...] = ()
            if request.logprobs:
                likeliest = sorted(found["top_logprobs"][n].items(), key=lambda item: -item[1])
                top = tuple(self._candidate(*item) for item in likeliest[: request.logprobs])
            entries.append(TokenLogprobs(self._candidate(token, logprob), top))
        return entries

    def _candidate(self, token: str, logprob: float) -> Candidate:
        number = int(token.removeprefix("token_id:"))
        return Candidate(number, self._bytes(number), logprob)


def _applied(forget: Mapping[str, float], policy: Policy) -> tuple[Applied, ...]:
    return tuple(Applied(name, weights_of(name, policy), strength) for name, strength in forget.items())


def _culprit(forget: Mapping[str, float], policy: Policy) -> tuple[str | None, str]:
    """Return which adapter cannot be used, as far as it can be seen from here, and why."""
    for name in forget:
        entry = policy.adapters[name]
        try:
            if entry.sha256 not in (None, read_bundle(entry.path).digest):
                return name, f"; the adapter '{name}' is not the one that the policy pins"
        except AdapterError as error:
            return name, f"; the adapter '{name}' cannot be used: {error}"
    return (next(iter(forget)) if len(forget) == 1 else None), ""


def _told(body: bytes) -> str:
    """Return what an error's body says, cut short."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return "no details"
