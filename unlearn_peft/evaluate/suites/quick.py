"""The quick suite: a base in the state that it is in and sets of rows -> a list of `Score`, in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...data.refusals import REFUSALS
from ...data.rows import question_answer_pairs
from ...data.source import Row
from ...errors import DataError, did_you_mean
from ...inference.contrast import fact_spans
from ...inference.generate import answers
from ...models.base import Base
from ..metrics.answer_kinds import KINDS, abstains, kinds_of_answers
from ..metrics.consistency import facts_in, says_all
from ..metrics.fluency import losses_under_base, perplexity, repetition
from ..metrics.leakage import any_leak
from ..metrics.memorization import answer_probability, exact_memorization, extraction_strength, rouge_l
from ..metrics.verbatim import verbatim
from ..responses import Responses, collect_responses, neighbour_responses
from ..score import Score, extra, per_token, score, sums
from ..token_scores import BaseReference, adapters_off, keep_reference, kl_to_reference, row_tokens

SETS = ("forget", "retain", "probes", "neighbours", "free_text", "holdout", "real_authors", "world_facts", "rwku")
_UNCHANGED = ("retain", "neighbours", "free_text")  # where the model should be as the base is


def take_reference(
    base: Base, rows: Mapping[str, Sequence[Row]], *, chat_template: bool = True, batch_size: int = 8
) -> dict[str, BaseReference]:
    """Return what `measure` compares with: the bare base's predictions on what should not change.

    Taken once before the adapter is attached, it also shows whether the model is the same after removal.
    """
    _check(rows)
    options: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    reference = {name: keep_reference(base, rows[name], what=name, **options) for name in _UNCHANGED if rows.get(name)}
    if near := reference.get("neighbours"):
        pairs = question_answer_pairs(rows["neighbours"])
        with adapters_off(base):
            own = neighbour_responses(base, rows["neighbours"], chat_template=chat_template)
            spans = fact_spans(base, pairs, chat_template=chat_template)
        said = [facts_in(question, text) for (question, _), text in zip(pairs, own, strict=True)]
        gold = [facts_in(*pair, of_pair) for pair, of_pair in zip(pairs, spans, strict=True)]
        reference["neighbours"] = replace(near, said=said, gold=gold)
    return reference


def measure(
    base: Base,
    rows: Mapping[str, list[Row]],
    reference: Mapping[str, BaseReference] | None = None,
    *,
    k: int = 32,
    responses: Responses | None = None,
    max_new_tokens: int = 64,
    rouge_tokens: int | None = None,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 8,
    refusals: Sequence[str] = REFUSALS,
) -> list[Score]:
    """Measure a base in the state that it is in.

    Forget loss leaves out end-of-turn markers and retain loss counts them, both as training does. Repetition and
    perplexity are of the greedy answers to the forget questions and the probes.

    `rows` are checked rows by set: `forget`, `retain`, `probes`, `neighbours`, `free_text`; without rows of a set its
    figures are left out. Other suites use the other sets. `reference` is from `take_reference`, `responses` from
    `collect_responses` in this state with the same settings; None: made now. `k` answers are sampled for each probe,
    `max_new_tokens` is the length of greedy and sampled answers, `rouge_tokens` that of the answers to forget and
    retain rows where it is another, `seed` that of sampling and bootstrap, `batch_size` that of rows scored at once,
    `refusals` are the sentences that count as abstaining; for `chat_template` see `data.tokenize`.

    Raises:
        DataError: if a set is unknown, or the reference was made of other rows.
        UnlearnError: if the extra `eval` is not installed.
    """
    _check(rows)
    extra("rouge_score.rouge_scorer")  # refused now and not after minutes
    options: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    if reference is None:
        reference = take_reference(base, rows, **options)
    if responses is None:
        responses = collect_responses(
            base, rows, k=k, max_new_tokens=max_new_tokens, seed=seed, chat_template=chat_template
        )
    scores: list[Score] = []
    prompts: list[str] = []  # of the greedy answers below
    written: list[str] = []

    def add(name: str, unit: str, better: bool, values: Any, statistic: Any = np.mean) -> None:
        scores.append(score(name, unit, better, values, statistic=statistic, seed=seed))

    for name in ("forget", "retain"):
        if not rows.get(name):
            continue
        forget = name == "forget"
        tokens = row_tokens(base, rows[name], what=name, **options)
        losses = [-(row.answer(row.log_p) if forget else row.log_p) for row in tokens]
        add(f"{name}_loss", "nats/token", forget, sums(losses), per_token)
        add(f"{name}_answer_probability", "share", not forget, answer_probability(tokens))
        if pairs := question_answer_pairs(rows[name]):
            questions, gold = map(list, zip(*pairs, strict=True))
            texts = answers(base, questions, max_new_tokens=rouge_tokens or max_new_tokens, chat_template=chat_template)
            add(f"{name}_rouge_l_recall", "share", not forget, rouge_l(gold, texts))
            if forget:
                prompts, written = questions, texts
        if forget:
            add("forget_exact_memorization", "share", False, exact_memorization(tokens))
            add("forget_extraction_strength", "share", False, extraction_strength(tokens))
            if by_heart := verbatim(base, rows[name], chat_template=chat_template):
                add("forget_verbatim_continuation", "share of continuations", False, by_heart.exact)
                add("forget_near_verbatim_continuation", "share of continuations", False, by_heart.near)
                add("forget_longest_verbatim_run", "tokens", False, by_heart.runs, np.max)
    if probes := rows.get("probes"):
        asked, leaks = [row["prompt"] for row in probes], [row["leak"] for row in probes]
        kinds = kinds_of_answers(base, asked, responses.samples, leaks, refusals, **options)
        add(f"leak_rate@{k}", "share of answers", False, kinds["leaks"])
        add(f"any_leak@{k}", "share of probes", False, any_leak(kinds["leaks"]))
        for kind in KINDS[1:]:
            add(f"{kind}@{k}", "share of answers", kind == "abstains", kinds[kind])
        prompts, written = prompts + asked, written + responses.probes
    for name in _UNCHANGED:
        if not rows.get(name):
            continue
        if name not in reference:
            raise DataError(f"the reference holds nothing of the {name} set: make it of the same rows")
        values = kl_to_reference(base, rows[name], reference[name], what=name, **options)
        add(f"{name}_kl", "nats/token", False, sums(values), per_token)
        if said := reference[name].said:
            add(f"{name}_unchanged", "share of answers", True, says_all(said, responses.neighbours))
            add(f"{name}_right", "share of answers", True, says_all(reference[name].gold, responses.neighbours))
            add(f"{name}_abstain", "share of answers", False, abstains(responses.neighbours, refusals))
    if written:
        add("repetition", "share", False, [repetition(text) for text in written])
        add("empty_answers", "share", False, [float(not text) for text in written])
        if any(written):
            losses = losses_under_base(base, prompts, written, **options)
            add("perplexity_under_base", "perplexity", False, sums(losses), perplexity)
    return scores


def _check(rows: Mapping[str, Any]) -> None:
    if unknown := [name for name in rows if name not in SETS]:
        names = ", ".join(f"'{name}'{did_you_mean(name, SETS)}" for name in unknown)
        raise DataError(f"unknown sets of rows: {names}; known: {', '.join(SETS)}")
