"""Scores -> short texts for people, the same in the page, the model card and the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..evaluation import Evaluation
from ..lm_harness import PREFIX
from ..metrics.answer_kinds import KINDS
from ..score import Score
from ..suites.rwku import KIND, worst_kind

if TYPE_CHECKING:
    from ..attacks.harness import Attacked

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
    "forget_rouge_l_recall": "ROUGE-L recall of the forget answers",
    "forget_exact_memorization": "Exact memorization of the forget answers",
    "forget_extraction_strength": "Extraction strength of the forget answers",
    "forget_verbatim_continuation": "Passages continued word for word, from 10 places",
    "forget_near_verbatim_continuation": "Passages continued nearly word for word, from 10 places",
    "forget_longest_verbatim_run": "Longest run of a passage's tokens in a continuation of 50",
    "forget_verbatim_memorization": "Verbatim memorization of the forget rows (VerbMem)",
    "forget_knowledge_memorization": "Knowledge memorization of the forget rows (KnowMem)",
    "forget_truth_ratio": "Truth ratio of the forget rows",
    "forget_quality": "Forget quality (TOFU)",
    "model_utility": "Model utility (TOFU)",
    **{
        f"{rows}_{part}": f"{words} ({part.replace('_', ' ')}, TOFU)"
        for rows, words in (("retain", "Retain set"), ("real_authors", "Real authors"), ("world_facts", "World facts"))
        for part in ("probability", "rouge", "truth_ratio")
    },
    "leak_rate": "Sampled answers that leak",
    "any_leak": "Probes that leak at least once",
    "abstains": "Sampled answers that abstain",
    "word_salad": "Sampled answers that are word salad",
    "says_else": "Sampled answers that say something else",
    "retain_loss": "Loss on the retain rows",
    "retain_answer_probability": "Probability of the retain answers",
    "retain_rouge_l_recall": "ROUGE-L recall of the retain answers",
    "retain_verbatim_memorization": "Verbatim memorization of the retain rows (VerbMem)",
    "retain_knowledge_memorization": "Knowledge memorization of the retain rows (KnowMem)",
    "retain_kl": "KL to the base on the retain rows",
    "neighbours_kl": "KL to the base on the neighbours",
    "neighbours_unchanged": "Neighbours whose answer says the same as before",
    "neighbours_right": "Neighbours whose answer has all that their row names",
    "neighbours_abstain": "Neighbours whose answer abstains",
    "free_text_kl": "KL to the base on free text",
    **{
        f"rwku_{what}_level_{n}_{part}": f"RWKU, {who}, level {n}: {words}"
        for what, who in (("forget", "the subject"), ("neighbours", "neighbours"))
        for n in (1, 2, 3)
        for part, words in (("right", "still answered"), ("rouge_l_recall", "ROUGE-L recall, all questions"))
    },
    "rwku_leak": "RWKU, the subject: answered by one sample or more",
    "rwku_known_leak": "RWKU, the subject: so answered, of questions that it does not answer of a made-up name, too",
    "rwku_beside_a_neighbour_leak": "RWKU, asked with a neighbour: the subject still answered",
    "rwku_beside_a_neighbour_right": "RWKU, asked with a neighbour: the neighbour answered",
    "repetition": "Repetition in its answers",
    "empty_answers": "Empty answers",
    "perplexity_under_base": "Perplexity of its answers under the base",
    "membership_loss": "Membership inference by the loss",
    "membership_zlib": "Membership inference by the loss over the compressed size (zlib)",
    "membership_min_k": "Membership inference by the least likely tokens (min-k%)",
    "membership_min_k_plus_plus": "Membership inference by standardised tokens (min-k%++)",
    "membership_gradient_norm": "Membership inference by the gradient norm",
    "membership_reference": "Membership inference by a reference model",
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
_CHANCE = {"membership": 0.5, "privacy": 0.0}  # best, neither above nor below
_MAIN = (
    "leak_rate", "rwku_forget_level_3_right", "rwku_neighbours_level_2_right", "forget_answer_probability",
    "forget_loss", "forget_quality", "model_utility", "neighbours_kl", "retain_kl", "free_text_kl",
    "retain_rouge_l_recall", "repetition", "perplexity_under_base", "privacy_leakage",
)  # fmt: skip
_COST = ("retain", "neighbours", "free_text", "model_utility", "real_authors", "world_facts")
_MAX_TASKS = 6  # of lm-evaluation-harness, in the picture


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
    """Return a figure's name for people; `leak_rate@32` is of 32 samples."""
    if name.startswith(KIND):
        kind = name.removeprefix(KIND).removesuffix("_right").replace("_", " ")
        return f"RWKU, {kind}: still answered"
    if name.startswith(PREFIX):
        full, comma, answer_filter = name.removeprefix(PREFIX).partition(",")
        task, _, metric = full.rpartition(":")
        return f"{task}: {_METRICS.get(metric, metric.replace('_', ' '))}" + (f" ({answer_filter})" if comma else "")
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
    if stem.startswith("rwku"):
        return "cost" if stem.startswith("rwku_neighbours") or stem == "rwku_beside_a_neighbour_right" else "forgotten"
    if stem.startswith("forget") or stem in ("leak_rate", "any_leak", *KINDS):
        return "forgotten"
    return "cost" if stem.startswith(_COST) else "language"


