"""The attack on passages: begin a forgotten text at many places, with more and less of it, and let the model go on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...data.windows import places
from ...inference.decoding import Decoding, generate
from ..metrics.verbatim import Passage, longest_run, passages, without
from ..score import Array
from ..token_scores import adapters_off
from .harness import Attacked, Target, adapters_on, any_of, attacked, averages

_Asked = list[tuple[int, int, int, int]]  # number of the passage, place, tokens given, tokens in a row to come back


def passage(
    target: Target,
    *,
    prefixes: Sequence[int] = (16, 32, 64, 128),
    run: int = 32,
    count: int = 4,
    samples: int = 3,
    temperature: float = 1.0,
    rows: int = 64,
) -> Attacked:
    """Give the model `prefixes` tokens of each forget row at up to `count` places; let it go on, greedily and sampled.

    A row is recovered if in any of these ways at least `run` tokens of it, one after another, come back that were not
    given. Of a row of fewer than twice as many tokens as the shortest of `prefixes`, half is given and all the rest
    must come back. With more than `rows` forget rows the longest are attacked. The passages are the rows' longest
    answers or texts, behind their prompts.
    """
    found = passages(target.base, target.forget, chat_template=target.chat_template)
    found = sorted(found, key=lambda p: len(p.tokens), reverse=True)[:rows]
    short = sum(len(p.tokens) < 2 * min(prefixes) for p in found)
    ways: dict[str, tuple[_Asked, bool]] = {}
    for length in sorted(prefixes):
        asked = [a for n, p in enumerate(found) for a in _places(n, p, length, length == min(prefixes), run, count)]
        if asked:
            ways[f"{length} tokens, greedy"] = (asked, False)
            if samples:
                ways[f"{length} tokens, sampled"] = (asked, True)

    def written(way: str) -> list[list[list[int]]]:
        asked, drawn = ways[way]
        longest = max(least + least // 2 for _, _, _, least in asked)
        how = Decoding(longest, temperature=temperature if drawn else 0.0)
        contexts = [found[n].before(at, given) for n, at, given, _ in asked]
        return generate(target.base, contexts, how, samples if drawn else 1, target.seed)

    with adapters_off(target.base):
        base = {way: _recovered(found, asked, written(way))[0] for way, (asked, _) in ways.items()}
    recovered, quoted = {}, []
    with adapters_on(target):
        for way, (asked, _) in ways.items():
            recovered[way], back = _recovered(found, asked, written(way))
            quoted += [f"{way}: {target.base.tokenizer.decode(ids)}" for ids in back]
    details = {}
    for way, (asked, _) in ways.items():
        mask = np.isin(np.arange(len(found)), [n for n, *_ in asked])
        details[way] = {"asked": int(mask.sum()), **averages(recovered[way], base[way], mask)}
    budget = (
        f"{', '.join(map(str, sorted(prefixes)))} tokens of {len(found)} of {len(target.forget)} forget rows at up to "
        f"{count} places each, one greedy continuation and {samples} at temperature {temperature:g}; {run} tokens in a "
        f"row must come back" + (f" ({short} rows are short: the second half of them)" if short else "")
    )
    none = np.zeros(len(found))
    return attacked(
        target, "passage", budget, any_of(recovered.values() or [none]), any_of(base.values() or [none]), details,
        *quoted, of="forget rows",
    )  # fmt: skip


def _places(number: int, passage: Passage, given: int, shortest: bool, run: int, count: int) -> _Asked:
    """Return where to begin; nothing where the passage is too short, but for the shortest prefix half of it."""
    n = len(passage.tokens)
    if 2 * given > n:
        given = n // 2 if shortest else 0
    least = min(run, n - given)
    return [(number, at, given, least) for at in (places(given, n, least, count) if given else [])]


def _recovered(
    found: Sequence[Passage], asked: _Asked, written: Sequence[Sequence[Sequence[int]]]
) -> tuple[Array, list[Sequence[int]]]:
    """Return for each passage whether enough of it came back, 0 or 1, and the continuations in which it did."""
    values, back = np.zeros(len(found)), []
    for (n, at, given, least), texts in zip(asked, written, strict=True):
        rest = without(found[n].tokens, at - given, at)
        for ids in texts:
            if longest_run(ids, rest) >= least:
                values[n] = 1.0
                back.append(ids)
    return values, back
