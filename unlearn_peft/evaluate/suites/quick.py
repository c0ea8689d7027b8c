"""The quick suite: one state of a live base, measured. Run it before, with and after an adapter and compare.

A base with whatever is attached and sets of rows come in; a list of `Score` goes out, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...data.source import Row
from ...errors import DataError, did_you_mean
from ...inference.generate import answers
from ...models.base import Base
from ..metrics.consistency import contains_gold, same_entities
from ..metrics.fluency import losses_under_base, perplexity, repetition
from ..metrics.leakage import any_leak, leak_shares
from ..metrics.memorization import answer_probability, exact_memorization, extraction_strength, rouge_l
from ..responses import Responses, collect_responses, neighbour_responses
from ..score import Score, extra, per_token, score, sums
from ..token_scores import BaseReference, adapters_off, keep_reference, kl_to_reference, questions, row_tokens

SETS = ("forget", "retain", "probes", "neighbours", "free_text", "holdout", "real_authors", "world_facts")
_HELD = ("retain", "neighbours", "free_text")  # where the model should be as the base is


def take_reference(
    base: Base, rows: Mapping[str, Sequence[Row]], *, chat_template: bool = True, batch_size: int = 8
) -> dict[str, BaseReference]:
    """Return what `measure` compares with: the bare base's predictions on what should not change.

    Taken once before the adapter comes, it also tells whether the model is the same after it has gone.
    """
    _check(rows)
    how: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    kept = {name: keep_reference(base, rows[name], what=name, **how) for name in _HELD if rows.get(name)}
    if "neighbours" in kept:
        with adapters_off(base):
            kept["neighbours"] = replace(kept["neighbours"], texts=neighbour_responses(base, rows["neighbours"], **how))
    return kept


def measure(
    base: Base,
    rows: Mapping[str, list[Row]],
    reference: Mapping[str, BaseReference] | None = None,
    *,
    k: int = 32,
    said: Responses | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 8,
) -> list[Score]:
    """Measure a base in the state that it is in.

    Forget loss leaves out end-of-turn markers, as training does; retain loss counts them, as training does.
    Repetition and perplexity are of the greedy answers to the forget questions and the probes.

    Args:
        base: with adapters, or without.
        rows: checked rows by set: `forget`, `retain`, `probes`, `neighbours`, `free_text`; a set that is missing or
            empty is left out, and so are its figures. (The others are for other suites.)
        reference: from `take_reference`; without it, made now with all adapters off.
        k: answers sampled for each probe.
        said: by `said.ask` in this state with the same settings, where the caller has it; asked now if not given.
        max_new_tokens: length of greedy and sampled answers.
        seed: of sampling and bootstrap.
        chat_template: see `data.tokenize`.
        batch_size: rows at a time.

    Raises:
        DataError: if a set is unknown, or the reference was made of other rows.
        UnlearnError: if the extra `eval` is not installed.
    """
    _check(rows)
    extra("rouge_score.rouge_scorer")  # missing, it is to be told now and not after minutes
    how: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    kept = take_reference(base, rows, **how) if reference is None else reference
    said = collect_responses(base, rows, k=k, max_new_tokens=max_new_tokens, seed=seed, **how) if said is None else said
    scores: list[Score] = []
    asked: list[str] = []  # what the greedy answers answer
    written: list[str] = []

    def add(name: str, unit: str, better: bool, values: Any, statistic: Any = None) -> None:
        scores.append(score(name, unit, better, values, statistic=statistic, seed=seed))

    for name in ("forget", "retain"):
        if not rows.get(name):
            continue
        forget = name == "forget"
        tokens = row_tokens(base, rows[name], what=name, **how)
        losses = [-(row.answer(row.log_p) if forget else row.log_p) for row in tokens]
        add(f"{name}_loss", "nats/token", forget, sums(losses), per_token)
        add(f"{name}_answer_probability", "share", not forget, answer_probability(tokens))
        pairs = questions(rows[name])
        if pairs:
            texts = answers(base, [prompt for prompt, _ in pairs], max_new_tokens=max_new_tokens, **how)
            add(f"{name}_rouge_l_recall", "share", not forget, rouge_l([answer for _, answer in pairs], texts))
            if forget:
                asked, written = [prompt for prompt, _ in pairs], texts
        if forget:
            add("forget_exact_memorization", "share", False, exact_memorization(tokens))
            add("forget_extraction_strength", "share", False, extraction_strength(tokens))
    if probes := rows.get("probes"):
        shares = leak_shares(said.samples, [row["leak"] for row in probes])
        add(f"leak_rate@{k}", "share of answers", False, shares)
        add(f"any_leak@{k}", "share of probes", False, any_leak(shares))
        asked, written = asked + [row["prompt"] for row in probes], written + said.probes
    for name in _HELD:
        if rows.get(name):
            if name not in kept:
                raise DataError(f"the reference holds nothing of the {name} set: make it of the same rows")
            values = kl_to_reference(base, rows[name], kept[name], what=name, **how)
            add(f"{name}_kl", "nats/token", False, sums(values), per_token)
            if before := kept[name].texts:
                pairs = questions(rows[name])
                prompts, wanted = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
                add(f"{name}_unchanged", "share of answers", True, same_entities(prompts, before, said.neighbours))
                if len(known := contains_gold(prompts, wanted, said.neighbours)):
                    add(f"{name}_right", "share of answers", True, known)
    if written:
        add("repetition", "share", False, [repetition(text) for text in written])
        add("empty_answers", "share", False, [float(not text) for text in written])
        if any(written):
            add(
                "perplexity_under_base",
                "perplexity",
                False,
                sums(losses_under_base(base, asked, written, **how)),
                perplexity,
            )
    return scores


def _check(rows: Mapping[str, Any]) -> None:
    unknown = [name for name in rows if name not in SETS]
    if unknown:
        told = ", ".join(f"'{name}'{did_you_mean(name, SETS)}" for name in unknown)
        raise DataError(f"unknown sets of rows: {told}; known: {', '.join(SETS)}")
