"""What is attacked, what an attack found, and what all attacks do: put the adapter on, ask, count leaks, take it off.

A `Target` comes in; `Attacked` goes out to reports. Whatever an attack switches or replaces is put back as found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...adapters.bundle import Bundle
from ...adapters.read import read_bundle
from ...adapters.trust import Trust
from ...data.rows import read_rows
from ...data.source import Row
from ...errors import AdapterError, DataError
from ...inference.attach import attached
from ...inference.bank import Bank
from ...inference.generate import answers, leaked
from ...models.base import Base
from ..metrics.leakage import leaking_parts
from ..score import Array, Score, score
from ..token_scores import adapters_off


@dataclass(frozen=True)
class Target:
    """A base, the adapters that make it forget, and the rows that tell whether it did.

    Attributes:
        base: with nothing attached.
        adapters: adapter directories; several are attached together.
        forget: the forget rows, for relearning.
        probes: rows with `prompt` and `leak` words. Optional in a row: `completion` (a right answer), `paraphrases`
            (a list of other wordings of the prompt), `translations` (the prompt by language code).
        neighbours: question-and-answer rows that are not forgotten, for few-shot prompts; the package's own if none.
        others: directories of other forget adapters for the same base, for `interference`.
        seed: of sampling, of random adapters and of intervals.
        max_new_tokens: length of each answer.
        chat_template: whether the base is asked in its chat template.
        batch_size: prompts at a time.
        trust: whose signatures are taken, see `attach`.

    Raises:
        AdapterError: if there is no adapter, or something is attached already.
        DataError: if rows cannot be used; they are named by number only.
    """

    base: Base
    adapters: tuple[str | Path, ...]
    forget: Sequence[Row] = field(repr=False)
    probes: Sequence[Row] = field(repr=False)
    neighbours: Sequence[Row] = field(default=(), repr=False)
    others: tuple[str | Path, ...] = ()
    seed: int = 0
    max_new_tokens: int = 40
    chat_template: bool = True
    batch_size: int = 8
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
        """The adapters, read and checked once."""
        return [read_bundle(path, trust=self.trust) for path in self.adapters]


@dataclass(frozen=True)
class Attacked:
    """What an attack got out.

    Attributes:
        name: the attack's name in `ATTACKS`.
        budget: what the attacker spent and needed, in words.
        recovered: share of probes whose answer came out with the adapter, n = probes.
        base: the same of the bare base, under the same attack: where it is low, the attack says little.
        details: numbers by the attack's own settings (wording, language, strength, step, layer).
        quoted: what may name the forgotten thing itself: for people to read, not for cards and logs.
    """

    name: str
    budget: str
    recovered: Score
    base: Score
    details: dict[str, Any]
    quoted: tuple[str, ...] = field(default=(), repr=False)


def attacked(
    target: Target,
    name: str,
    budget: str,
    recovered: Any,
    base: Any,
    details: dict[str, Any],
    quoted: tuple[str, ...] = (),
) -> Attacked:
    """Make an `Attacked` from one number between 0 and 1 for each probe, with the adapter and without."""
    of_base = share(target, f"{name}, bare base", base)
    return Attacked(name, budget, share(target, name, recovered), of_base, details, quoted)


def share(target: Target, name: str, values: Any) -> Score:
    """Return the share of probes with its interval."""
    return score(name, "share of probes", False, values, seed=target.seed)


@contextmanager
def adapters_on(target: Target, strength: float = 1.0, bundles: Sequence[Bundle] | None = None) -> Iterator[Base]:
    """Put the target's adapters (or these) on the base inside a `with` block; before and after it is as found."""
    with adapters_off(target.base) as base:
        bank = Bank.of(base)
        for n, bundle in enumerate(target.bundles if bundles is None else bundles):
            bank.attach(bundle, f"attacked {n}", strength)
        yield base