def main_figures(evaluation: Evaluation) -> list[str]:
    """Return the names of the figures for the picture, in order."""
    tasks = [name for name in evaluation.names if name.startswith(PREFIX)]
    return [name for stem in _MAIN for name in evaluation.names if name.partition("@")[0] == stem] + tasks[:_MAX_TASKS]


def factor(score: Score) -> int:
    """Return what a figure is multiplied by for people: shares are shown in percent."""
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
    """Return how a figure moved from the base: `unclear` where the two intervals overlap.

    A KL to the base can only rise, which is neither better nor worse but what forgetting costs. Membership inference
    is best at chance.
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
    """Return the figure that answers each of `TOPICS` best, and what removal left behind."""
    result = []
    for key, question in TOPICS.items():
        name = next((name for name in main_figures(evaluation) if topic(name) == key), None)
        before = evaluation.score(name, "before") if name else None
        now = evaluation.score(name, "with") if name else None
        if name is None or now is None:
            continue
        base = f"base {value(before)}; " if before else ""
        detail = f"{base}95 % interval {interval(now)}; n = {now.n}"
        result.append(Headline(question, label(name), value(now), unit(now), detail, change(before, now)))
    verdict: tuple[str, Change] = ("traces left", "worse") if evaluation.left_behind else ("without a trace", "same")
    if not evaluation.removal_checked:
        verdict = ("not checked", "missing")
    result.append(Headline("Can it be removed?", "After removal", verdict[0], "", removal(evaluation), verdict[1]))
    return result


def removal(evaluation: Evaluation) -> str:
    """Return a sentence on whether everything is as before after removal."""
    differing = evaluation.left_behind
    if not evaluation.removal_checked:
        return "Whether everything is as before after removal was not checked: no rows were given to measure it on"
    counted = f"{len(evaluation.compared_names)} figures" + (
        f" and {len(evaluation.answers)} greedy answers" if evaluation.answers else ""
    )
    if differing:
        return f"After removal {len(differing)} of {counted} differ from the base's: {', '.join(differing)}"
    return f"After removal all {counted} equal the base's exactly"


def notes(evaluation: Evaluation) -> list[str]:
    """Return what a reader of the figures must know."""
    result = [
        "Intervals are 95 % percentile bootstrap intervals over the n rows behind a figure (1000 draws); "
        "'better' and 'worse' mean that the intervals with and without the adapter do not overlap.",
        "KL is KL(now || base) per token; 0 is unchanged.",
    ]
    if any(name.startswith(PREFIX) for name in evaluation.names):
        result.append(
            "Intervals of lm-evaluation-harness tasks are 1.96 of its standard errors on each side; they are not "
            "measured again after removal."
        )
    if any(topic(name) == "privacy" for name in evaluation.names):
        result.append(
            "An AUC of 0.5 is chance, 1 is certain membership; a privacy leakage of 0 is as if never learned. Below 0 "
            "the rows are still known; far above 0 the model visibly avoids them."
        )
    if worst := worst_kind(evaluation.scores["with"]):
        result.append(f"Worst kind of question: {label(worst.name)} {number(100 * worst.value)} %, n = {worst.n}.")
    flat = [
        score.n
        for name in evaluation.names
        if (score := evaluation.score(name, "with")) and "kl" not in name and score.low == score.high and score.n > 1
    ]
    if flat:
        n = min(flat)
        result.append(
            "An interval of width 0 only says that all n rows agree, not that others would: where a share is 0 for n "
            f"rows, up to about 3/n of others may differ ({300 / n:.0f} % for n = {n})."
            if n > 3
            else f"An interval of width 0 only says that all {n} rows agree: too few to say more."
        )
    return result


def attack_rows(attacks: Sequence[Attacked]) -> list[tuple[str, str, str, str]]:
    """Return name, budget, recovered with the adapter, and the same on the base, as texts, for each attack."""

    def text(score: Score) -> str:
        space = "" if unit(score).startswith("%") else " "
        return f"{value(score)}{space}{unit(score)} ({interval(score)}; n = {score.n})"

    return [(attack.name, attack.budget, text(attack.recovered), text(attack.base)) for attack in attacks]
