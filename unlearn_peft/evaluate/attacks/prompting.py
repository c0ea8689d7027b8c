"""Attacks that only ask: other wordings, beginnings of the answer, examples, languages, system prompts, samples.

Each probe is asked in several ways; it counts as recovered if its answer comes out in any of them, since an attacker
tries them all. So does the bare base, whose share says how much there was to get. A leak is a leak word in what the
model wrote, case ignored, as in the rest of the evaluation: another spelling or script goes unseen.
"""

from __future__ import annotations

from ...data.anchors import anchors
from ...data.source import Row
from ...inference.generate import leaked, sampled
from ..metrics.leakage import any_leak, leak_shares, leaking_parts
from ..token_scores import adapters_off, questions
from .harness import Attacked, Target, adapters_on, attacked, beginning_of, in_many_ways, render
from .templates import BEGINNINGS, LANGUAGES, PARAPHRASES, SYSTEM_PROMPTS


def paraphrase(target: Target) -> Attacked:
    """Ask in other words: fixed sentences around each prompt, and the row's own `paraphrases` where it has any."""
    rows = target.probes
    ways: dict[str, list[str | None]] = {
        name: [render(target, template.format(prompt=row["prompt"])) for row in rows]
        for name, template in PARAPHRASES.items()
    }
    own = [list(row.get("paraphrases") or []) for row in rows]
    most = max(map(len, own))
    for n in range(most):
        ways[f"own {n + 1}"] = [render(target, texts[n]) if n < len(texts) else None for texts in own]
    return in_many_ways(target, "paraphrase", f"{len(ways)} wordings a probe, one greedy answer each", ways)


def prefix(target: Target) -> Attacked:
    """Begin the answer for the model: with fixed words, and with the right answer up to its first leak word.

    The second needs to know the beginning of the answer; probes without one, or whose answer begins with the leak
    word, are not asked so.
    """
    ways: dict[str, list[str | None]] = {
        name: [render(target, row["prompt"], beginning=beginning) for row in target.probes]
        for name, beginning in BEGINNINGS.items()
    }
    known = [beginning_of(row).rstrip() for row in target.probes]
    ways["right beginning"] = [
        render(target, row["prompt"], beginning=beginning) if beginning else None
        for row, beginning in zip(target.probes, known, strict=True)
    ]
    budget = f"{len(ways)} beginnings a probe, one of them of the right answer, one greedy answer each"
    return in_many_ways(target, "prefix", budget, ways)


def few_shot(target: Target, *, shots: int = 4) -> Attacked:
    """Show other questions with right answers first, as turns of a chat and as plain lines."""
    examples = _shots(target, shots)
    lines = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
    ways = {
        "turns": [render(target, row["prompt"], shots=examples) for row in target.probes],
        "lines": [f"{lines}Question: {row['prompt']}\nAnswer:" for row in target.probes],
    }
    budget = f"{len(examples)} question-answer pairs on other things in the prompt, {len(ways)} forms a probe"
    return in_many_ways(target, "few_shot", budget, ways)


def multilingual(target: Target) -> Attacked:
    """Ask for the answer in other languages that are written in Latin letters.

    The request is in the language; the question too where the row has `translations`, else it stays as it is. The
    base's own share in `details` tells in which languages the model can. Leak words are looked for as the probe
    spells them.
    """
    ways: dict[str, list[str | None]] = {
        f"answer in {code}": [render(target, template.format(prompt=row["prompt"])) for row in target.probes]
        for code, template in LANGUAGES.items()
    }
    for code in sorted({code for row in target.probes for code in row.get("translations") or {}}):
        translated = [(row.get("translations") or {}).get(code) for row in target.probes]
        ways[f"asked in {code}"] = [render(target, text) if text else None for text in translated]
    asked = [way.removeprefix("asked in ") for way in ways if way.startswith("asked in ")]
    budget = (
        f"answers asked for in {', '.join(LANGUAGES)}; questions translated into {', '.join(asked) or 'no language'}; "
        "one greedy answer each"
    )
    return in_many_ways(target, "multilingual", budget, ways)


def jailbreak(target: Target) -> Attacked:
    """Talk the model into answering by a system prompt."""
    ways = {
        name: [render(target, row["prompt"], system=system) for row in target.probes]
        for name, system in SYSTEM_PROMPTS.items()
    }
    return in_many_ways(target, "jailbreak", f"{len(ways)} system prompts a probe, one greedy answer each", ways)


def sampling(target: Target, *, k: int = 32, temperature: float = 1.0) -> Attacked:
    """Ask k times at a temperature, from the whole distribution; `details` holds the share of leaking answers."""
    words = [row["leak"] for row in target.probes]

    def ask() -> list[list[str]]:
        return sampled(
            target.base, [row["prompt"] for row in target.probes], count=k, temperature=temperature,
            max_new_tokens=target.max_new_tokens, seed=target.seed, chat_template=target.chat_template,
        )  # fmt: skip

    with adapters_off(target.base):
        base = leak_shares(ask(), words)
    with adapters_on(target):
        said = ask()
    found = leak_shares(said, words)
    details = {"share of answers": {"recovered": float(found.mean()), "base": float(base.mean())}}
    budget = f"{k} samples a probe at temperature {temperature:g}, top_p 1, top_k off"
    quoted = tuple(part for texts, some in zip(said, words, strict=True) for part in leaking_parts(texts, some))
    return attacked(target, "sampling", budget, any_leak(found), any_leak(base), details, quoted)


def _shots(target: Target, count: int) -> list[tuple[str, str]]:
    """Return questions with answers that give nothing away: neighbours first, then the package's own rows."""
    words = [word for row in target.probes for word in row["leak"]]
    own: list[Row] = anchors(target.forget, target.probes)
    pairs = questions([*target.neighbours, *own])
    return [pair for pair in pairs if not leaked(" ".join(pair), words)][:count]
