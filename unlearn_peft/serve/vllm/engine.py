"""The gateway engine: our front keeps tenants, policy and audit; vLLM servers generate.

Each request asks vLLM for a model whose name says exactly what must be forgotten and in which version
(`set_names.py`); our resolver inside vLLM makes that model or refuses. The answer's own word for its model must be that
name. A set's requests go to the same server as long as it is up (rendezvous hashing), so that each set is resident on
one server rather than on all. To forget nothing is a set too, an adapter of zeros: vLLM 0.32.0 answers requests for the
bare base with another request's adapter on CPUs (https://github.com/vllm-project/vllm/pull/48421).

Tokens are made and read here, with the base's own tokenizer, as in the embedded engine: vLLM gets and gives ids.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from ...adapters.read import read_bundle
from ...errors import AdapterError
from ...inference.bank import Applied
from ...models.base import load_tokenizer
from ..engine.base import (
    AdapterLease,
    Busy,
    Candidate,
    EngineStats,
    Generation,
    GenerationError,
    TextChunk,
    TokenLogprobs,
    Unavailable,
)
from ..engine.detokenize import TextStream, TokenBytes
from ..engine.encode import Prompt, Prompts
from .lora_cache import content_of
from .lora_names import LONGEST, SetName, set_digest
from .servers import Servers, VllmServer, message_of

if TYPE_CHECKING:
    from ...adapters.trust import Trust
    from ..policy.policy import Policy


@dataclass
class VllmLease:
    """A request's set, and the server that has it."""

    applied: tuple[Applied, ...]
    digest: str
    server: VllmServer
    model: str
    released: bool = False

    def release(self) -> None:
        """See `AdapterLease.release`."""
        if not self.released and self.model in self.server.names:
            self.server.names[self.model] = max(0, self.server.names[self.model] - 1)
        self.released = True


class VllmEngine:
    """Generates through vLLM's OpenAI routes.

    Args:
        urls: of the servers, all with the same base, e.g. http://10.0.0.7:8000.
        base: as for `load_base`; only its tokenizer and config are read.
        name: the public name; the base's own by default.
        names: how many sets a server may know; the longest unused are unloaded beyond this.
        seconds: how long to wait for a server's next word.
        trust: whose signatures are taken, and whether adapters need one; looked at here, where the adapters must lie at
            the same paths then. What is signed is named by its digest, so that vLLM applies that or refuses.

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
        trust: Trust | None = None,
    ) -> None:
        tokenizer, config, public = load_tokenizer(base)
        self.model, self._trust = name or public, trust
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        self._prompts = Prompts(copy.deepcopy(tokenizer), config.get_text_config().vocab_size, self.model)
        self._servers = Servers(urls, tokenizer, names=names, seconds=seconds)
        self.context = min(server.context for server in self._servers.all if server.base)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return await asyncio.to_thread(self._prompts, prompt)

    async def hold(self, forget: Mapping[str, float], policy: Policy, trust: Trust | None = None) -> VllmLease:
        """See `Engine.hold`; a server makes and loads the set before this returns."""
        trusts = [one for one in (self._trust, trust) if one is not None]
        try:
            applied = await asyncio.to_thread(_applied, forget, policy, trusts)
        except AdapterError as error:
            raise Unavailable(f"the adapter '{error.adapter}' cannot be used: {error}", error.adapter) from error
        version = set_digest((one.sha256, one.strength) for one in applied)
        name, digest = str(SetName(version, None, forget)), version if forget else ""
        if len(name) > LONGEST:
            raise Unavailable(f"{len(forget)} adapters are too many for one request to vLLM")
        try:
            server = await self._servers.first(digest, name)
        except Unavailable as refused:
            to_blame, why = await asyncio.to_thread(_culprit, forget, policy)
            raise Unavailable(f"{refused}{why}", to_blame) from refused
        return VllmLease(applied, digest, server, name)

    async def stream(self, request: Generation, holding: AdapterLease) -> AsyncGenerator[TextChunk, None]:
        """See `Engine.stream`."""
        assert isinstance(holding, VllmLease)
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
                        yield TextChunk(said, untold, told, reason)
                        untold = 0
                    if reason:
                        return
            raise GenerationError("vLLM's answer broke off")
        finally:
            server.streams -= 1

    async def problem(self) -> str | None:
        """See `Engine.problem`."""
        return None if await self._servers.well() else "no vLLM server is well"

    def stats(self) -> EngineStats:
        """See `Engine.stats`; what vLLM keeps to itself is None."""
        running = sum(server.streams for server in self._servers.all)
        return EngineStats(running=running, loads=self._servers.loads, load_seconds=self._servers.load_seconds)

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._servers.close()

    async def _chunks(
        self, request: Generation, holding: VllmLease, moved: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the choices that vLLM streams, each checked to be the set's; another server is tried once."""
        body = {
            "model": holding.model, "prompt": list(request.ids), "stream": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "max_tokens": request.max_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "top_k": request.top_k or -1, "seed": request.seed, "logprobs": request.logprobs,
            "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
            "ignore_eos": request.ignore_eos,
            # or vLLM takes what the model's generation_config.json says
            "min_p": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
        server = holding.server
        try:
            async with self._servers.http().stream("POST", f"{server.url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, await response.aread(), holding)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise GenerationError(f"vLLM could not finish the answer: {message_of(data.encode())}")
                    if chunk.get("model") != holding.model:
                        raise Unavailable("vLLM answered with another model than the set that was asked for")
                    for choice in chunk["choices"]:
                        yield choice
        except httpx.ConnectError:  # nothing has been said yet
            self._servers.mark_down(server)
            if moved:
                raise Unavailable("no vLLM server answers") from None
            if holding.server is server:
                holding.server = await self._servers.first(holding.digest, holding.model)
            async for choice in self._chunks(request, holding, moved=True):
                yield choice
        except (httpx.HTTPError, ValueError) as error:
            raise GenerationError(f"vLLM's answer broke off ({type(error).__name__})") from error

    def _refusal(self, status: int, body: bytes, holding: VllmLease) -> Exception:
        why = f"vLLM refuses ({status}: {message_of(body)})"
        if status in (429, 503):
            return Busy(why)
        if status in (400, 404):  # of the two, 400 is also for a set that was found and could not be loaded
            holding.server.names.pop(holding.model, None)
            return Unavailable(why)
        return GenerationError(why)

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


def _applied(forget: Mapping[str, float], policy: Policy, trusts: Sequence[Trust]) -> tuple[Applied, ...]:
    contents = {name: content_of(name, policy, trusts) for name in forget}
    return tuple(
        Applied(n, contents[n].identity, strength, (), contents[n].signed_by) for n, strength in forget.items()
    )


def _culprit(forget: Mapping[str, float], policy: Policy) -> tuple[str | None, str]:
    """Return which adapter cannot be used, as far as it can be seen from here, and why."""
    for name in forget:
        entry = policy.adapters[name]
        try:
            bundle = read_bundle(entry.path)
            if entry.sha256 not in (None, bundle.identity):
                return name, f"; the adapter '{name}' is not the one that the policy pins"
        except AdapterError as error:
            return name, f"; the adapter '{name}' cannot be used: {error}"
    return (next(iter(forget)) if len(forget) == 1 else None), ""
