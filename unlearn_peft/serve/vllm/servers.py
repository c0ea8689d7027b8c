"""vLLM servers, as the gateway sees them: which are up, what they call the base, which sets they have loaded."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

import httpx

from ...errors import BaseModelError
from ..engine.base import Busy, Unavailable
from ..engine.encode import Prompt
from .load_check import TOP, LoadCheck, Tokens, WantedSet
from .lora_names import SetName

_PROBE = "What was it that 12 of them said? Ünlearn — 3.14!"
_MAX_LOAD, _LOW_LOAD = 1.1, 8  # of a server, times the mean; a load that never counts as too much
_RETRY_AFTER = 2.0  # seconds until a server that did not answer is asked again
logger = logging.getLogger(__name__)


@dataclass
class VllmServer:
    """One vLLM server."""

    url: str
    base: str = ""  # its own name for the base; empty: no handshake yet
    context: int = 0  # tokens
    down_until: float = 0.0
    streams: int = 0
    names: OrderedDict[str, int] = field(default_factory=OrderedDict)  # loaded sets -> leases on them
    loading: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)


class Servers:
    """vLLM servers with one base, such as http://10.0.0.7:8000; raises what `handshake` raises, or if none answers.

    A server may have `names` sets loaded; beyond this, the least recently used are unloaded. `seconds` is how long to
    wait for a server's next bytes; `encode` is for the load check.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Any,
        encode: Callable[[Prompt], Tokens],
        *,
        names: int,
        seconds: float,
    ) -> None:
        self.all = [VllmServer(url.rstrip("/").removesuffix("/v1")) for url in dict.fromkeys(urls)]
        self.loads, self.load_seconds = 0, 0.0
        self._tokenizer, self._names, self._timeout = tokenizer, names, httpx.Timeout(seconds, connect=5.0)
        self._load_check = LoadCheck(encode, tokenizer.decode)
        key = os.environ.get("UNLEARN_PEFT_ENGINE_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        for server in self.all:
            try:
                self.handshake(server)
            except httpx.HTTPError as error:
                logger.warning("%s does not answer yet (%s)", server.url, type(error).__name__)
        if not any(server.base for server in self.all):
            raise Unavailable(f"no vLLM server answers at {', '.join(urls)}: start it, or give another --engine")

    async def any_healthy(self) -> bool:
        """Return whether at least one server can serve now."""
        for server in self.all:
            try:
                await self._ready(server)
                if (await self.http().get(f"{server.url}/health", timeout=5.0)).status_code == 200:
                    return True
            except (httpx.HTTPError, Unavailable, BaseModelError):
                continue
        return False

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()

    def http(self) -> httpx.AsyncClient:
        """The client, made on first use: it belongs to the event loop."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)
        return self._client

    async def acquire(self, wanted: WantedSet) -> VllmServer:
        """Return the server for a set, which has loaded it (load_check.py) and keeps it until the lease is released.

        Rendezvous hashing of the digest with bounded loads: always the same server, unless that one is down or has more
        than its share to do; then the next in an order of the set's own (benchmarks/zipf.py shows what that saves).
        Without a digest, the server with the lowest load.
        """
        if not wanted.digest:
            servers = sorted(self.all, key=lambda server: server.streams)
        else:
            limit = max(_LOW_LOAD, _MAX_LOAD * (sum(server.streams for server in self.all) + 1) / len(self.all))
            servers = sorted(
                self.all, key=lambda s: (s.streams >= limit, sha256(f"{s.url} {wanted.digest}".encode()).digest())
            )
        problem = Unavailable("no vLLM server answers")
        for server in servers:
            if not server.base and time.monotonic() < server.down_until:
                continue
            try:
                await self._ready(server)
                await self._load(server, wanted)
                return server
            except httpx.HTTPError as error:
                self.mark_down(server)
                logger.warning("%s does not answer (%s)", server.url, type(error).__name__)
            except BaseModelError as error:
                problem = Unavailable(str(error))
        raise problem

    def mark_down(self, server: VllmServer) -> None:
        """Note that a server does not answer: there is a new handshake before it gets another request."""
        server.down_until, server.base = time.monotonic() + _RETRY_AFTER, ""
        server.names.clear()

    async def _ready(self, server: VllmServer) -> None:
        if not server.base:
            await asyncio.to_thread(self.handshake, server)

    async def _load(self, server: VllmServer, wanted: WantedSet) -> None:
        """Let a server load a set, and check it; who else needs it meanwhile waits for that.

        Raises:
            Unavailable: if it does not load, or is not what it should be; vLLM forgets its name then.
            Busy: if vLLM takes no requests.
        """
        async with server.loading.setdefault(wanted.name, asyncio.Lock()):
            if wanted.name not in server.names:
                await self._load_new(server, wanted)
            server.names.move_to_end(wanted.name)
            server.names[wanted.name] += 1

    async def _load_new(self, server: VllmServer, wanted: WantedSet) -> None:
        began = time.monotonic()
        # a request that generates nothing makes vLLM load a set
        response = await self.http().post(f"{server.url}/tokenize", json={"model": wanted.name, "prompt": "a"})
        if response.status_code != 200:
            raise Unavailable(f"vLLM does not serve the set ({response.status_code}: {message_of(response.content)})")
        try:
            await self._load_check.check(wanted, server.url, partial(self._ask, server))
        except (Busy, Unavailable):
            await self._unload(server, wanted.name)
            raise
        self.loads, self.load_seconds = self.loads + 1, self.load_seconds + time.monotonic() - began
        server.names[wanted.name] = 0
        unused = [known for known, users in server.names.items() if users == 0 and known != wanted.name]
        for known in unused[: max(0, len(server.names) - self._names)]:
            del server.names[known]
            task = asyncio.create_task(self._unload(server, known))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(
        self, server: VllmServer, name: str, prompts: Sequence[Tokens], max_tokens: int
    ) -> list[list[tuple[int, dict[int, float]]]]:
        """See `Ask`."""
        body = {
            "model": name, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0.0, "logprobs": TOP,
            "repetition_penalty": 1.0, "return_tokens_as_token_ids": True, "cache_salt": secrets.token_hex(16),
        }  # fmt: skip
        response = await self.http().post(f"{server.url}/v1/completions", json=body)
        problem = f"({response.status_code}: {message_of(response.content)})"
        if response.status_code in (429, 503):
            raise Busy(f"vLLM refuses {problem}")
        if response.status_code != 200:
            raise Unavailable(f"vLLM cannot answer with a set that it has loaded {problem}")
        try:
            answer = response.json()
            if answer["model"] != name:
                raise Unavailable("vLLM answered with another model than the set that was asked for")
            logprobs = [choice["logprobs"] for choice in sorted(answer["choices"], key=lambda one: int(one["index"]))]
            answers = [
                [
                    (token_of(token), {token_of(likely): float(value) for likely, value in top.items()})
                    for token, top in zip(one["tokens"], one["top_logprobs"], strict=True)
                ]
                for one in logprobs
            ]
            if len(answers) != len(prompts) or not all(answers):
                raise ValueError("answers are missing")
            return answers
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Unavailable(f"vLLM gives no logprobs as 0.32.0 does ({type(error).__name__})") from None

    async def _unload(self, server: VllmServer, name: str) -> None:
        """Let vLLM forget a set's name, so that its folder can be deleted; a later request makes it again."""
        try:
            await self.http().post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name})
        except httpx.HTTPError as error:
            logger.warning("%s did not unload a set (%s)", server.url, type(error).__name__)

    def handshake(self, server: VllmServer) -> None:
        """Ask a server for its base's name; check that it has our tokenizer and refuses models that it does not know.

        Raises:
            httpx.HTTPError: if it does not answer.
            BaseModelError: if it is no vLLM server, or has another tokenizer.
            Unavailable: if it answers for models that it does not know.
        """
        try:
            with httpx.Client(base_url=server.url, headers=self._headers, timeout=10.0) as http:
                models = http.get("/v1/models").raise_for_status().json()["data"]
                base = next(model for model in models if not model.get("parent"))
                request = {"model": base["id"], "prompt": _PROBE, "add_special_tokens": False}
                ids = http.post("/tokenize", json=request).raise_for_status().json()["tokens"]
                if ids != self._tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
                    raise BaseModelError(f"{server.url} serves '{base['id']}', whose tokenizer is another one")
                unknown = str(SetName("0" * 64, None, {"none": 1.0}))
                answer = http.post("/v1/completions", json={"model": unknown, "prompt": ids[:1], "max_tokens": 1})
                if answer.status_code == 200:
                    raise Unavailable(
                        f"{server.url} answers for models that it does not know, so that the base could stand in for "
                        "a set: start vLLM without VLLM_SKIP_MODEL_NAME_VALIDATION"
                    )
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise BaseModelError(f"{server.url} does not speak as vLLM does ({type(error).__name__})") from None
        server.base, server.context = base["id"], int(base["max_model_len"])


def token_of(text: str) -> int:
    """Return the token that vLLM writes as `token_id:N`."""
    return int(text.removeprefix("token_id:"))


def message_of(body: bytes) -> str:
    """Return the message in an error's body, at most 200 characters of it."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return "no details"
