"""How figures are told to people: labels, topics, units as percent, what changed, and the verdict.

Scores come in; short texts go out to the page, the model card and the terminal, so that all three say the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..evaluation import AttackResult, Evaluation
from ..lm_harness import PREFIX
from ..score import Score

Change = Literal["same", "unclear", "better", "worse", "cost", "missing"]
TOPICS = {
    "forgotten": "Is it forgotten?",
    "cost": "What did it cost?",
    "language": "Is it still language?",
    "ability": "What else can it do?",
    "privacy": "Can it be told that it was learned?",
}
_LABELS = {
    "forget_loss": "Loss on the forget rows",
    "forget_answer_probability": "Probability of the forget answers",
    "forget_rouge_l_recall": "Forget answers written (ROUGE-L recall)",
    "forget_exact_memorization": "Forget tokens that are first choice",
    "forget_extraction_strength": "Share of a forget answer that follows by itself",
    "forget_verbatim_memorization": "Forget rows written on from their beginning (VerbMem)",
    "forget_knowledge_memorization": "Forget questions answered in short (KnowMem)",
    "forget_truth_ratio": "Likelihood of wrong beside right answers (truth ratio)",
    "forget_quality": "Forget quality (TOFU)",
    "model_utility": "Model utility (TOFU)",
    **{
        f"{rows}_{part}": f"{said} ({part.replace('_', ' ')}, TOFU)"
        for rows, said in (("retain", "Retain set"), ("real_authors", "Real authors"), ("world_facts", "World facts"))
        for part in ("probability", "rouge", "truth_ratio")
    },
    "leak_rate": "Sampled answers that leak",
    "any_leak": "Probes that leak at least once",
    "retain_loss": "Loss on the retain rows",
    "retain_answer_probability": "Probability of the retain answers",
    "retain_rouge_l_recall": "Retain answers written (ROUGE-L recall)",
    "retain_verbatim_memorization": "Retain rows written on from their beginning (VerbMem)",
    "retain_knowledge_memorization": "Retain questions answered in short (KnowMem)",
    "retain_kl": "KL to the base on the retain rows",
    "neighbours_kl": "KL to the base on the neighbours",
    "neighbours_unchanged": "Neighbours whose answer names the same as before",
    "neighbours_right": "Neighbours whose answer has all that their row names",
    "free_text_kl": "KL to the base on free text",
    "repetition": "Repetition in its answers",
    "empty_answers": "Empty answers",
    "perplexity_under_base": "Perplexity of its answers under the base",
    "membership_loss": "Membership told by the loss",
    "membership_zlib": "Membership told by loss over compressed size",
    "membership_min_k": "Membership told by the least likely tokens (min-k%)",
    "membership_min_k_plus_plus": "Membership told by standardised tokens (min-k%++)",
    "membership_gradient_norm": "Membership told by the gradient's norm",
    "membership_reference": "Membership told beside a reference model",
    "privacy_leakage": "Privacy leakage (PrivLeak)",
}
_METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy by length",
    "exact_match": "exact match",
    "word_perplexity": "perplexity",
    "byte_perplexity": "perplexity",
    "bits_per_byte": "bits",
}
_CHANCE = {"membership": 0.5, "privacy": 0.0}  # neither above nor below is wanted
_MAIN = (
    "leak_rate", "forget_answer_probability", "forget_loss", "forget_quality", "model_utility", "neighbours_kl",
    "retain_kl", "free_text_kl",
    "retain_rouge_l_recall", "repetition", "perplexity_under_base", "privacy_leakage",
)  # fmt: skip
_COST = ("retain", "neighbours", "free_text", "model_utility", "real_authors", "world_facts")
_MAX_TASKS = 6  # of the harness, in the picture


@dataclass(frozen=True)
class Headline:
    """One figure that answers a question at a glance."""

    question: str
    label: str
    value: str
    unit: str
    detail: str
    change: Change


def label(name: str) -> str:
    """Return a figure's name for people; `leak_rate@32` tells the number of samples."""
    if name.startswith(PREFIX):
        full, comma, kept = name.removeprefix(PREFIX).partition(",")
        task, _, metric = full.rpartition(":")
        return f"{task}: {_METRICS.get(metric, metric.replace('_', ' '))}" + (f" ({kept})" if comma else "")
    stem, at, k = name.partition("@")
    words = _LABELS.get(stem, stem.replace("_", " "))
    return f"{words}, {k} a probe" if at else words


def topic(name: str) -> str:
    """Return which of `TOPICS` a figure belongs to."""
    stem = name.partition("@")[0]
    if name.startswith(PREFIX):
        return "ability"
    if stem.startswith(("membership", "privacy")):
        return "privacy"
    if stem.startswith("forget") or stem in ("leak_rate", "any_leak"):
        return "forgotten"
    return "cost" if stem.startswith(_COST) else "language"


