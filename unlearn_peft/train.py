"""The one training loop, on Accelerate: a frozen base, a recipe and rows in; a trained adapter out.

Batches are global: the same rows make the same step on one process or many, in one part or several, because
every term is divided by the token count of the whole step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import adapter_config
from .base import Base
from .checkpoints import Checkpoints, State, to_cpu
from .data import Example
from .engine import Engine, row_means, training_mode
from .errors import Interrupted, RecipeError, TrainingError
from .objectives import find_objective, kl_divergence
from .recipe import Recipe
from .schedule import Schedule, Sets, rate
from .signals import stop_signals

_NEARLY = 0.95  # of the best score
_ENOUGH = 8.0  # nats; a token this unlikely (1 in 3000) is forgotten, and a still higher loss is no better


@dataclass
class Progress:
    """What a run has seen so far; plain numbers, in nats/token, kept in checkpoints and in the manifest."""

    history: list[dict[str, float]] = field(default_factory=list)  # one a step
    evaluations: list[dict[str, float]] = field(default_factory=list)  # one each `eval_every` steps
    best_step: int = 0
    best_score: float = -math.inf
    stopped_by: str = "steps"


@dataclass
class Trained:
    """A trained adapter, still on its PEFT model, at its best step."""

    model: Any  # peft.PeftModel
    progress: Progress
    seconds: float
    is_main: bool


def train(
    base: Base,
    recipe: Recipe,
    sets: Sets,
    *,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    tracker: str | None = None,
    quiet: bool = False,
) -> Trained:
    """Train one adapter as the recipe says.

    Raises:
        TrainingError: if the loss stops being a number; the message says when and why that is likely.
        Interrupted: after Ctrl-C or SIGTERM, with the place of the saved state.
    """
    from accelerate import Accelerator
    from peft import get_peft_model

    if base.model.dtype == torch.float16:
        raise RecipeError("training in float16 loses small gradients: choose dtype bfloat16 or float32")
    accelerator = Accelerator(cpu=base.device.type == "cpu", device_placement=False, log_with=tracker,
                              project_dir=str(checkpoints.folder) if checkpoints else ".")  # fmt: skip
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that merging a tied head is unsafe: ours unties first
        model = get_peft_model(base.model, adapter_config(base.model, recipe.adapter))
    started = time.monotonic()
    try:
        run = _Run(base, recipe, sets, accelerator, model)
        if tracker:
            accelerator.init_trackers("unlearn_peft", config=_scalars(recipe))
        run.start(checkpoints, resume)
        with stop_signals() as asked_to_stop:
            run.loop(checkpoints, asked_to_stop, quiet)
        run.restore_best()
    except BaseException:
        model.unload()
        raise
    finally:
        if tracker:
            accelerator.end_training()
    return Trained(model, run.progress, time.monotonic() - started, accelerator.is_main_process)


class _Run:
    """One run's moving parts."""

    def __init__(self, base: Base, recipe: Recipe, sets: Sets, accelerator: Any, model: Any) -> None:
        self.recipe, self.sets, self.accelerator, self.peft = recipe, sets, accelerator, model
        self.objective = find_objective(recipe.objective.name)
        self.ceiling = getattr(recipe.objective, "forget_ceiling", None) or _ENOUGH
        self.only_specific = getattr(recipe.objective, "forget_tokens", "all") == "specific"
        training_mode(model, recipe.gradient_checkpointing)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer](
            self.parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        hidden_layer = getattr(recipe.objective, "hidden_layer", False)  # any objective's, a user's own too
        self.engine = Engine(wrapped, model, base.tokenizer.pad_token_id, hidden_layer)
        self.forgotten = [*sets.forget, *sets.own_answers]
        self.forget_rows = Schedule(len(self.forgotten), recipe.forget_batch, recipe.seed)
        self.retain_rows = Schedule(max(len(sets.retain), 1), recipe.retain_batch, recipe.seed + 1)
        self.anchor_rows = Schedule(max(len(sets.anchors), 1), recipe.anchor_batch, recipe.seed + 2)
        self.silent = _silent(sets.forget[0])
        self.progress, self.step = Progress(), 0
        self.best = to_cpu(self.parameters)

    def start(self, checkpoints: Checkpoints | None, resume: bool) -> None:
        """Begin at step 0, or where the newest checkpoint stands."""
        state = checkpoints.latest() if checkpoints and resume else None
        if state is None:
            self.evaluate()
            return
        self.step, self.best = state.step, state.best
        self._put(state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        self.progress = Progress(**state.progress)

    def loop(self, checkpoints: Checkpoints | None, asked_to_stop: list[int], quiet: bool) -> None:
        """Step until the recipe's steps are done, its stop is reached, or someone asks to stop."""
        recipe, bar = self.recipe, self._bar(quiet)
        while self.step < recipe.steps and self.progress.stopped_by == "steps":
            shown, stop = self.one_step(bool(asked_to_stop), checkpoints)
            self.step += 1
            last = self.step == recipe.steps
            if self.step % recipe.eval_every == 0 or last:
                shown |= self.evaluate()
            bar.update(1)
            bar.set_postfix_str(
                f"forget loss {shown['forget_loss']:.2f}, retain KL {shown['retain_kl']:.4f} nats/token, "
                f"{shown['tokens_per_s']:.0f} tok/s"
            )
            self.accelerator.log(shown, step=self.step)
            if checkpoints and (stop or (self.step % recipe.checkpoint_every == 0 and not last)):
                place = self.checkpoint(checkpoints)
                if stop:
                    bar.close()
                    raise Interrupted(
                        f"stopped at step {self.step} of {recipe.steps}; the state is in {place}. "
                        "Run the same command with --resume to go on from there."
                    )
            elif stop:
                raise Interrupted(f"stopped at step {self.step} of {recipe.steps}; nothing was saved (no output given)")
        bar.close()

    def one_step(self, stop: bool, checkpoints: Checkpoints | None) -> tuple[dict[str, float], bool]:
        """Do one optimiser step over the global batch; returns its figures and whether to stop."""
        recipe, rank, world = self.recipe, self.accelerator.process_index, self.accelerator.num_processes
        began = time.monotonic()
        torch.manual_seed(
            ((recipe.seed * 100_003 + self.step) * 1009 + rank) % 2**63
        )  # dropout, the same after a resume
        forget = [self.forgotten[i] for i in self.forget_rows.at(self.step)]
        retain = [self.sets.retain[i] for i in self.retain_rows.at(self.step)] if self.sets.retain else []
        retain += [self.sets.anchors[i] for i in self.anchor_rows.at(self.step)] if self.sets.anchors else []
        n_forget, n_retain = _count(forget), max(_count(retain), 1)
        seen = torch.zeros(3, dtype=torch.float64)  # forget loss, retain KL, stop
        seen[2] = stop
        parts = recipe.gradient_accumulation_steps
        for part in range(parts):
            mine_f, mine_r = (_share(rows, rank, world, part, parts) for rows in (forget, retain))
            with self.accelerator.no_sync(self.engine.model) if part < parts - 1 else nullcontext():
                f, r = self.engine.tokens(mine_f or [self.silent], mine_r)
                terms = self.objective(f, r, recipe.objective)
                loss = terms.forget.sum() / n_forget + recipe.retain_weight * terms.retain.sum() / n_retain
                if world > 1:  # each parameter must get a gradient, be it zero: rmu may leave those above its layer out
                    loss = loss + f.logits[:0].sum()
                self.accelerator.backward(loss * world)  # processes' gradients are averaged; we want their sum
            seen[0] += f.cross_entropy.detach().sum().cpu() / n_forget
            if mine_r:
                seen[1] += kl_divergence(r).detach().sum().cpu() / n_retain
        seen = self._sum(seen)
        norm = self._clip()
        if not (torch.isfinite(seen).all() and math.isfinite(norm)):
            raise TrainingError(self._explain_nan(seen, norm, checkpoints))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(self.step, recipe)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(len(example.ids) for example in (*forget, *retain))
        figures = {"forget_loss": float(seen[0]), "retain_kl": float(seen[1]), "gradient_norm": norm}
        self.progress.history.append({"step": self.step + 1, **figures})
        return {**figures, "tokens_per_s": tokens / (time.monotonic() - began)}, bool(seen[2] > 0)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the whole forget set and the held-out retain rows; keep the step if it is the best so far."""
        forget_loss, specific_loss, score, probability = self._forget_figures()
        kl = self._mean_kl(self.sets.held_out or self.sets.retain)
        figures = {"forget_set_loss": forget_loss, "specific_loss": specific_loss, "answer_probability": probability}
        figures["held_out_kl" if self.sets.held_out else "retain_kl"] = kl
        progress, budget = self.progress, self.recipe.objective.retain_budget
        progress.evaluations.append({"step": self.step, **figures})
        within = budget is None or kl <= budget  # too few rows to hold any out: measured on what is trained on
        # Without a budget the last step is kept; with one, the last within it that forgets about as much as the best:
        # as the learning rate falls, what was harmed on the way recovers.
        if within and (budget is None or score >= _NEARLY * progress.best_score):
            progress.best_step, progress.best_score = self.step, max(score, progress.best_score)
            self.best = to_cpu(self.parameters)
        stop = self.recipe.objective.stop_when
        if stop and within and self.step:
            if stop.forget_loss is not None and forget_loss >= stop.forget_loss:
                progress.stopped_by = "forget_loss"
            if stop.answer_probability is not None and probability <= stop.answer_probability:
                progress.stopped_by = "answer_probability"
        return figures

    def checkpoint(self, checkpoints: Checkpoints) -> Path:
        """Save the state (on the main process) and wait until it is there."""
        if self.accelerator.is_main_process:
            state = State(
                self.step,
                to_cpu(self.parameters),
                self.best,
                self.optimizer.state_dict(),
                vars(self.progress),
            )
            checkpoints.save(state)
        self.accelerator.wait_for_everyone()
        return checkpoints.folder

    def restore_best(self) -> None:
        """Put the best step's values back into the adapter."""
        self._put(self.best)

    def _forget_figures(self) -> tuple[float, ...]:
        """Return the forget set's mean loss, that of its specific tokens, the score, and mean answer probability.

        The score is the mean loss, capped at the ceiling (or `_ENOUGH`), of the tokens that the objective pushes away.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for rows in _chunks(self.sets.forget[rank::world], self.recipe.forget_batch):
            tokens, _ = self.engine.tokens(rows, [])
            loss = tokens.cross_entropy
            probability = torch.exp(-row_means(loss, tokens.rows, len(rows)))
            pushed = loss[tokens.specific] if self.only_specific else loss
            values = (
                loss.sum(), loss[tokens.specific].sum(), pushed.clamp(max=self.ceiling).sum(), probability.sum(),
            )  # fmt: skip
            sums += torch.stack([value.double().cpu() for value in values])
        every = _count(self.sets.forget)
        specific = sum(sum(example.specific or example.is_target) for example in self.sets.forget)
        counts = [every, specific, specific if self.only_specific else every, len(self.sets.forget)]
        return tuple((self._sum(sums) / torch.tensor(counts)).tolist())

    def _mean_kl(self, examples: list[Example]) -> float:
        if not examples:
            return 0.0
        total = torch.zeros(1, dtype=torch.float64)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for rows in _chunks(examples[rank::world], self.recipe.retain_batch):
            _, tokens = self.engine.tokens([], rows)
            total += kl_divergence(tokens).double().sum().cpu()
        return float(self._sum(total)) / _count(examples)

    def _clip(self) -> float:
        limit = self.recipe.max_grad_norm or math.inf
        return float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))

    def _sum(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        moved = values.to(self.accelerator.device)
        return self.accelerator.reduce(moved, reduction="sum").cpu()  # type: ignore[no-any-return]

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def _bar(self, quiet: bool) -> Any:
        from tqdm import tqdm

        hidden = quiet or not self.accelerator.is_main_process
        return tqdm(total=self.recipe.steps, initial=self.step, unit="step", desc="forgetting", disable=hidden)

    def _explain_nan(self, seen: Tensor, norm: float, checkpoints: Checkpoints | None) -> str:
        recipe = self.recipe
        if getattr(recipe.objective, "forget_ceiling", 0) is None:
            cause = "plain gradient ascent has no bound: set objective.forget_ceiling (8 is a good start)"
        elif recipe.dtype == "float16":
            cause = "float16 overflows: use bfloat16 or float32"
        else:
            cause = (
                f"the learning rate {recipe.learning_rate:g} is too high for this base and adapter: try a tenth of it"
            )
        there = checkpoints is not None and checkpoints.folder.exists()
        kept = f" The last checkpoint is kept: {checkpoints.folder}." if checkpoints and there else ""
        return (
            f"not a number at step {self.step + 1} of {recipe.steps}: forget loss {float(seen[0]):.3g}, retain KL "
            f"{float(seen[1]):.3g} nats/token, gradient norm {norm:.3g}. Likely cause: {cause}.{kept}"
        )


def run_digest(recipe: Recipe, rows_digest: str, base: Base, world: int = 1) -> str:
    """Return what a checkpoint must agree in with the run that resumes it."""
    settings = recipe.model_dump(exclude={"output", "forget", "retain", "probes", "neighbours", "checkpoint_every"})
    known = json.dumps([settings, rows_digest, base.fingerprint], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def _share(rows: list[Example], rank: int, world: int, part: int, parts: int) -> list[Example]:
    return rows[rank::world][part::parts]


def _silent(example: Example) -> Example:
    """Return the row with nothing to learn from: for a process that has no row of its own in this part."""
    return Example(example.ids, [False] * len(example.ids))


def _count(examples: Sequence[Example]) -> int:
    return sum(sum(example.is_target) for example in examples)


def _chunks(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


def _scalars(recipe: Recipe) -> dict[str, Any]:
    """What a tracker may know of a recipe: settings, never data."""
    flat = recipe.model_dump(include={"retain_weight", "steps", "learning_rate", "seed", "base", "optimizer"})
    return {**flat, "adapter": recipe.adapter.kind, "objective": recipe.objective.name}
