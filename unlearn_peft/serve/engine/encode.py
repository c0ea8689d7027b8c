"""A prompt -> token ids, with a base's tokenizer and chat template."""

from __future__ import annotations

import copy
import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ...data.prompt import ask, format_of, has_template
from ...data.tokenize import encode_text
from ...errors import DataError
from .base import PromptError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
# what a template may make of messages and variables: deep tools, indented (Llama 3), would be hundreds of times as long
_FREE_CHARACTERS, _GROWTH = 65_536, 8


class Prompts:
    """Turns texts, ids and messages into ids; safe for many threads. `name` is the base's, for errors."""

    def __init__(self, tokenizer: Any, vocab_size: int, name: str) -> None:
        self._tokenizer, self.vocab_size, self._name, self._lock = tokenizer, vocab_size, name, threading.Lock()

        marks = {str(token): int(id) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = {token: id for token, id in marks.items() if token}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        form = format_of(tokenizer)
        self.ends = tuple(form.ends) if form else ()  # of answers to messages

    def __call__(self, prompt: Prompt, variables: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """See `Engine.encode`."""
        if not isinstance(prompt, str) and (not prompt or isinstance(prompt[0], int)):
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
        else:
            with self._lock:  # special tokens as vLLM has them: always with a text, never with a rendered template
                if isinstance(prompt, str):
                    ids = self._tokenizer(prompt)["input_ids"]
                else:
                    ids = self._encode(prompt, variables)
        if not ids:
            raise PromptError("the prompt is empty")
        if unknown := [token for token in ids if not 0 <= token < self.vocab_size]:  # of a text, too
            raise PromptError(f"there is no token {unknown[0]}: expected 0 to {self.vocab_size - 1}")
        return tuple(ids)

    def copied_tokenizer(self) -> Any:
        """Return a copy of the tokenizer, for another thread."""
        with self._lock:
            return copy.deepcopy(self._tokenizer)

    def _encode(self, messages: Sequence[Any], variables: Mapping[str, Any] | None) -> list[int]:
        """Encode messages, in whose texts the names of special tokens are words and no tokens."""
        others = [{name: value for name, value in message.items() if name != "content"} for message in messages]
        told = json.dumps([variables, others], ensure_ascii=False)
        if self._special.search(told):
            what = "a tool, a call of one, a name, or a variable of the chat template"
            raise PromptError(f"{what} holds a special token of this base: leave it out")
        nonce, words = secrets.token_hex(8), list[str]()

        def hide(match: re.Match[str]) -> str:
            words.append(match[0])
            return f"\ue002{nonce}{len(words) - 1}\ue003"

        hidden = [{**message, "content": self._special.sub(hide, message["content"])} for message in messages]
        most = _FREE_CHARACTERS + _GROWTH * (len(told) + sum(len(message["content"]) for message in hidden))
        try:
            text = ask(hidden, self._tokenizer, variables=variables)
            if len(text) > most:
                raise PromptError(
                    f"the chat template makes {len(text)} characters of this, expected at most {most}: nest less deeply"
                )
            if "tools" in (variables or {}):
                without = ask(hidden, self._tokenizer, variables={**(variables or {}), "tools": None})
                if text == without:
                    raise PromptError("this base has no chat template that shows tools: leave them out")
        except PromptError:
            raise
        except DataError as error:  # it quotes nothing
            raise PromptError(str(error)) from None
        except Exception as error:  # jinja's TemplateError, or whatever the template's own code raises
            raise PromptError(f"the chat template refuses these messages ({type(error).__name__})") from None
        templated = has_template(self._tokenizer)
        if not words:
            return encode_text(text, self._tokenizer, templated=templated)
        ids, place = encode_text("", self._tokenizer, templated=templated), 0
        for token in self._special.finditer(text):  # the template's own
            ids += [*self._plain(text[place : token.start()], nonce, words), self._special_ids[token[0]]]
            place = token.end()
        return ids + self._plain(text[place:], nonce, words)

    def _plain(self, text: str, nonce: str, words: Sequence[str]) -> list[int]:
        """Encode a part of a rendered text with what `_encode` hid in it, all as words."""
        text = re.sub(f"\ue002{nonce}([0-9]+)\ue003", lambda match: words[int(match[1])], text)
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if nonce in text or not set(self._special_ids.values()).isdisjoint(ids):
            raise PromptError("a message holds a special token of this base, which cannot be told apart: leave it out")
        return list(ids)