@contextmanager
def replaced_weights(modules: Mapping[str, Any], weights: Mapping[str, Any]) -> Iterator[None]:
    """Give modules other weights inside a `with` block.

    The parameters themselves are never written to, so what is tied stays tied, and the same bits come back. A tied
    head gets a weight of its own meanwhile.
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
    """Return for each probe whether the greedy answer leaks, 0 or 1, in the state that the base is in.

    Args:
        target: whose base is asked.
        texts: rendered prompts, one a probe; None for a probe that is not asked. By default the plain prompts.
        probes: others than the target's.
    """
    rows = target.probes if probes is None else probes
    asked = [render(target, row["prompt"]) for row in rows] if texts is None else texts
    return _leaking(rows, _said(target, asked))


def _said(target: Target, asked: Sequence[str | None]) -> list[str]:
    """Return the greedy answers to rendered prompts, nothing to None."""
    said = iter(
        answers(
            target.base, [text for text in asked if text is not None], max_new_tokens=target.max_new_tokens,
            chat_template=False, batch_size=target.batch_size,
        )
    )  # fmt: skip
    return ["" if text is None else next(said) for text in asked]


def _leaking(probes: Sequence[Row], said: Sequence[str]) -> Array:
    return np.array([float(bool(leaked(text, row["leak"]))) for row, text in zip(probes, said, strict=True)])


def in_many_ways(target: Target, name: str, budget: str, ways: Mapping[str, Sequence[str | None]]) -> Attacked:
    """Ask each probe in several ways, with the adapter and without: an answer that leaks in any of them is recovered.

    Args:
        target: what is attacked.
        name: of the attack.
        budget: in words.
        ways: rendered prompts by the way's name, one a probe, None where a way has nothing to ask.
    """
    if not ways:
        raise DataError(f"the attack {name} has no way to ask: expected at least one")

    with adapters_off(target.base):
        base = {way: leaks(target, texts) for way, texts in ways.items()}
    with adapters_on(target):
        said = {way: _said(target, texts) for way, texts in ways.items()}
    found = {way: _leaking(target.probes, texts) for way, texts in said.items()}
    quoted = tuple(
        f"{way}: {part}"
        for way, texts in said.items()
        for text, row in zip(texts, target.probes, strict=True)
        for part in leaking_parts([text], row["leak"])
    )
    asked = {way: [text is not None for text in texts] for way, texts in ways.items()}
    details = {
        way: {
            "asked": sum(asked[way]),
            "recovered": _mean(found[way], asked[way]),
            "base": _mean(base[way], asked[way]),
        }
        for way in ways
    }
    return attacked(target, name, budget, any_of(found.values()), any_of(base.values()), details, quoted)


def any_of(ways: Any) -> Array:
    """Return for each probe whether it leaked in any of the ways."""
    return np.asarray(np.max(list(ways), axis=0), dtype=np.float64)


def render(
    target: Target, prompt: str, *, system: str = "", shots: Sequence[tuple[str, str]] = (), beginning: str = ""
) -> str:
    """Return the text that the base continues: in its chat template, or as plain lines where it has none.

    A template that knows no system role gets the system prompt in front of the first question.
    """
    tokenizer = target.base.tokenizer
    if not target.chat_template or not getattr(tokenizer, "chat_template", None):
        lines = [system, *(f"{question}\n{answer}" for question, answer in shots), prompt]
        return "\n\n".join(line for line in lines if line) + (f"\n{beginning}" if beginning else "")
    turns = [
        {"role": role, "content": text}
        for question, answer in shots
        for role, text in (("user", question), ("assistant", answer))
    ] + [{"role": "user", "content": prompt}]

    def rendered(messages: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    if not system:
        return rendered(turns) + beginning
    try:
        text = rendered([{"role": "system", "content": system}, *turns])
    except Exception:  # a template refuses a role with whatever error it likes
        text = ""
    if system not in text:
        text = rendered([{"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]])
    return text + beginning


def beginning_of(row: Row) -> str:
    """Return the row's completion up to its first leak word, or nothing where it has none."""
    text = str(row.get("completion") or "")
    places = [at for word in row["leak"] if (at := text.casefold().find(word.casefold())) >= 0]
    return text[: min(places)] if places else ""


def _mean(values: Array, asked: Sequence[bool]) -> float | None:
    return float(values[np.array(asked)].mean()) if any(asked) else None


Attack = Callable[..., Attacked]
