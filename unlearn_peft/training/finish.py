"""The end of a run: the best step's delta, scaled down as far as what it has forgotten stays forgotten.

Ascent goes on for as many steps as the recipe has, and a delta that has gone beyond what is needed harms neighbours by
it. Between the base and the trained weights forgetting is lost later than harm: weights on that line are often better
than those at its end (Wortsman et al. 2022, arXiv:2109.01903, for fine-tuning in general).
"""

from __future__ import annotations

from .adapter_trainer import AdapterTrainer, sample_of
from .step.runner import StepRunner

_SCALES = 0.7, 0.8, 0.9


def finish(trainer: AdapterTrainer, runner: StepRunner) -> None:
    """Put on the model what is to be saved, and measure it: all forget rows, and the figures of an evaluation."""
    progress, share = trainer.progress, trainer.recipe.objective.scale_back
    sets = (trainer.sets.forget, trainer.sets.self_generated_answers)
    samples = [sample_of(rows, trainer.recipe.seed) for rows in sets]

    def forgotten(scale: float = 1.0) -> list[int]:
        trainer.load_weights(trainer.best, scale)
        return [trainer.reached(runner, rows).forgotten_rows for rows in samples]

    trainer.load_weights(trainer.best)
    if share is not None and progress.best_step and progress.stopped_by == "steps":
        rows, own = forgotten()

        def enough(scale: float) -> bool:
            still, of_own = forgotten(scale)
            return still >= rows and of_own >= share * own

        progress.scale = next(filter(enough, _SCALES), 1.0)
        trainer.load_weights(trainer.best, progress.scale)
        progress.kept, _ = trainer.figures(runner)
    measure_rows(trainer, runner)


def measure_rows(trainer: AdapterTrainer, runner: StepRunner) -> None:
    """Record which forget rows the adapter, as it is now, has forgotten."""
    own = trainer.reached(runner, trainer.sets.self_generated_answers)
    counts = {"own_answers": own.forget_rows, "own_answers_forgotten": own.forgotten_rows}
    trainer.progress.rows = {**vars(trainer.reached(runner, trainer.sets.forget)), **counts}
