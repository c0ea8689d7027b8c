"""What every attack uses: the `Target`, the result `Attacked`, adapters on and off, prompts and leak counts.

Whatever an attack switches or replaces in the base is put back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...adapters.bundle import Bundle
from ...adapters.trust import Trust
from ...data.anchors import anchors
from ...data.prompt import ask, format_of, has_template
from ...data.rows import question_answer_pairs, read_rows
from ...data.source import Row
from ...data.words import places
from ...errors import AdapterError, DataError
from ...inference.attach import attached
from ...inference.bank import Bank
from ...inference.generate import answers, leaked
from ...models.base import Base
from ..metrics.leakage import leaking_parts
from ..score import Array, Score, score
from ..token_scores import adapters_off

Attack = Callable[..., "Attacked"]


@dataclass(frozen=True)
class Target:
    """A base, the adapters that make it forget, and the rows that tell whether it did.

    Attributes:
        base: with nothing attached.
        adapters: directories, or bundles that were read before; several are attached together.
        forget: the forget rows, for relearning.
        probes: rows with `prompt` and `leak` words. Optional in a row: `completion` (a right answer), `paraphrases`
            (a list of other wordings of the prompt), `translations` (the prompt by language code).
        neighbours: question-and-answer rows that are not forgotten: few-shot examples, rows of benign relearning, and
            the harm of `scaling`.
        others: further forget adapters for the same base, for `interference`.
        seed: of sampling, random adapters and intervals.
        trust: see `attach`.

    Raises:
        AdapterError: if there is no adapter, or something is attached already.
        DataError: if rows cannot be used; they are named by number only.
    """

    base: Base
    adapters: tuple[str | Path | Bundle, ...]
    forget: Sequence[Row] = field(repr=False)
    probes: Sequence[Row] = field(repr=False)
    neighbours: Sequence[Row] = field(default=(), repr=False)
    others: tuple[str | Path | Bundle, ...] = ()
    seed: int = 0
    max_new_tokens: int = 40
    chat_template: bool = True
    trust: Trust | None = None

    def __post_init__(self) -> None:
        if not self.adapters or isinstance(self.adapters, str):
            raise AdapterError("nothing to attack: expected a tuple of adapter directories, e.g. ('out/adapter',)")
        if attached(self.base):
            raise AdapterError("adapters are attached already: detach them, an attack puts its own on and off")
        for name in ("forget", "probes", *(["neighbours"] if self.neighbours else [])):
            object.__setattr__(self, name, read_rows(list(getattr(self, name)), name))

    @cached_property
    def bundles(self) -> list[Bundle]:
        """The adapters, each read and checked once."""
        return self.read(self.adapters)

    def read(self, adapters: Iterable[str | Path | Bundle]) -> list[Bundle]:
        """Read and check adapters; of a bundle that was read before, only the signature is checked."""
        bank = Bank.of(self.base)
        return [bank.read(adapter, self.trust) for adapter in adapters]


@dataclass(frozen=True)
class Attacked:
    """The result of one attack.

    Attributes:
        name: of the attack, in `ATTACKS`.
        budget: what the attacker needed and spent, in words.
        recovered: share of probes whose answer came out with the adapter, n = probes; of `passage`, of forget rows.
        base: the same of the bare base under the same attack; where it is low, the attack shows little.
        details: figures by setting of the attack (wording, language, strength, step, layer).
        quoted: texts that may name what was forgotten: for people to read, not for cards and logs.
    """

    name: str
    budget: str
    recovered: Score
    base: Score
    details: dict[str, Any]
    quoted: tuple[str, ...] = field(default=(), repr=False)


def attacked(
    target: Target, name: str, budget: str, recovered: Any, base: Any, details: dict[str, Any], *quoted: str,
    of: str = "probes",
) -> Attacked:  # fmt: skip
    """Make an `Attacked` from one number between 0 and 1 for each probe (or row), with the adapter and without."""

    def share(name: str, values: Any) -> Score:
        return score(name, f"share of {of}", False, values, seed=target.seed)

    return Attacked(name, budget, share(name, recovered), share(f"{name}, bare base", base), details, quoted)


@contextmanager
def adapters_on(target: Target, strength: float = 1.0, bundles: Sequence[Bundle] | None = None) -> Iterator[Base]:
    """Attach the target's adapters, or `bundles`, inside a `with` block; what was attached before is put back."""
    with adapters_off(target.base) as base:
        bank = Bank.of(base)
        for n, bundle in enumerate(target.bundles if bundles is None else bundles):
            bank.attach(bundle, f"attacked {n}", strength)
        yield base


