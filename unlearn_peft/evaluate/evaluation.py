"""A bare base, adapters and rows -> an `Evaluation`: everything measured before, with and after the adapters.

The terminal and report.py show it to people; its JSON holds figures alone, no row, no prompt, no answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..adapters.bundle import Bundle
from ..adapters.trust import Trust
from ..data.refusals import REFUSALS
from ..data.rows import read_rows
from ..data.source import DataSpec, Row
from ..errors import DataError
from ..models.base import Base
from ..recipe.load import load_recipe
from ..recipe.objectives import refusals_of
from .custom import Metric, custom_scores
from .lm_harness import PREFIX, Ability
from .responses import Comparison, Responses, changed_neighbours, collect_responses, compare_probes
from .score import CONFIDENCE, RESAMPLES, Array, Score
from .states import STATES, check_adapters, in_each_state
from .suites import Suite, beside_quick, check
from .suites.quick import SETS, measure, take_reference
from .suites.rwku import answered_by, read_rwku
from .suites.tofu import ANSWER_TOKENS

if TYPE_CHECKING:
    from .attacks.harness import Attacked

SCHEMA_VERSION = 1
_PACKAGES = ("unlearn-peft", "torch", "transformers", "peft")
_PROGRESS = {
    "before": "measuring the base (1 of 3) ...",
    "with": "measuring with the adapters (2 of 3) ...",
    "after": "measuring after removal (3 of 3) ...",
}


@dataclass(frozen=True)
class MeasuredAdapter:
    """Which adapter was measured, and how strongly it was attached."""

    name: str
    weights_sha256: str
    bytes: int
    strength: float


@dataclass(frozen=True)
class Evaluation:
    """The figures of a base before, with, and after adapters."""

    base: str  # its public name
    fingerprint: dict[str, str | None]  # of the base
    adapters: list[MeasuredAdapter]
    settings: dict[str, Any]  # what the figures depend on besides the rows
    rows: dict[str, int]  # the number of rows in each set
    scores: dict[str, list[Score]]  # by state
    answers: list[Comparison]  # of the probes; for people, never for files that travel
    changed: list[Comparison]  # neighbours whose answer with the adapters lacks a fact; for people, too
    attacks: Sequence[Attacked]
    versions: dict[str, str]  # of the packages that measured
    created: str  # ISO 8601, UTC
    seconds: float

    @property
    def names(self) -> list[str]:
        """The names of all figures, in order; one may be missing in a state (no perplexity of empty answers)."""
        return list(dict.fromkeys(score.name for state in STATES for score in self.scores[state]))

    def score(self, name: str, state: str) -> Score | None:
        """Return a figure in a state, or None."""
        return next((score for score in self.scores[state] if score.name == name), None)

    @property
    def compared_names(self) -> list[str]:
        """The names of the figures that removal must give back: all but general ability, not measured after it."""
        return [name for name in self.names if not name.startswith(PREFIX)]

    @property
    def left_behind(self) -> list[str]:
        """What differs from the base after removal: names of figures, and `answer n`. It should be empty."""
        figures = [name for name in self.compared_names if self.score(name, "before") != self.score(name, "after")]
        texts = [n for n, row in enumerate(self.answers, 1) if row.texts["before"] != row.texts["after"]]
        return figures + [f"answer {n}" for n in texts]

    @property
    def removal_checked(self) -> bool:
        """Whether anything was measured that shows if removal is exact."""
        return bool(self.compared_names or self.answers)

    def leaking(self, state: str) -> int:
        """Return how many greedy answers name a leak word."""
        return sum(bool(row.leaks[state]) for row in self.answers)

    @property
    def words(self) -> list[str]:
        """All leak words."""
        return sorted({word for row in self.answers for word in row.words})

    def figures(self) -> dict[str, Any]:
        """Return what goes into `evaluation.json`: figures alone, nothing from which a row could be read."""
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "seconds": round(self.seconds, 1),
            "base": {"name": self.base, "fingerprint": self.fingerprint},
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "settings": self.settings,
            "rows": self.rows,
            "interval": {
                "method": "percentile bootstrap over rows",
                **({"lm_eval": "figure +/- 1.96 standard errors"} if "lm_eval" in self.settings else {}),
                "confidence": CONFIDENCE,
                "resamples": RESAMPLES,
            },
            "scores": {state: [asdict(score) for score in self.scores[state]] for state in STATES},
            "greedy_answers_that_leak": {"n": len(self.answers), **{state: self.leaking(state) for state in STATES}},
            "removal": {"exact": not self.left_behind if self.removal_checked else None, "differs": self.left_behind},
            "attacks": [
                {"name": a.name, "budget": str(a.budget), "recovered": asdict(a.recovered), "base": asdict(a.base)}
                for a in self.attacks
            ],
            "versions": self.versions,
        }


def evaluate(
    base: Base,
    adapters: Sequence[str | Path | Bundle],
    rows: Mapping[str, list[Row]],
    *,
    suite: Suite = Suite.QUICK,
    k: int = 32,
    strength: float | Sequence[float] = 1.0,
    seed: int = 0,
    max_new_tokens: int = 64,
    chat_template: bool = True,
    batch_size: int = 8,
    ability: Ability | None = None,
    retrained: Array | None = None,
    trust: Trust | None = None,
    metrics: Sequence[Metric] = (),
    refusals: Sequence[str] = REFUSALS,
    attacks: Callable[[Base], Sequence[Attacked]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measure a base before, with and after adapters; what was attached is off again at the end, errors or not.

    `adapters`, `strength` and `trust` are as for `attach`; `rows`, `k`, `max_new_tokens`, `seed`, `chat_template`,
    `batch_size` and `refusals` as for `suites.quick.measure`. `ability`, tasks of lm-evaluation-harness, is not
    measured again after removal. `retrained` are truth ratios of the forget set under a model that never saw it,
    for the suite `tofu`. `metrics` are functions of your own, called in each state. `attacks` is called once with
    the bare base before the last measurement, which so also shows what an attack left behind, e.g. `lambda base:
    run_attacks(Target(base, adapters, ...))`. `progress` is called with a line of text before each part.

    Raises:
        AdapterError: if something is attached already, or an adapter is refused.
        DataError: if there is nothing to measure, or a set is unknown or unfit.
        UnlearnError: if the extra `eval` is not installed.
    """
    began = time.monotonic()
    sets = {name: part for name, part in rows.items() if part}
    if not sets and ability is None:
        raise DataError(f"nothing to measure: expected rows of at least one of {', '.join(SETS)}")
    check(suite, sets)
    checked = check_adapters(base, adapters, strength, trust)
    reference = take_reference(base, sets, chat_template=chat_template, batch_size=batch_size)
    attacked: list[Attacked] = []
    answered = None
    if suite is Suite.RWKU:
        progress("asking the base what it answers ...")
        answered = answered_by(base, sets["rwku"], chat_template=chat_template)
        progress(answered.told(sets["rwku"]))

    def measure_state(state: str) -> tuple[Responses, list[Score]]:
        if state == "after" and attacks:
            progress("attacking ...")
            attacked.extend(attacks(base))
        progress(_PROGRESS[state])
        # the harness first, where errors are likeliest; not after removal, for it may take hours
        able = ability.measure(base, batch_size=batch_size) if ability and state != "after" else []
        how: dict[str, Any] = {"seed": seed, "chat_template": chat_template}
        options = {**how, "batch_size": batch_size}
        sampling: dict[str, Any] = {"k": k, "max_new_tokens": max_new_tokens}
        responses = collect_responses(base, sets, **sampling, **how)
        scores = measure(
            base, sets, reference, responses=responses, refusals=refusals,
            rouge_tokens=ANSWER_TOKENS if suite is Suite.TOFU else None, **sampling, **options,
        )  # fmt: skip
        scores += [*beside_quick(suite, base, sets, retrained, answered, **options), *able]
        return responses, scores + custom_scores(metrics, base, sets, [score.name for score in scores])

    states = in_each_state(base, checked, measure_state)
    near = sets.get("neighbours", [])
    responses = {state: answered for state, (answered, _) in states.items()}
    return Evaluation(
        base=base.name,
        fingerprint=dict(base.fingerprint),
        adapters=[MeasuredAdapter(bundle.name, bundle.digest, bundle.bytes, factor) for bundle, factor in checked],
        settings={
            "suite": suite.value,
            "k": k,
            "temperature": 1.0,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "chat_template": chat_template,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": base.device.type,
            **({"lm_eval": list(ability.names), "lm_eval_limit": ability.limit} if ability else {}),
        },  # fmt: skip
        rows={name: len(sets[name]) for name in SETS if name in sets},
        scores={state: scores for state, (_, scores) in states.items()},
        answers=compare_probes(sets.get("probes", []), responses),
        changed=changed_neighbours(near, reference["neighbours"].said if near else [], responses),
        attacks=attacked,
        versions={name: version(name) for name in (*_PACKAGES, *(["lm-eval"] if ability else []))},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
    )


