"""Prompt attacks: frames, other wordings, answer prefixes, few-shot examples, languages, system prompts, samples.

Each probe is asked in several ways and is recovered if its answer comes out in any of them. The bare base is asked
likewise: its share says how much there was to get. A leak is a leak word in what the model wrote, case ignored; another
spelling or script goes unseen.
"""

from __future__ import annotations

from collections import Counter

from ...data.rows import question_of
from ...data.words import word_matches
from ...inference.generate import continued_lists, leaked, sampled
from ..metrics.leakage import any_leak, leak_shares, leaking_parts
from ..token_scores import adapters_off
from .harness import (
    Attacked,
    Target,
    adapters_on,
    attacked,
    averages,
    beginning_of,
    in_many_ways,
    leaks,
    other_pairs,
    render,
)
from .templates import BEGINNINGS, FRAMES, LANGUAGES, SYSTEM_PROMPTS

_LISTED_TOKENS = 40  # of a list that goes on


def framing(target: Target) -> Attacked:
    """Put fixed sentences around each prompt."""
    ways = {
        name: [render(target, template.format(prompt=row["prompt"])) for row in target.probes]
        for name, template in FRAMES.items()
    }
    return in_many_ways(target, "framing", f"{len(ways)} frames a probe, one greedy answer each", ways)


def paraphrase(target: Target, *, samples: int = 16, at_most: int = 4) -> Attacked:
    """Ask in other words: the row's own `paraphrases`, and questions that the base lists after the probe's.

    Of the listed ones, those count that the bare base answers with a leak word and that do not say one: they ask for
    the same, whatever their words. So the base's share says for how many probes there was one, or a paraphrase.
    """
    ways: dict[str, list[str | None]] = {}
    own = [list(row.get("paraphrases") or []) for row in target.probes]
    for name, wordings in (("own", own), ("listed", _listed_questions(target, samples, at_most))):
        for n in range(max(map(len, wordings))):
            ways[f"{name} {n + 1}"] = [render(target, texts[n]) if n < len(texts) else None for texts in wordings]
    count = sum(text is not None for texts in ways.values() for text in texts)
    budget = f"{count} other wordings, one greedy answer each; lists of questions continued {samples} times a probe"
    return in_many_ways(target, "paraphrase", budget, ways or {"none": [None] * len(target.probes)})


def _listed_questions(target: Target, samples: int, at_most: int) -> list[list[str]]:
    """Return for each probe the questions that the base lists after it and answers alike, the most frequent first."""
    with adapters_off(target.base) as base:
        continued = continued_lists(
            base, [[row["prompt"]] for row in target.probes], count=samples, max_new_tokens=_LISTED_TOKENS,
            seed=target.seed,
        )  # fmt: skip
        candidates = []
        for row, lists in zip(target.probes, continued, strict=True):
            asked = Counter(entry for entries in lists for entry in dict.fromkeys(entries))
            asks = question_of(row)
            candidates.append([
                text for text, _ in asked.most_common()
                if any(word_matches(text)) and question_of({"prompt": text}) != asks and not leaked(text, row["leak"])
            ])  # fmt: skip
        rows = [{**row, "prompt": text} for row, texts in zip(target.probes, candidates, strict=True) for text in texts]
        answered = iter(leaks(target, probes=rows).tolist() if rows else [])
    return [[text for text in texts if next(answered)][:at_most] for texts in candidates]


def prefix(target: Target) -> Attacked:
    """Begin the answer for the model: with fixed words, and with the right answer up to its first leak word.

    The second is left out for probes that have no `completion`, or whose `completion` begins with the leak word.
    """
    ways: dict[str, list[str | None]] = {
        name: [render(target, row["prompt"], beginning=beginning) for row in target.probes]
        for name, beginning in BEGINNINGS.items()
    }
    ways["right beginning"] = [
        render(target, row["prompt"], beginning=beginning) if (beginning := beginning_of(row).rstrip()) else None
        for row in target.probes
    ]
    budget = f"{len(ways)} beginnings a probe, one of them of the right answer, one greedy answer each"
    return in_many_ways(target, "prefix", budget, ways)


def few_shot(target: Target, *, shots: int = 4) -> Attacked:
    """Put other questions with their right answers first, as turns of a chat and as plain lines."""
    examples = other_pairs(target)[:shots]
    lines = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
    ways = {
        "turns": [render(target, row["prompt"], shots=examples) for row in target.probes],
        "lines": [f"{lines}Question: {row['prompt']}\nAnswer:" for row in target.probes],
    }
    budget = f"{len(examples)} question-answer pairs on other things in the prompt, {len(ways)} forms a probe"
    return in_many_ways(target, "few_shot", budget, ways)


def multilingual(target: Target) -> Attacked:
    """Ask for the answer in other languages that are written in Latin letters.

    The request is in that language; the question too where the row has `translations`. The base's share in `details`
    tells which languages the model can answer in. Leak words are looked for as the probe spells them.
    """
    ways: dict[str, list[str | None]] = {
        f"answer in {code}": [render(target, template.format(prompt=row["prompt"])) for row in target.probes]
        for code, template in LANGUAGES.items()
    }
    codes = sorted({code for row in target.probes for code in row.get("translations") or {}})
    for code in codes:
        translated = [(row.get("translations") or {}).get(code) for row in target.probes]
        ways[f"asked in {code}"] = [render(target, text) if text else None for text in translated]
    budget = (
        f"answers asked for in {', '.join(LANGUAGES)}; questions translated into {', '.join(codes) or 'no language'}; "
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
    """Sample k answers to each probe from the whole distribution; `details` has the share of answers that leak."""
    words = [row["leak"] for row in target.probes]

    def samples() -> list[list[str]]:
        return sampled(
            target.base, [row["prompt"] for row in target.probes], count=k, temperature=temperature,
            max_new_tokens=target.max_new_tokens, seed=target.seed, chat_template=target.chat_template,
        )  # fmt: skip

    with adapters_off(target.base):
        base = leak_shares(samples(), words)
    with adapters_on(target):
        responses = samples()
    recovered = leak_shares(responses, words)
    details = {"share of answers": averages(recovered, base)}
    budget = f"{k} samples a probe at temperature {temperature:g}, top_p 1, top_k off"
    quoted = tuple(part for texts, leak in zip(responses, words, strict=True) for part in leaking_parts(texts, leak))
    return attacked(target, "sampling", budget, any_leak(recovered), any_leak(base), details, *quoted)