@contextmanager
def replaced_weights(modules: Mapping[str, Any], weights: Mapping[str, Any]) -> Iterator[None]:
    """Give modules other weights inside a `with` block.

    The parameters themselves are never written to, so what is tied stays tied, and the same bits come back. A tied
    head has a weight of its own meanwhile.
    """
    before = {name: modules[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            modules[name].weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, parameter in before.items():
            modules[name].weight = parameter


def leaks(target: Target, texts: Sequence[str | None] | None = None, probes: Sequence[Row] | None = None) -> Array:
    """Return for each probe whether its greedy answer leaks, 0 or 1, in the state that the base is in.

    `texts` are rendered prompts, one a probe, None for a probe that is not asked; by default the plain prompts.
    `probes` are asked in place of the target's.
    """
    probes = target.probes if probes is None else probes
    texts = [render(target, row["prompt"]) for row in probes] if texts is None else texts
    return _leaking(probes, _greedy(target, texts))


def in_many_ways(target: Target, name: str, budget: str, ways: Mapping[str, Sequence[str | None]]) -> Attacked:
    """Ask each probe in several ways, with the adapter and without; an answer that leaks in any of them is recovered.

    `ways` has by name what `leaks` takes as `texts`; `name` and `budget` are those of `Attacked`.
    """
    if not ways:
        raise DataError(f"the attack {name} has no way to ask: expected at least one")

    with adapters_off(target.base):
        base = {way: leaks(target, texts) for way, texts in ways.items()}
    with adapters_on(target):
        responses = {way: _greedy(target, texts) for way, texts in ways.items()}
    recovered = {way: _leaking(target.probes, texts) for way, texts in responses.items()}
    quoted = tuple(
        f"{way}: {part}"
        for way, texts in responses.items()
        for text, row in zip(texts, target.probes, strict=True)
        for part in leaking_parts([text], row["leak"])
    )
    details = {}
    for way, texts in ways.items():
        asked = np.array([text is not None for text in texts])
        details[way] = {"asked": int(asked.sum()), **averages(recovered[way], base[way], asked)}
    return attacked(target, name, budget, any_of(recovered.values()), any_of(base.values()), details, *quoted)


def any_of(ways: Iterable[Array]) -> Array:
    """Return for each probe whether it leaked in any of the ways."""
    return np.asarray(np.max(list(ways), axis=0), dtype=np.float64)


def averages(
    recovered: Array, base: Array, mask: Any = np.True_, average: Callable[[Array], Any] = np.mean
) -> dict[str, float | None]:
    """Return the averages over the probes that a mask selects, None if it selects none, as `details` name them."""
    sides = {"recovered": recovered, "base": base}
    return {side: float(average(values[mask])) if mask.any() else None for side, values in sides.items()}


def render(
    target: Target, prompt: str, *, system: str = "", shots: Sequence[tuple[str, str]] = (), beginning: str = ""
) -> str:
    """Return the text that the base continues: in its chat template or prompt format, or as plain lines.

    `shots` are questions and answers that come before, `beginning` is that of the answer. A template without a system
    role gets the system prompt in front of the first question.
    """
    tokenizer = target.base.tokenizer
    if not has_template(tokenizer, target.chat_template) and format_of(tokenizer, target.chat_template) is None:
        lines = [system, *(f"{question}\n{answer}" for question, answer in shots), prompt]
        return "\n\n".join(line for line in lines if line) + (f"\n{beginning}" if beginning else "")
    turns = [
        {"role": role, "content": text}
        for question, answer in shots
        for role, text in (("user", question), ("assistant", answer))
    ] + [{"role": "user", "content": prompt}]

    if system:
        turns = [{"role": "system", "content": system}, *turns]
    text = ask(turns, tokenizer, target.chat_template)
    return text + (f" {beginning}" if beginning and format_of(tokenizer, target.chat_template) else beginning)


def other_pairs(target: Target) -> list[tuple[str, str]]:
    """Return questions and right answers that name no leak word: of the neighbours, and the package's own."""
    leak_words = [word for row in target.probes for word in row["leak"]]
    pairs = question_answer_pairs([*target.neighbours, *anchors(target.forget, target.probes)])
    return [pair for pair in pairs if not leaked(" ".join(pair), leak_words)]


def beginning_of(row: Row) -> str:
    """Return the row's completion up to its first leak word, or nothing where it has none."""
    text = str(row.get("completion") or "")
    found = places(text, row["leak"])
    return text[: found[0][0]] if found else ""


def _greedy(target: Target, texts: Sequence[str | None]) -> list[str]:
    """Return the greedy answers to rendered prompts, "" where there is none."""
    responses = iter(
        answers(
            target.base, [text for text in texts if text is not None], max_new_tokens=target.max_new_tokens,
            chat_template=target.chat_template, rendered=True,
        )
    )  # fmt: skip
    return ["" if text is None else next(responses) for text in texts]


def _leaking(probes: Sequence[Row], responses: Sequence[str]) -> Array:
    return np.array([float(bool(leaked(text, row["leak"]))) for row, text in zip(probes, responses, strict=True)])
