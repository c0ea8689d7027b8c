"""A prompt -> token ids, with a base's tokenizer and chat template."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ...data.prompt import ask, format_of, has_template
from ...data.tokenize import encode_text
from ...errors import DataError
from .base import PromptError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class Prompts:
    """Turns texts, ids and messages into ids; safe for many threads. `name` is the base's, for errors."""

    def __init__(self, tokenizer: Any, vocab_size: int, name: str) -> None:
        self._tokenizer, self._vocab_size, self._name, self._lock = tokenizer, vocab_size, name, threading.Lock()

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
        if unknown := [token for token in ids if not 0 <= token < self._vocab_size]:  # of a text, too
            raise PromptError(f"there is no token {unknown[0]}: expected 0 to {self._vocab_size - 1}")
        return tuple(ids)

    def _encode(self, messages: Sequence[Any], variables: Mapping[str, Any] | None) -> list[int]:
        try:
            text = ask(messages, self._tokenizer, variables=variables)
            return encode_text(text, self._tokenizer, templated=has_template(self._tokenizer))
        except DataError as error:  # it quotes nothing
            raise PromptError(str(error)) from None
        except Exception as error:  # jinja's TemplateError, or whatever the template's own code raises
            raise PromptError(f"the chat template refuses these messages ({type(error).__name__})") from None
