"""A trial of compiling a JSON schema, in a process of its own: what does not end there does not begin here.

llguidance bounds most of its work, but not the intersection of patterns (`allOf` of 50 of them), and a thread cannot be
stopped. The process has a limit of processor time and memory, and the 256 bytes for tokens, since what has no bound
does not depend on the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)
SECONDS = 2  # of a processor, with the tenth of one that it takes to begin
_MAX_BYTES = 1 << 30  # of memory
_WALL_SECONDS = 60.0  # where the machine is busy, or has no limit of processor time
_KEPT = 1000  # schemas that passed and need no further trial


class SchemaTrials:
    """Tries schemas, and remembers which passed."""

    def __init__(self, style: dict[str, Any], limits: dict[str, Any]) -> None:
        self._settings = {"style": style, "limits": limits}
        self._passed = OrderedDict[bytes, None]()

    def __call__(self, schema: str, took: Callable[[float], None]) -> bool:
        """Return whether compiling ends within the limits, be it with an error; `took` gets the processor's seconds."""
        digest = hashlib.sha256(schema.encode()).digest()
        if digest in self._passed:
            return True
        command, data = [sys.executable, __file__], json.dumps({"schema": schema, **self._settings})
        seconds = float(SECONDS)
        try:
            run = subprocess.run(command, input=data.encode(), capture_output=True, timeout=_WALL_SECONDS)
            passed = run.returncode == 0
            seconds = float(run.stdout) if passed else seconds
            if run.returncode > 0:  # no signal: this is no limit of processor time
                logger.error("trying a schema failed with code %d, so it is refused", run.returncode)
        except subprocess.TimeoutExpired:
            passed = False
        took(seconds)
        if passed:
            self._passed[digest] = None
            while len(self._passed) > _KEPT:
                self._passed.popitem(last=False)
        return passed


class _Bytes:
    """A vocabulary of all bytes, as llguidance wants a tokenizer."""

    tokens, special_token_ids = [*(bytes([n]) for n in range(256)), b""], [256]
    eos_token_id, bos_token_id = 256, None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _try_it() -> None:
    """Compile what standard input has, and print the seconds of a processor that it took."""
    import time

    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    given = json.load(sys.stdin)
    try:
        text = LLMatcher.grammar_from_json_schema(given["schema"], overrides=given["style"])
    except (ValueError, RecursionError):
        text = None  # compiling it says why
    if text is not None:
        tokens = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=256)
        matcher = LLMatcher(tokens, text, log_level=0, limits=LLParserLimits(**given["limits"]))
        matcher.compute_logit_bias()
    print(time.process_time())


if __name__ == "__main__":
    _try_it()
