"""Token ids of an answer, one by one -> text that may be sent: whole characters, nothing of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .base import TokenLogprobs

_SEEDED = 6  # tokens of the prompt that are decoded along, so that a leading space is kept
_BYTES_OF_A_CHARACTER = 4


class TextStream:
    """The text of one answer while it grows.

    `push` a token, then `take` what may be sent by now; `finish` when no more tokens come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_SEEDED:])
        self._from, self._read = 0, len(self._ids)  # what is decoded anew each time; what has become text
        self._text, self._sent = "", 0
        self._logprobs: list[tuple[int, TokenLogprobs]] = []  # where the token's text begins
        self.stopped = False

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> bool:
        """Add a token; returns whether a stop string has come up, which ends the text before it."""
        if logprobs is not None:
            self._logprobs.append((len(self._text), logprobs))
        self._ids.append(token)
        self._settle(len(self._ids))
        if len(self._ids) - self._read >= _BYTES_OF_A_CHARACTER:  # the first of them begins no character
            self._settle(self._read + 1, whole=False)
        return self.stopped

    def take(self, *, last: bool = False) -> tuple[str, tuple[TokenLogprobs, ...]]:
        """Return the new text that may be sent, and the logprobs of its tokens.

        What could be the beginning of a stop string is kept back, unless this is the `last` text. The beginning of a
        character is never sent.
        """
        end = len(self._text) if last or self.stopped else len(self._text) - self._kept_back()
        text, self._sent = self._text[self._sent : end], max(end, self._sent)
        ready = sum(begin < self._sent for begin, _ in self._logprobs)
        taken = tuple(entry for _, entry in self._logprobs[:ready])
        del self._logprobs[:ready]
        return text, taken

    def _settle(self, end: int, *, whole: bool = True) -> None:
        """Let tokens up to `end` become text, if they are whole characters or need not be."""
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from : end])
        if len(now) <= len(before) or (whole and now.endswith("\ufffd")):
            return
        self._text += now[len(before) :]
        self._from, self._read = self._read, end
        # everything before _sent was held against the stop strings already
        found = [at for stop in self._stop if (at := self._text.find(stop, self._sent)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _kept_back(self) -> int:
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text) - self._sent), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenBytes:
    """The UTF-8 bytes of single tokens, which may be parts of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in repr(decoder) else None

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token; a special token's are its name."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the head has more rows than the tokenizer has tokens
            return b""
        if token in self._special:
            return str(name).encode()
        if self._byte_of is not None and all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes.fromhex(found[1])
        return str(name).replace("\u2581", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes: the printable ones stand for themselves, the rest follow."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
