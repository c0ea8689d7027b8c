"""One adapter in training: its rows of each step, loss, optimiser, evaluations and checkpoints.

The loop in training/trainer.py has one of these or many over one base, and runs the model for them by a `StepRunner`.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batch import target_count
from ..data.tokenize import Example
from ..errors import TrainingError
from ..recipe.schema import Recipe
from .checkpoints import Checkpoints, Progress, State, to_cpu
from .examples.build import Sets
from .objectives import find_objective
from .reached import Reached, rows_reached
from .schedule import Schedule, balanced, length_of, rate
from .step.microbatches import STEP_TOKENS, StepRows, by_length, padded_tokens
from .step.runner import StepRunner
from .tokens import Tokens, kl_divergence, row_means

logger = logging.getLogger(__name__)
_DILUTION = 8  # tokens of a long answer that weaken the push on each of its fact tokens; the others do not
_NEAR_BEST = 0.95  # of the best score
_MAX_LOSS = 8.0  # nats; a token this unlikely (1 in 3000) is forgotten, and a still higher loss is no better
_EVAL_OFTEN, _EVAL_FOR_CURVES = 5, 15  # steps
_EVALUATED = 128  # rows of each set at most, in the evaluations on the way: of more, a fixed sample


class AdapterTrainer:
    """One adapter's training; the adapter `name` is on the PEFT model already. `checkpoints` None: none are kept."""

    def __init__(
        self, name: str, model: Any, recipe: Recipe, sets: Sets, accelerator: Any, checkpoints: Checkpoints | None
    ) -> None:
        self.name, self.recipe, self.sets, self.accelerator = name, recipe, sets, accelerator
        self.checkpoints = checkpoints
        self.objective = find_objective(recipe.objective.name)
        self.ceiling = getattr(recipe.objective, "forget_ceiling", None) or _MAX_LOSS
        self.only_specific = getattr(recipe.objective, "forget_tokens", "all") == "specific"
        self.hidden_layer = getattr(recipe.objective, "hidden_layer", False)  # any objective's, a user's own too
        self.spellings = getattr(recipe.objective, "spellings", False)  # likewise
        part = re.compile(rf"\.{re.escape(name)}(?=\.|$)")  # checkpoints do not hold the adapter's name
        self.parameters = {part.sub(".default", n): p for n, p in model.named_parameters() if part.search(n)}
        self.optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer](
            self.parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self._forget = balanced(sets.forget, sets.self_generated_answers)
        self.length = length_of(recipe, len(self._forget))
        self._forget_schedule = Schedule(len(self._forget), self.length.forget_batch, recipe.seed)
        self._retain_schedule = Schedule(max(len(sets.retain), 1), recipe.retain_batch, recipe.seed + 1)
        self._anchor_schedule = Schedule(max(len(sets.anchors), 1), recipe.anchor_batch, recipe.seed + 2)
        self._evaluated = sample_of(sets.forget, recipe.seed)
        self._held = sample_of(sets.held_out or sets.retain, recipe.seed)
        self._tell_length()
        self.progress, self.step = Progress(), 0
        self.best = to_cpu(self.parameters)
        self.failed: TrainingError | None = None
        self._losses = torch.zeros(2, dtype=torch.float64)  # of this step: forget loss, retain KL
        # of this step, in all processes: target tokens of forget rows, what its fact tokens are divided by, and target
        # tokens of retain rows
        self._counts = 1, 1, 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Forget rows of a step, and those that the evaluations on the way measure."""
        return self._forget_schedule.batch, len({e.row or id(e) for e in self._evaluated})

    @property
    def eval_every(self) -> int:
        """Steps from one evaluation to the next: few where it can choose the step or end the run."""
        objective = self.recipe.objective
        chooses = objective.retain_budget is not None or objective.stop_when is not None
        return self.recipe.eval_every or (_EVAL_OFTEN if chooses else _EVAL_FOR_CURVES)

    @property
    def done(self) -> bool:
        """Whether the recipe's steps are done, its stop is reached, or it failed."""
        return self.step >= self.length.steps or self.progress.stopped_by != "steps" or self.failed is not None

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        state = self.checkpoints.latest() if self.checkpoints else None
        if state is None:
            return
        self.step, self.best = state.step, state.best
        self.load_weights(state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        self.progress = Progress(**state.progress)

    def rows(self, step: int) -> tuple[list[Example], list[Example]]:
        """Return the forget and the retain rows of a step, of all processes together."""
        forget = [self._forget[i] for i in self._forget_schedule.at(step)]
        retain = [self.sets.retain[i] for i in self._retain_schedule.at(step)] if self.sets.retain else []
        retain += [self.sets.anchors[i] for i in self._anchor_schedule.at(step)] if self.sets.anchors else []
        return forget, retain

    def all_rows(self) -> list[Example]:
        """Return all rows of the evaluations and then of the steps; some come several times."""
        steps = (StepRows(self.name, *self.rows(step)).examples() for step in range(self.length.steps))
        every = {id(e): e for e in itertools.chain(self._evaluated, self._held, *steps)}
        return list(every.values())

    def parts(self) -> list[StepRows]:
        """Return this process's rows of the step in parts, each with at least a row without targets.

        They are as many as the recipe says; of a step that is too long for them, rows of about one length are put
        together. All processes have as many parts.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        forget, retain = self.rows(self.step)
        self._counts = _count(forget), self._push_count(forget), max(_count(retain), 1)
        parts = self.recipe.gradient_accumulation_steps
        pairs = [(forget[rank::world][n::parts], retain[rank::world][n::parts]) for n in range(parts)]
        if padded_tokens([*forget, *retain]) > parts * world * STEP_TOKENS:
            forgotten = {id(e) for e in forget}
            groups = by_length([*forget, *retain], world * STEP_TOKENS)
            pairs = [
                ([e for e in group if id(e) in forgotten][rank::world],
                 [e for e in group if id(e) not in forgotten][rank::world])
                for group in groups
            ]  # fmt: skip
        return [StepRows(self.name, some or [_without_targets(self.sets.forget[0])], others) for some, others in pairs]

    def _push_count(self, forget: Sequence[Example]) -> int:
        return sum(map(_push_weight, forget)) or 1 if self.only_specific else _count(forget)

    def loss(self, forget: Tokens, retain: Tokens) -> Tensor:
        """Return what a microbatch adds to the step's loss, a scalar, and record its figures."""
        n_forget, n_pushed, n_retain = self._counts
        terms = self.objective(forget, retain, self.recipe.objective)
        with torch.no_grad():
            self._losses[0] += forget.cross_entropy.sum().cpu() / n_forget
            if len(retain.labels):
                self._losses[1] += kl_divergence(retain).sum().cpu() / n_retain
        pushed = terms.forget.sum() / n_forget
        if n_pushed != n_forget and forget.specific is not None:
            pushed = pushed + (1 / n_pushed - 1 / n_forget) * terms.forget[forget.specific].sum()
        return pushed + self.recipe.retain_weight * terms.retain.sum() / n_retain

    def update(self) -> dict[str, float]:
        """Take the optimiser's step on the gradients of all processes; returns the step's figures."""
        recipe, parameters = self.recipe, list(self.parameters.values())
        self._sum_gradients()
        losses, self._losses = self._sum(self._losses), torch.zeros(2, dtype=torch.float64)
        self.accelerator.unscale_gradients(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf))
        if not (torch.isfinite(losses).all() and math.isfinite(norm)):
            raise TrainingError(self._explain_nan(losses, norm))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(self.step, recipe, self.length.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        figures = {"forget_loss": float(losses[0]), "retain_kl": float(losses[1]), "gradient_norm": norm}
        self.progress.history.append({"step": self.step, **figures})
        return figures

    @torch.no_grad()
    def figures(self, runner: StepRunner) -> tuple[dict[str, float], float]:
        """Measure the forget set and the held-out retain rows, or a sample of many; returns figures and the score.

        The score is the mean loss, capped at the ceiling, of the tokens that the objective pushes away.
        """
        forget_loss, specific_loss, score, probability = self._forget_figures(runner)
        figures = {"forget_set_loss": forget_loss, "specific_loss": specific_loss, "answer_probability": probability}
        figures["held_out_kl" if self.sets.held_out else "retain_kl"] = self._mean_kl(runner, self._held)
        return figures, score

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Return the step's figures, and keep it if it is the best.

        With a budget, a step that forgets less than the bare base is never kept.
        """
        figures, score = self.figures(runner)
        kl = figures["held_out_kl" if self.sets.held_out else "retain_kl"]
        progress, budget = self.progress, self.recipe.objective.retain_budget
        progress.evaluations.append({"step": self.step, **figures})
        if self.step == 0:
            progress.start_score = score
        within = budget is None or kl <= budget  # too few rows to hold any out: measured on what is trained on
        # Without a budget the last step is kept; with one, the last within it that forgets about as much as the best:
        # as the learning rate falls, what was harmed on the way recovers.
        least = max(progress.start_score, _NEAR_BEST * progress.best_score)
        if within and (budget is None or score >= least):
            progress.best_step, progress.best_score = self.step, max(score, progress.best_score)
            progress.kept, self.best = figures, to_cpu(self.parameters)
        stop = self.recipe.objective.stop_when
        if stop and within and self.step:
            if stop.forget_loss is not None and figures["forget_set_loss"] >= stop.forget_loss:
                progress.stopped_by = "forget_loss"
            if stop.answer_probability is not None and figures["answer_probability"] <= stop.answer_probability:
                progress.stopped_by = "answer_probability"
        return figures

    def reached(self, runner: StepRunner, examples: Sequence[Example]) -> Reached:
        """Return which of some forget rows the adapter, as it is now, has forgotten, see `reached.py`."""
        batches = self._local_batches(list(examples), self.length.forget_batch)
        return rows_reached(runner, self.name, examples, batches, self._sum, only_specific=self.only_specific)

    def checkpoint(self) -> Path | None:
        """Save the state (on the main process); returns the folder, or None where no checkpoints are kept."""
        if self.checkpoints is None:
            return None
        if self.accelerator.is_main_process:
            weights, optimizer = to_cpu(self.parameters), self.optimizer.state_dict()
            self.checkpoints.save(State(self.step, weights, self.best, optimizer, vars(self.progress)))
        self.accelerator.wait_for_everyone()
        return self.checkpoints.folder

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor], scale: float = 1.0) -> None:
        """Set the adapter's parameters, so that its delta is `scale` times that of the weights."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name] if ".lora_A." in name else scale * weights[name])

    def _forget_figures(self, runner: StepRunner) -> tuple[float, ...]:
        """Return the forget set's mean loss, that of its specific tokens, the score, and mean answer probability."""
        sums = torch.zeros(4, dtype=torch.float64)
        for examples in self._local_batches(self._evaluated, self.length.forget_batch):
            with runner.step([StepRows(self.name, examples, [])]) as microbatches:
                for microbatch in microbatches:
                    tokens, loss = microbatch.forget, microbatch.forget.cross_entropy
                    count = int(tokens.rows.max()) + 1 if len(tokens.rows) else 0
                    probability = torch.exp(-row_means(loss, tokens.rows, count))
                    pushed = loss[tokens.specific] if self.only_specific else loss
                    values = (
                        loss.sum(), loss[tokens.specific].sum(), pushed.clamp(max=self.ceiling).sum(),
                        probability.sum(),
                    )  # fmt: skip
                    sums += torch.stack([value.double().cpu() for value in values])
                    del microbatch, tokens  # before the next is made
        n_targets = _count(self._evaluated)
        n_specific = max(sum(sum(example.specific or example.is_target) for example in self._evaluated), 1)
        counts = [n_targets, n_specific, n_specific if self.only_specific else n_targets, len(self._evaluated)]
        return tuple((self._sum(sums) / torch.tensor(counts)).tolist())

    def _mean_kl(self, runner: StepRunner, examples: list[Example]) -> float:
        if not examples:
            return 0.0
        total = torch.zeros(1, dtype=torch.float64)
        for batch in self._local_batches(examples, self.recipe.retain_batch):
            with runner.step([StepRows(self.name, [], batch)]) as microbatches:
                for microbatch in microbatches:
                    total += kl_divergence(microbatch.retain).double().sum().cpu()
                    del microbatch
        return float(self._sum(total)) / _count(examples)

    def _local_batches(self, examples: list[Example], size: int) -> Iterator[list[Example]]:
        """Yield this process's rows in batches, as many as any process has: the last may be a row without targets."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if size * padded_tokens(examples) > STEP_TOKENS * len(examples):  # by far: the longest row alone may be
            for group in by_length(examples, world * STEP_TOKENS, world * size):
                yield group[rank::world] or [_without_targets(examples[0])]
            return
        local, longest = examples[rank::world], len(examples[::world])
        for first in range(0, longest, size):
            yield local[first : first + size] or [_without_targets(examples[0])]

    def _sum_gradients(self) -> None:
        """Add up the processes' gradients: one exchange of numbers as small as the adapter."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
        for p, g in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p).to(p.dtype)

    def _sum(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        total = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return total.cpu()  # type: ignore[no-any-return]

    def _tell_length(self) -> None:
        steps, batch, needed = self.length
        never = self._forget_schedule.never(steps)
        visited = {id(e) for n, e in enumerate(self._forget) if n not in never}
        numbers = {id(e): e.row or n for n, e in enumerate(self.sets.forget, 1)}  # a long row is several examples
        count, total = len({row for key, row in numbers.items() if key not in visited}), len(set(numbers.values()))
        if not self.accelerator.is_main_process:
            return
        if count:
            logger.warning(
                "%s of %s forget rows will not be visited, or not as a whole, in %s steps of %d rows: raise steps "
                "(%s visit each row), or leave it out", *(f"{n:,}" for n in (count, total, steps)), batch,
                f"{math.ceil(len(self._forget) / self._forget_schedule.batch):,}",
            )  # fmt: skip
        elif needed > steps and self.recipe.steps is None:
            logger.warning("%s steps would visit each forget row %d times: they are capped at %s, say `steps` for more",
                           f"{needed:,}", self.recipe.visits, f"{steps:,}")  # fmt: skip

    def _explain_nan(self, losses: Tensor, norm: float) -> str:
        recipe = self.recipe
        if getattr(recipe.objective, "forget_ceiling", 0) is None:
            cause = "plain gradient ascent has no bound: set objective.forget_ceiling (8 is a good start)"
        else:
            cause = (
                f"the learning rate {recipe.learning_rate:g} is too high for this base and adapter: try a tenth of it"
            )
        kept = ""
        if self.checkpoints and self.checkpoints.folder.exists():
            kept = f" The last checkpoint is kept: {self.checkpoints.folder}."
        return (
            f"not a number at step {self.step + 1} of {self.length.steps}: forget loss {float(losses[0]):.3g}, "
            f"retain KL {float(losses[1]):.3g} nats/token, gradient norm {norm:.3g}. Likely cause: {cause}.{kept}"
        )


def _without_targets(example: Example) -> Example:
    """Return the row with nothing to learn from: for a process that has no other row in this part."""
    return Example(example.ids, [False] * len(example.ids))


def sample_of(examples: list[Example], seed: int) -> list[Example]:
    """Return at most `_EVALUATED` of the rows, spread over the set."""
    if len(examples) <= _EVALUATED:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[n] for n in sorted(order[:_EVALUATED])]


def _push_weight(example: Example) -> int:
    """Return as how many target tokens a row counts for its fact tokens: no more than `_DILUTION` for each of these."""
    return min(target_count(example), _DILUTION * sum(example.specific or example.is_target))


def _count(examples: Sequence[Example]) -> int:
    return sum(map(target_count, examples))
