"""The gateway engine: our server keeps tenants, policy and audit; vLLM servers generate.

Each request asks vLLM for a model whose name says exactly what must be forgotten and in which version (lora_names.py);
our resolver inside vLLM makes that model or refuses, and the answer must name that model. A set's requests go to the
same server as long as it is up (rendezvous hashing), so that each set is loaded on one server rather than on all.
To forget nothing is a set too, an adapter of zeros: vLLM 0.32.0 answers requests for the bare base with another
request's adapter on CPUs (https://github.com/vllm-project/vllm/pull/48421).

Prompts and answers are tokenized here, with the base's own tokenizer, as in the embedded engine: vLLM gets and returns
ids.
"""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from ...adapters.read import read_bundle
from ...data.prompt import end_tokens
from ...errors import AdapterError, DataError
from ...inference.adapter_cache import Applied
from ...models.base import load_tokenizer
from ..canary import read_probes
from ..engine.base import (
    AdapterLease,
    Busy,
    Candidate,
    EngineStats,
    FormatError,
    Generation,
    GenerationError,
    PromptError,
    TextChunk,
    TokenLogprobs,
    Unavailable,
)
from ..engine.detokenize import TextStream, TokenBytes
from ..engine.encode import Prompt, Prompts
from ..engine.grammar import Grammars
from .load_check import ANSWER_TOKENS, Probe, WantedSet
from .lora_cache import contents_of
from .lora_names import MAX_LENGTH, SetName, set_digest
from .servers import Servers, VllmServer, message_of, token_of

if TYPE_CHECKING:
    from ...adapters.trust import Trust
    from ..policy.policy import Policy

_PROBED, _PROBES = 4, 3  # adapters of a set, and probes of each, that are asked after each load


@dataclass
class VllmLease:
    """An `AdapterLease`: a request's set, and the server that has loaded it."""

    applied: tuple[Applied, ...]
    wanted: WantedSet
    server: VllmServer
    released: bool = False

    @property
    def digest(self) -> str:
        """See `AdapterLease`."""
        return self.wanted.digest

    @property
    def model(self) -> str:
        """The set's name in vLLM."""
        return self.wanted.name

    def release(self) -> None:
        """See `AdapterLease.release`."""
        if not self.released and self.model in self.server.names:
            self.server.names[self.model] = max(0, self.server.names[self.model] - 1)
        self.released = True


