"""A JSON schema -> which tokens may come next in an answer, by llguidance.

llguidance was taken of three libraries: it parses while tokens come, so that compiling takes milliseconds whatever the
vocabulary, has limits on each part of its work, needs no other package, and frees Python's lock meanwhile. xgrammar
brings Triton and TVM along; outlines-core builds an automaton over the whole vocabulary before the first token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import printable
from .base import FormatError
from .detokenize import TokenBytes
from .schema_trial import SchemaTrials

_LIMITS: dict[str, Any] = {  # of one schema; the row that exceeds them is refused
    "max_items_in_row": 600, "initial_lexer_fuel": 500_000, "step_lexer_fuel": 50_000, "step_max_items": 20_000,
    "max_lexer_states": 20_000, "max_grammar_size": 50_000, "verbose_errors": False,
}  # fmt: skip
# no endless white space, which a small model likes to write; never what a schema's own "x-guidance" says
_STYLE: Any = {"whitespace_pattern": r"\n?[ ]{0,16}", "lenient": False, "coerce_one_of": True}
_BURST_SECONDS, _TOKEN_SECONDS = 0.25, 0.003  # of a processor, for masks of one answer: in all, and for each token
_STACK_BYTES = 64 << 20  # compiling recurses into a schema; Python's threads have 8 MB or less
_FORCED_BYTES = 256  # of what must come next, that are tokenized
_SAMPLE = '{"a b": ["Zoë", 1.5, {"x_y": null}]}'


class Grammars:
    """Compiles schemas for one base's tokens; safe for many threads.

    `tokenizer` returns one that no other thread uses; it is called when it is first needed, and its vocabulary read,
    which takes a second if it is large. `ends` are the tokens that end an answer.
    """

    def __init__(self, tokenizer: Callable[[], Any], vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._lock, self._tokens, self._trials = threading.Lock(), None, SchemaTrials(_STYLE, _LIMITS)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="unlearn-peft schemas")

    def compile(self, schema: str, took: Callable[[float], None] = lambda seconds: None) -> Future[Grammar]:
        """Return what a schema (JSON text) allows, or a FormatError that says why it cannot be used.

        `took` gets the seconds of a processor that it takes, in parts, before that.
        """
        before = threading.stack_size(_STACK_BYTES)  # of threads that are started from here on
        try:
            return self._threads.submit(self._compile, schema, took)
        finally:
            threading.stack_size(before)

    def close(self) -> None:
        """Start no further thread."""
        self._threads.shutdown(wait=False)

    def _compile(self, schema: str, took: Callable[[float], None]) -> Grammar:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise FormatError("this server has no llguidance: pip install 'unlearn-peft[serve]'") from None
        with self._lock:
            tokens = self._tokens = self._tokens or self._read_tokens()
        if not self._trials(schema, took):
            raise _refusal("compiling it takes too long or too much memory")
        began = time.thread_time()
        try:
            text = LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)
            matcher = LLMatcher(tokens, text, log_level=0, limits=LLParserLimits(**_LIMITS))
            grammar = Grammar(matcher)
            grammar.start().allowed(self._vocab_size)  # the first mask says most of what is wrong
        except (ValueError, RecursionError) as error:
            raise _refusal(str(error)) from None
        finally:
            took(time.thread_time() - began)
        return grammar

    def _read_tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        size = self._vocab_size + (not self._ends)  # llguidance needs an end token: one that no model can choose
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer(), size, self._ends or [self._vocab_size])),
            n_vocab=size, eos_token=self._ends or [self._vocab_size],
        )  # fmt: skip


class Grammar:
    """A compiled schema; each answer starts its own `Constraint`."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Constraint:
        """Return the constraint of one answer, at its beginning."""
        return Constraint(self._matcher.deep_copy())


class Constraint:
    """What one answer may go on with. Masks that take too long in all end it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._seconds = matcher, _BURST_SECONDS

    def allowed(self, size: int) -> Tensor:
        """Return which tokens may come next, (size,) of bool.

        Raises:
            FormatError: the schema is beyond a limit here.
        """
        began = time.thread_time()
        data = self._matcher.compute_logit_bias()
        self._seconds += _TOKEN_SECONDS - (time.thread_time() - began)
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error())
        if self._seconds < 0:
            raise _refusal("finding out what may come next takes too long")
        mask = torch.frombuffer(bytearray(data), dtype=torch.uint8)[:size].bool()
        if not mask.any():
            raise _refusal("nothing can follow")
        return pad(mask, (0, size - len(mask)))

    def push(self, token: int) -> bool:
        """Take the token that was chosen; returns whether the answer is whole, and nothing may follow.

        Raises:
            FormatError: the schema is beyond a limit here.
        """
        if not self._matcher.consume_token(token):  # it counts as stopped, too, and the answer is not whole
            raise _refusal(self._matcher.get_error())
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Any, size: int, ends: Collection[int]) -> None:
        data = TokenBytes(tokenizer)
        special = {int(id) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_token_ids = sorted({*special, *tokenizer.all_special_ids, *ends})
        self.tokens = [data(id) if id < len(tokenizer) else b"" for id in range(size)]
        self.eos_token_id, self.bos_token_id = min(ends), tokenizer.bos_token_id
        plain = set(range(size)) - set(self.special_token_ids)
        self._ids = {self.tokens[id]: id for id in sorted(plain, reverse=True) if self.tokens[id]}
        self._longest = max(map(len, self._ids), default=0)
        ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        if b"".join(self.tokens[id] for id in ids).decode(errors="replace").strip() != _SAMPLE:
            raise FormatError(
                "this base cannot write JSON: its tokens are not the bytes of its text, so no response_format other "
                "than text can be kept"
            )

    def __call__(self, text: str | bytes) -> list[int]:
        """Return tokens of what must come next: the longest ones, of as much as a mask needs."""
        data = (text.encode() if isinstance(text, str) else text)[:_FORCED_BYTES]
        ids, place = list[int](), 0
        while place < len(data):
            ends = range(min(len(data), place + self._longest), place, -1)
            end = next((end for end in ends if data[place:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[place:end]])
            place = end
        return ids


def _refusal(reason: str) -> FormatError:
    words = " ".join(reason.partition("<non-verbose")[0].split())[:200]
    return FormatError(f"the response_format's schema cannot be used: {printable(words, lines=False)}")