class Measured(NamedTuple):
    """What a recipe says to measure, and how."""

    rows: dict[str, list[Row]]  # by set
    chat_template: bool
    refusals: Sequence[str]  # what counts as abstaining


def read_measured(recipe: Path | None, files: Mapping[str, Path | None], *, needed: bool = True) -> Measured:
    """Return the rows to measure by set, from a recipe, single files, or both, and what else it says of measuring.

    A file goes before the recipe's; a retain set that the recipe leaves to be made (`auto`) is no set to measure.

    Raises:
        RecipeError, DataError: if a file is missing or cannot be used, or rows are `needed` and there are none.
    """
    settings = load_recipe(recipe) if recipe else None
    sources = {name: source for name in SETS if (source := getattr(settings, name, None)) not in (None, "auto")}
    sources.update({name: DataSpec(path=str(path)) for name, path in files.items() if path})
    if not sources and needed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in SETS)
        raise DataError(f"nothing to measure: give --recipe FILE, or one or more of {flags}")
    rows = {
        name: read_rwku(Path(source.path)) if name == "rwku" else read_rows(source, name)
        for name, source in sources.items()
    }
    if settings is None:
        return Measured(rows, True, REFUSALS)
    return Measured(rows, settings.chat_template, refusals_of(settings.objective) or REFUSALS)