class VllmEngine:
    """Generates through vLLM's OpenAI routes.

    Args:
        urls, names, seconds: see `Servers`, also for what is raised.
        base: as for `load_base`; only its tokenizer and config are read.
        name: the public name; the base's own by default.
        trust: see `Bank`. Signatures are checked here, where the adapters must lie at the same paths then. What is
            signed is named by its digest, so that vLLM applies that or refuses.
        prefix_cache: whether vLLM may keep what prompts begin with, for requests of the same tenant with the same set.
        prompt_format: how messages are asked, see `data.prompt`; None: by the base's template.
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
        prefix_cache: bool = True,
        prompt_format: str | None = None,
    ) -> None:
        tokenizer, config, public = load_tokenizer(base)
        tokenizer.prompt_format = prompt_format
        self.model, self._trust = name or public, trust
        self.kv_tokens: int | None = None  # vLLM queues what has no room
        self._keeps_prefixes = prefix_cache
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        self._prompts = Prompts(copy.deepcopy(tokenizer), config.get_text_config().vocab_size, self.model)
        self.chat_ends = self._prompts.ends
        self._grammars = Grammars(self._prompts.copied_tokenizer, self._prompts.vocab_size, end_tokens(tokenizer))
        self._ends = end_tokens(tokenizer)  # beside those of generation_config.json, which vLLM knows
        self._servers = Servers(urls, tokenizer, self._prompts, names=names, seconds=seconds)
        self.context = min(server.context for server in self._servers.all if server.base)

    def encode(self, prompt: Prompt, variables: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._prompts(prompt, variables)

    def compile(self, schema: str, took: Callable[[float], None] = lambda seconds: None) -> Any:
        """See `Engine.compile`. vLLM compiles it with the request; what it cannot, it answers with 500, or hangs up
        on in the middle (https://github.com/vllm-project/vllm/issues/57725), so it is compiled here first.
        """
        self._grammars.compile(schema, took).result()
        return json.loads(schema)

    async def hold(
        self, forget: Mapping[str, float], policy: Policy, trust: Trust | None = None, added: Collection[str] = ()
    ) -> VllmLease:
        """See `Engine.hold`; a server makes and loads the set before this returns, and has memory for each alike."""
        trusts = [required for required in (self._trust, trust) if required is not None]
        try:
            applied = await asyncio.to_thread(contents_of, forget, policy, trusts)
        except AdapterError as error:
            raise Unavailable(f"the adapter '{error.adapter}' cannot be used: {error}", error.adapter) from error
        version = set_digest((part.sha256, part.strength) for part in applied)
        probes = partial(self._probes_of, forget, policy)
        wanted = WantedSet(str(SetName(version, None, forget)), version if forget else "", probes)
        if len(wanted.name) > MAX_LENGTH:
            raise Unavailable(f"{len(forget)} adapters are too many for one request to vLLM")
        try:
            server = await self._servers.acquire(wanted)
        except Unavailable as error:
            adapter, reason = await asyncio.to_thread(_find_unusable, forget, policy)
            raise Unavailable(f"{error}{reason}", adapter) from error
        return VllmLease(applied, wanted, server)

    def set_trust(self, trust: Trust) -> None:
        """See `Engine.set_trust`."""
        self._trust = trust

    async def stream(self, request: Generation, lease: AdapterLease) -> AsyncGenerator[TextChunk, None]:
        """See `Engine.stream`."""
        assert isinstance(lease, VllmLease)
        text, undelivered = TextStream(self._tokenizer, request.ids, request.stop), 0
        server = lease.server
        server.streams += 1
        try:
            async with aclosing(self._chunks(request, lease)) as chunks:
                async for choice in chunks:
                    tokens, reason = choice.get("token_ids") or [], choice.get("finish_reason")
                    logprobs = self._logprobs(choice, request)
                    ended = reason == "stop" and not request.ignore_eos  # then the last token is the end token
                    for n, token in enumerate(tokens):
                        undelivered += 1
                        last = ended and n == len(tokens) - 1
                        if not last and text.push(token, logprobs[n] if logprobs else None):
                            reason = "stop"
                            break
                    if reason not in (None, "stop", "length"):
                        raise GenerationError(f"vLLM ended the answer: {reason}")
                    part, ready = text.take(last=reason is not None)
                    if part or ready or reason:
                        yield TextChunk(part, undelivered, ready, reason)
                        undelivered = 0
                    if reason:
                        return
            raise GenerationError("vLLM's answer broke off")
        finally:
            server.streams -= 1

    async def problem(self) -> str | None:
        """See `Engine.problem`."""
        return None if await self._servers.any_healthy() else "no vLLM server is healthy"

    def stats(self) -> EngineStats:
        """See `Engine.stats`; what vLLM keeps to itself is None."""
        running = sum(server.streams for server in self._servers.all)
        return EngineStats(running=running, loads=self._servers.loads, load_seconds=self._servers.load_seconds)

    async def close(self) -> None:
        """See `Engine.close`."""
        self._grammars.close()
        await self._servers.close()

    async def _chunks(
        self, request: Generation, lease: VllmLease, moved: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the choices that vLLM streams, each checked to be of the lease's model; tries another server once."""
        body = {
            "model": lease.model, "prompt": list(request.ids), "stream": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "max_tokens": request.max_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "top_k": request.top_k or -1, "seed": request.seed, "logprobs": request.logprobs,
            "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
            "ignore_eos": request.ignore_eos, "stop_token_ids": [] if request.ignore_eos else self._ends,
            **({} if request.grammar is None else {"structured_outputs": {"json": request.grammar}}),
            # whose beginning of a prompt vLLM may keep, of one with the same model alone
            "cache_salt": (self._keeps_prefixes and request.cache_salt) or secrets.token_hex(16),
            # or vLLM takes what the model's generation_config.json says
            "min_p": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
        server = lease.server
        try:
            async with self._servers.http().stream(
                "POST", f"{server.url}/v1/completions", json=body, headers=request.trace
            ) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, await response.aread(), lease, request)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise GenerationError(f"vLLM could not finish the answer: {message_of(data.encode())}")
                    if chunk.get("model") != lease.model:
                        raise Unavailable("vLLM answered with another model than the set that was asked for")
                    for choice in chunk["choices"]:
                        yield choice
        except httpx.ConnectError:  # nothing was streamed yet
            self._servers.mark_down(server)
            if moved:
                raise Unavailable("no vLLM server answers") from None
            if lease.server is server:
                lease.server = await self._servers.acquire(lease.wanted)
            async for choice in self._chunks(request, lease, moved=True):
                yield choice
        except (httpx.HTTPError, ValueError) as error:
            raise GenerationError(f"vLLM's answer broke off ({type(error).__name__})") from error

    def _probes_of(self, forget: Mapping[str, float], policy: Policy) -> list[list[Probe]]:
        """Return the first probes of the first adapters of a set that have some; reads files."""
        found = list[list[Probe]]()
        for entry in (policy.adapters[name] for name in forget):
            path = None if entry.canary == "off" or len(found) >= _PROBED else entry.probes_path
            if path is None:
                continue
            with suppress(DataError, PromptError):  # serve/canary.py, which asks them all, says so
                rows = read_probes(path).rows[:_PROBES]
                prompts = [self.encode([{"role": "user", "content": row["prompt"]}]) for row in rows]
                probes = [(prompt, tuple(row["leak"])) for prompt, row in zip(prompts, rows, strict=True)]
                if fitting := [probe for probe in probes if len(probe[0]) + ANSWER_TOKENS <= self.context]:
                    found.append(fitting)
        return found

    def _refusal(self, status: int, body: bytes, lease: VllmLease, request: Generation) -> Exception:
        message = f"vLLM refuses ({status}: {message_of(body)})"
        if status == 400 and request.grammar is not None and ("grammar" in message or "schema" in message):
            return FormatError("the response_format's schema cannot be used: vLLM cannot compile it")
        if status in (429, 503):
            return Busy(message)
        if status in (400, 404):  # 400 also for a set that was found and could not be loaded
            lease.server.names.pop(lease.model, None)
            return Unavailable(message)
        return GenerationError(message)

    def _logprobs(self, choice: Mapping[str, Any], request: Generation) -> list[TokenLogprobs] | None:
        """Read vLLM's logprobs, whose tokens are `token_id:N`; its likeliest tokens include the chosen one."""
        logprobs = choice.get("logprobs")
        if request.logprobs is None or not logprobs:
            return None
        entries = []
        for n, chosen in enumerate(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)):
            top = logprobs["top_logprobs"][n].items() if request.logprobs else ()
            likeliest = sorted(top, key=lambda item: -item[1])[: request.logprobs]
            entries.append(TokenLogprobs(self._candidate(*chosen), tuple(self._candidate(*item) for item in likeliest)))
        return entries

    def _candidate(self, token: str, logprob: float) -> Candidate:
        number = token_of(token)
        return Candidate(number, self._bytes(number), logprob)


def _find_unusable(forget: Mapping[str, float], policy: Policy) -> tuple[str | None, str]:
    """Return which adapter cannot be used, as far as it can be seen from here, and why."""
    for name in forget:
        entry = policy.adapters[name]
        try:
            if entry.sha256 not in (None, read_bundle(entry.path).identity):
                return name, f"; the adapter '{name}' is not the one that the policy pins"
        except AdapterError as error:
            return name, f"; the adapter '{name}' cannot be used: {error}"
    return (next(iter(forget)) if len(forget) == 1 else None), ""
