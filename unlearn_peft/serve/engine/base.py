"""What the request handler needs of an engine: the embedded one (local.py) or the gateway to vLLM (vllm/engine.py).

The order of one request: `encode` its prompt, `hold` all adapters that it must have (or refuse it), `stream` its
answer, `release` the lease. An engine fails closed: it answers with exactly what is held, or raises.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import UnlearnError

if TYPE_CHECKING:
    from ...adapters.trust import Trust
    from ...inference.adapter_cache import Applied
    from ..policy.policy import Policy


class Unavailable(UnlearnError):
    """Something that must be forgotten cannot be: the request is refused (503). `adapter` names it, if it is one."""

    def __init__(self, message: str, adapter: str | None = None) -> None:
        super().__init__(message)
        self.adapter = adapter


class Busy(UnlearnError):
    """The engine takes no more requests for now (429); `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PromptError(UnlearnError):
    """A prompt that cannot be turned into tokens: the client's fault (400)."""


class FormatError(PromptError):
    """A response format that cannot be kept: the client's fault (400)."""


class GenerationError(UnlearnError):
    """An answer that could not be finished: the server's fault (500)."""


@dataclass(frozen=True)
class Generation:
    """One answer to be generated; `n` answers to a prompt are `n` of these. All ranges were checked before."""

    ids: tuple[int, ...]  # the whole prompt, chat template included
    max_tokens: int
    tenant: str = ""  # whose it is: others' answers go on while it is read
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None  # None: another answer each time
    stop: tuple[str, ...] = ()  # the answer ends before the first of these, which is not part of it
    logprobs: int | None = None  # None: none; 0: the chosen tokens'; n: the n likeliest tokens' too
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)  # headers for an engine elsewhere: the request's span
    grammar: Any = None  # what `Engine.compile` returned: the answer follows it
    # gets the seconds for which all other answers waited for this one's prompt, whether or not it is still wanted then
    prefilled: Callable[[float], None] = field(default=lambda seconds: None, compare=False)
    cache_salt: str | None = None  # what the prompt begins with may be kept for requests with the same; None: for none

    @property
    def size(self) -> int:
        """Tokens that it may come to have, whose keys and values take memory."""
        return len(self.ids) + self.max_tokens


@dataclass(frozen=True)
class Candidate:
    """A token that could stand at one place of an answer, and its log-probability in nats."""

    id: int
    data: bytes  # its UTF-8 bytes; may be part of a character
    logprob: float  # of the model's own distribution: before temperature, top_p, top_k and penalties

    @property
    def text(self) -> str:
        """The bytes as text; parts of a character show as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token at one place of an answer, and the likeliest ones (the likeliest first)."""

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class TextChunk:
    """The next part of an answer. The last one, and no other, has a finish reason."""

    text: str  # whole characters, never (part of) a stop string; may be empty
    tokens: int  # generated since the last chunk, the end token included
    logprobs: tuple[TokenLogprobs, ...] = ()  # if asked for: of the tokens that reached the text
    finish_reason: str | None = None  # "stop" (an end token or stop string) or "length"


class AdapterLease(Protocol):
    """The adapters of one request: the same versions from its start to its end."""

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The exact adapters and strengths, for the audit log."""

    @property
    def digest(self) -> str:
        """Equal if and only if the same contents with the same strengths; "" for the empty set."""

    def release(self) -> None:
        """Let go, after all streams of the request have ended. A second call does nothing."""


@dataclass(frozen=True)
class EngineStats:
    """For /metrics; None where an engine cannot know."""

    running: int | None = None  # answers in the batch
    waiting: int | None = None  # answers that wait for a place in it
    resident: int | None = None  # adapters in memory
    resident_bytes: int | None = None
    loads: int | None = None  # adapters read since the start
    load_seconds: float | None = None  # in all
    kv_used_bytes: int | None = None  # keys and values of rows, padding included, and of the prefix cache
    kv_bytes: int | None = None  # the room for them
    prefix_bytes: int | None = None  # of these, what the prefix cache has
    prefix_tokens: int | None = None  # tokens of prompts that were not read again since the start, thanks to it
    half_speed_rows: float | None = None  # with so many rows in the batch each gets tokens half as fast as alone


class Engine(Protocol):
    """Generates answers, each with its own set of adapters."""

    @property
    def model(self) -> str:
        """The base's public name, for /v1/models."""

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""

    @property
    def kv_tokens(self) -> int | None:
        """Tokens whose keys and values have room; each answer under way takes as many as the longest may come to have.
        None: the engine sees to that itself.
        """

    @property
    def chat_ends(self) -> tuple[str, ...]:
        """Texts that end the answer to messages, where the base has no chat template; see `data.prompt`."""

    def encode(
        self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """Return the token ids of a text, of ids (which are checked), or of messages (by the chat template, which gets
        `variables`, else the prompt format). It is called in a thread.

        Raises:
            PromptError: if there is no such token, or the template refuses the messages.
        """

    def compile(self, schema: str, took: Callable[[float], None]) -> Any:
        """Return the grammar of answers that are JSON and follow a schema (JSON text), for `Generation.grammar`.

        It is called in a thread. `took` gets the seconds of a processor that it takes elsewhere.

        Raises:
            FormatError: why the schema cannot be used.
        """

    async def hold(
        self, forget: Mapping[str, float], policy: Policy, trust: Trust | None = None, added: Collection[str] = ()
    ) -> AdapterLease:
        """Load, verify and keep everything in `forget` (names of `policy.adapters` -> strength).

        What the request itself `added` takes no memory from the adapters that tenants must have forgotten.

        With `trust`, the tenant's own, all of it must also be signed so; `applied` then names who signed.

        Raises:
            Unavailable: naming the adapter that cannot be used.
        """

    def set_trust(self, trust: Trust) -> None:
        """Require the server's own signatures of these from the next `hold` on, also of what is in memory."""

    def stream(self, request: Generation, lease: AdapterLease) -> AsyncGenerator[TextChunk, None]:
        """Generate one answer. Closing the generator early (`aclose`) cancels the rest of it.

        Raises (while iterating):
            Unavailable: if what is held cannot be applied after all.
            Busy: if it takes no more requests.
            GenerationError: if the answer cannot be finished.
        """

    async def problem(self) -> str | None:
        """Return why it cannot serve now, in one sentence, or None if it can; for /readyz."""

    def stats(self) -> EngineStats:
        """Return current figures, at once."""

    async def close(self) -> None:
        """Stop; answers that still run end with a GenerationError."""
