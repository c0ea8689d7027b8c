"""Token ids of an answer, one by one -> text that may be sent: whole characters, nothing of a stop string.

Why not `tokenizers.decoders.DecodeStream` (0.23)? Where the prompt ends within a character it sends a part of the
prompt, after bytes that are no UTF-8 it sends nothing more, and it needs a tokenizer in Rust (CTRL's is in Python).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from .base import TokenLogprobs

_PROMPT_TOKENS = 6  # are decoded along, so that a leading space is kept
_MAX_BYTES = 4  # of a character


class TextStream:
    """The text of one answer while it grows: `push` a token, then `take` what may be sent by now."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_PROMPT_TOKENS:])
        self._begin, self._end = 0, len(self._ids)  # of the ids that became text last; they are decoded along
        self._text, self._sent = "", 0
        self._logprobs: list[tuple[int, TokenLogprobs]] = []  # where the token's text begins
        self.stopped = False

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> bool:
        """Add a token; returns whether a stop string has come up, which ends the text before it."""
        if logprobs is not None:
            self._logprobs.append((len(self._text), logprobs))
        self._ids.append(token)
        self._decode_up_to(len(self._ids))
        if len(self._ids) - self._end >= _MAX_BYTES:  # the first of them begins no character
            self._decode_up_to(self._end + 1, whole=False)
        return self.stopped

    def take(self, *, last: bool = False) -> tuple[str, tuple[TokenLogprobs, ...]]:
        """Return the new text that may be sent, and the logprobs of its tokens.

        What could be the beginning of a stop string is held back, unless this is the `last` text. The beginning of a
        character is never sent.
        """
        end = len(self._text) if last or self.stopped else len(self._text) - self._held_back()
        text, self._sent = self._text[self._sent : end], max(end, self._sent)
        count = sum(begin < self._sent for begin, _ in self._logprobs)
        ready = tuple(logprobs for _, logprobs in self._logprobs[:count])
        del self._logprobs[:count]
        return text, ready

    def _decode_up_to(self, end: int, *, whole: bool = True) -> None:
        """Turn tokens up to `end` into text, if they are whole characters or need not be."""
        before, now = self._decode(self._ids[self._begin : self._end]), self._decode(self._ids[self._begin : end])
        if len(now) <= len(before) or (whole and now.endswith("\ufffd")):
            return
        self._text += now[len(before) :]
        self._begin, self._end = self._end, end
        # everything before _sent was compared with the stop strings already
        places = [at for stop in self._stop if (at := self._text.find(stop, self._sent)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True

    def _held_back(self) -> int:
        """Return how many characters at the end of the unsent text could begin a stop string."""
        unsent = self._text[self._sent :]
        begins = (stop[:n] for stop in self._stop for n in range(1, min(len(stop), len(unsent) + 1)))
        return max((len(begin) for begin in begins if unsent.endswith(begin)), default=0)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenBytes:
    """The UTF-8 bytes of single tokens, which may be parts of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        byte_level = bytes_to_unicode() if "ByteLevel" in repr(decoder) else {}  # GPT-2's: byte -> character
        self._byte_of = {character: byte for byte, character in byte_level.items()}

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token; a special token's are its name."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the head has more rows than the tokenizer has tokens
            return b""
        if token in self._special:
            return str(name).encode()
        if self._byte_of and all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes.fromhex(match[1])
        return str(name).replace("\u2581", " ").encode()