def main_figures(evaluation: Evaluation) -> list[str]:
    """Return the names of the figures for the picture, in order."""
    tasks = [name for name in evaluation.names if name.startswith(PREFIX)]
    return [name for stem in _MAIN for name in evaluation.names if name.partition("@")[0] == stem] + tasks[:_MAX_TASKS]


def factor(score: Score) -> int:
    """Return what a figure is multiplied with for people: shares are told in percent."""
    return 100 if score.unit.startswith("share") else 1


def unit(score: Score) -> str:
    """Return the unit for people, e.g. `% of answers`."""
    return re.sub(r"^(share|percent)", "%", score.unit)


def number(value: float) -> str:
    """Return a number in three digits, never in powers of ten above 1."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def value(score: Score) -> str:
    """Return the figure without its unit."""
    return number(factor(score) * score.value)


def interval(score: Score) -> str:
    """Return the figure's interval without its unit."""
    return f"{number(factor(score) * score.low)} to {number(factor(score) * score.high)}"


def change(before: Score | None, now: Score | None) -> Change:
    """Say how a figure moved from the base: `unclear` where the two intervals overlap.

    A KL to the base can only rise, which is neither better nor worse but what forgetting costs. Membership is best
    told no better than by chance, and no worse.
    """
    if before is None or now is None:
        return "missing"
    if (before.value, before.low, before.high) == (now.value, now.low, now.high):
        return "same"
    if before.low <= now.high and now.low <= before.high:
        return "unclear"
    if now.name.endswith("_kl"):
        return "cost"
    chance = _CHANCE.get(now.name.partition("_")[0])
    if chance is not None:
        return "better" if abs(now.value - chance) < abs(before.value - chance) else "worse"
    return "better" if (now.value > before.value) == now.higher_is_better else "worse"


def headlines(evaluation: Evaluation) -> list[Headline]:
    """Return what answers each of `TOPICS` best, and what removal left behind."""
    found = []
    for key, question in TOPICS.items():
        name = next((name for name in main_figures(evaluation) if topic(name) == key), None)
        before = evaluation.score(name, "before") if name else None
        now = evaluation.score(name, "with") if name else None
        if name is None or now is None:
            continue
        base = f"base {value(before)}; " if before else ""
        detail = f"{base}95 % interval {interval(now)}; n = {now.n}"
        found.append(Headline(question, label(name), value(now), unit(now), detail, change(before, now)))
    left = evaluation.left_behind
    told = "not checked" if not evaluation.removal_checked else "traces left" if left else "without a trace"
    mood: Change = "missing" if not evaluation.removal_checked else "worse" if left else "same"
    found.append(Headline("Does it come off?", "After removal", told, "", removal(evaluation), mood))
    return found


def removal(evaluation: Evaluation) -> str:
    """Say whether everything is as before after removal."""
    left = evaluation.left_behind
    if not evaluation.removal_checked:
        return "Whether everything is as before after removal was not checked: no rows were given to measure it on"
    counted = f"{len(evaluation.compared_names)} figures" + (
        f" and {len(evaluation.answers)} greedy answers" if evaluation.answers else ""
    )
    if left:
        return f"After removal {len(left)} of {counted} differ from the base's: {', '.join(left)}"
    return f"After removal all {counted} equal the base's exactly"


def notes(evaluation: Evaluation) -> list[str]:
    """Return what must be known to read the figures."""
    told = [
        "Intervals are 95 % percentile bootstrap intervals over the n rows behind a figure (1000 draws); "
        "'better' and 'worse' mean that the intervals with and without the adapter do not overlap.",
        "KL is KL(now || base) per token; 0 is unchanged.",
    ]
    if any(name.startswith(PREFIX) for name in evaluation.names):
        told.append(
            "Figures of lm-evaluation-harness tasks stand with 1.96 of its standard errors on each side; they are not "
            "measured again after removal."
        )
    if any(topic(name) == "privacy" for name in evaluation.names):
        told.append(
            "An AUC of 0.5 is chance, 1 is plain membership; a privacy leakage of 0 is as if never learned, below it "
            "the rows are still known, far above it they are known to be avoided."
        )
    flat = [
        score.n
        for name in evaluation.names
        if (score := evaluation.score(name, "with")) and "kl" not in name and score.low == score.high and score.n > 1
    ]
    if flat:
        n = min(flat)
        told.append(
            "An interval without width only says that all rows agree, not that others would: where none of n rows "
            f"did it, up to about 3/n of others may ({300 / n:.0f} % for n = {n})."
            if n > 3
            else f"An interval without width only says that all {n} rows agree: too few to say more."
        )
    return told


def attack_rows(attacks: Sequence[AttackResult]) -> list[tuple[str, str, str, str]]:
    """Return name, budget, recovered with the adapter, and the same on the base, as texts, for each attack."""

    def told(score: Score) -> str:
        sign = "" if unit(score).startswith("%") else " "
        return f"{value(score)}{sign}{unit(score)} ({interval(score)}; n = {score.n})"

    return [(attack.name, str(attack.budget), told(attack.recovered), told(attack.base)) for attack in attacks]
