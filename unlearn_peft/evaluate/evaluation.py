"""Before, with the adapters, after removal: everything measured three times, and whether nothing stayed behind.

A bare base, adapter directories and sets of rows come in; an `Evaluation` goes out, to the terminal, to report.py and
as figures alone (no row, no prompt, no answer) to JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ..adapters.read import read_bundle
from ..adapters.trust import Trust
from ..data.rows import read_rows
from ..data.source import DataSpec, Row
from ..errors import AdapterError, DataError
from ..inference.attach import attached, forgetting
from ..models.base import Base
from ..recipe.load import load_recipe
from .custom import Metric, own_scores
from .lm_harness import PREFIX, Ability
from .responses import Comparison, Responses, changed_neighbours, collect_responses, compare_probes
from .score import CONFIDENCE, RESAMPLES, Array, Score
from .suites import Suite, beside_quick, check
from .suites.quick import SETS, measure, take_reference

SCHEMA_VERSION = 1
STATES = ("before", "with", "after")
_PACKAGES = ("unlearn-peft", "torch", "transformers", "peft")


@dataclass(frozen=True)
class MeasuredAdapter:
    """What tells which adapter was measured, and how strongly it was attached."""

    name: str
    weights_sha256: str
    bytes: int
    strength: float


class AttackResult(Protocol):
    """What one attack won back of what was forgotten, as the report shows it."""

    @property
    def name(self) -> str:
        """Which attack."""

    @property
    def budget(self) -> object:
        """What it was allowed, as text: 16 samples, 20 steps, ..."""

    @property
    def recovered(self) -> Score:
        """What comes out with the adapters attached."""

    @property
    def base(self) -> Score:
        """What the same attack gets out of the bare base."""

    @property
    def quoted(self) -> Sequence[str]:
        """What came out, for people to read; never for files that travel."""


@dataclass(frozen=True)
class Evaluation:
    """One measurement of a base before, with, and after adapters.

    Attributes:
        base: the base's public name.
        fingerprint: of the base, see `base.fingerprint`.
        adapters: what was attached.
        settings: what the figures depend on besides the rows.
        rows: the number of rows in each set.
        scores: the figures by state: `before`, `with`, `after`.
        answers: what the probes were answered; for people, never for files that travel.
        changed: the same of the neighbours whose answer with the adapters names something else than before.
        attacks: results of attacks, if any were run.
        versions: of the packages that measured.
        created: when, ISO 8601, UTC.
        seconds: how long it took.
    """

    base: str
    fingerprint: dict[str, str | None]
    adapters: list[MeasuredAdapter]
    settings: dict[str, Any]
    rows: dict[str, int]
    scores: dict[str, list[Score]]
    answers: list[Comparison]
    changed: list[Comparison]
    attacks: Sequence[AttackResult]
    versions: dict[str, str]
    created: str
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
        """The names of the figures that removal must give back: all but general ability, not measured a third time."""
        return [name for name in self.names if not name.startswith(PREFIX)]

    @property
    def left_behind(self) -> list[str]:
        """What differs from the base after removal: names of figures, and `answer n`. Empty is as it must be."""
        figures = [name for name in self.compared_names if self.score(name, "before") != self.score(name, "after")]
        texts = [n for n, row in enumerate(self.answers, 1) if row.texts["before"] != row.texts["after"]]
        return figures + [f"answer {n}" for n in texts]

    @property
    def removal_checked(self) -> bool:
        """Whether anything was measured that tells if removal is exact."""
        return bool(self.compared_names or self.answers)

    def leaking(self, state: str) -> int:
        """Return how many greedy answers name a leak word."""
        return sum(bool(row.leaks[state]) for row in self.answers)

    @property
    def words(self) -> list[str]:
        """All leak words."""
        return sorted({word for row in self.answers for word in row.words})

    def compared(self) -> dict[str, Any]:
        """Return the answers in the form that `compare.show` prints."""
        probes = [
            {"prompt": row.prompt, **{s: {"text": row.texts[s], "leaked": row.leaks[s]} for s in STATES}}
            for row in self.answers
        ]
        return {"probes": probes, "leaks": {state: self.leaking(state) for state in STATES}}

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
            "removal": {
                "exact": not self.left_behind if self.removal_checked else None,
                "differs": self.left_behind,
            },
            "attacks": [
                {"name": a.name, "budget": str(a.budget), "recovered": asdict(a.recovered), "base": asdict(a.base)}
                for a in self.attacks
            ],
            "versions": self.versions,
        }


def evaluate(
    base: Base,
    adapters: Sequence[str | Path],
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
    attacks: Callable[[Base], Sequence[AttackResult]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measure a base before, with and after adapters; what was attached is off again at the end, errors or not.

    Args:
        base: a base with nothing attached.
        adapters: adapter directories.
        rows: checked rows by set, as `suite.measure` takes them.
        suite: which figures.
        k: answers sampled for each probe.
        strength: as `attach` takes it.
        seed: of sampling and bootstrap.
        max_new_tokens: length of greedy and sampled answers.
        chat_template: see `data.tokenize`.
        batch_size: rows at a time.
        ability: tasks of lm-evaluation-harness, run on the base and with the adapters.
        retrained: truth ratios of the forget set under a model that never saw it, for the suite `tofu`.
        trust: as `attach` takes it.
        metrics: functions of your own, from a base and these rows to one `Score` or some; called in each state.
        attacks: called once with the bare base before the last measurement, which so also tells what an attack left
            behind, e.g. `lambda base: run_attacks(Target(base, adapters, ...))`.
        progress: is told what is being done, a line at a time.

    Raises:
        AdapterError: if something is attached already, or an adapter is refused.
        DataError: if there is nothing to measure, or a set is unknown or unfit.
        UnlearnError: if the extra `eval` is not installed.
    """
    began = time.monotonic()
    given = {name: part for name, part in rows.items() if part}
    if not given and ability is None:
        raise DataError(f"nothing to measure: expected rows of at least one of {', '.join(SETS)}")
    check(suite, given)
    if attached(base):
        raise AdapterError("adapters are attached already: detach them, so that 'before' is the base")
    with forgetting(
        base, *adapters, strength=strength, trust=trust
    ):  # refused, it is to be told now and not after minutes
        strengths = list(attached(base).values())
    bundles = [read_bundle(path, trust=trust) for path in adapters]
    reference = take_reference(base, given, chat_template=chat_template, batch_size=batch_size)
    scores: dict[str, list[Score]] = {}
    said: dict[str, Responses] = {}

    def look(state: str) -> None:
        # first the harness, in which most can go wrong; removal is checked without it, for it may take hours
        able = ability.measure(base, batch_size=batch_size) if ability and state != "after" else []
        how: dict[str, Any] = {"seed": seed, "chat_template": chat_template, "batch_size": batch_size}
        asked: dict[str, Any] = {"k": k, "max_new_tokens": max_new_tokens, **how}
        said[state] = collect_responses(base, given, **asked)
        scores[state] = [
            *measure(base, given, reference, said=said[state], **asked),
            *beside_quick(suite, base, given, retrained, **how),
            *able,
        ]
        scores[state] += own_scores(metrics, base, given, [score.name for score in scores[state]])

    progress("measuring the base (1 of 3) ...")
    look("before")
    with forgetting(base, *adapters, strength=strength, trust=trust):
        progress("measuring with the adapters (2 of 3) ...")
        look("with")
    if attacks:
        progress("attacking ...")
    attacked = list(attacks(base)) if attacks else []
    progress("measuring after removal (3 of 3) ...")
    look("after")
    return Evaluation(
        base=base.name,
        fingerprint=dict(base.fingerprint),
        adapters=[
            MeasuredAdapter(bundle.name, bundle.digest, bundle.bytes, factor)
            for bundle, factor in zip(bundles, strengths, strict=True)
        ],
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
        rows={name: len(given[name]) for name in SETS if name in given},
        scores=scores,
        answers=compare_probes(given.get("probes", []), said),
        changed=changed_neighbours(given.get("neighbours", []), said),
        attacks=attacked,
        versions={name: version(name) for name in (*_PACKAGES, *(["lm-eval"] if ability else []))},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
    )


def read_measured(
    recipe: Path | None, files: Mapping[str, Path | None], *, needed: bool = True
) -> tuple[dict[str, list[Row]], bool]:
    """Read the sets to measure from a recipe, single files, or both (a file goes before the recipe's).

    A retain set that the recipe leaves to be made (`auto`) is no set to measure.

    Returns:
        Rows by set, and whether the recipe wants the chat template.

    Raises:
        RecipeError, DataError: if a file is missing or cannot be used, or rows are `needed` and there are none.
    """
    chosen: dict[str, Any] = {}
    chat_template = True
    if recipe:
        settings = load_recipe(recipe)
        chat_template = settings.chat_template
        chosen = {name: source for name in SETS if (source := getattr(settings, name, None)) not in (None, "auto")}
    chosen.update({name: DataSpec(path=str(path)) for name, path in files.items() if path})
    if not chosen and needed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in SETS)
        raise DataError(f"nothing to measure: give --recipe FILE, or one or more of {flags}")
    return {name: read_rows(source, name) for name, source in chosen.items()}, chat_template
