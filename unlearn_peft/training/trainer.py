"""The one training loop, on Accelerate: a frozen base, recipes and rows in; trained adapters out.

One adapter or many: each is an `AdapterTrainer`, and a step is one pass over the base for all. Batches are global: the
same rows make the same step on one process or many, in one part or several, beside other adapters or alone, because
every term is divided by the token count of the adapter's whole step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import Interrupted, RecipeError, TrainingError
from ..models.base import Base, give_back_freed
from ..models.layers import vocabulary
from ..recipe.schema import DATA_FIELDS, Recipe
from .adapter_config import adapter_config
from .adapter_trainer import AdapterTrainer
from .checkpoints import Checkpoints, Progress, stop_signals
from .examples.build import Sets
from .examples.fact_tokens import spellings
from .finish import finish
from .step.compiling import compiled
from .step.layers import training_mode
from .step.reference import TensorCache, cache_key
from .step.runner import StepRunner
from .step.sharding import is_sharded, runs_on_cpu, shard

logger = logging.getLogger(__name__)
MACHINE_FIELDS = ("output", "checkpoint_every", "cache_gb", "compile")  # they change nothing that is learnt


@dataclass
class Job:
    """One adapter to train."""

    recipe: Recipe
    sets: Sets
    checkpoints: Checkpoints | None = None


@dataclass
class Trained:
    """A trained adapter, still on its PEFT model, at its best step."""

    number: int  # of its job
    model: Any  # peft.PeftModel
    name: str  # the adapter's on the model
    progress: Progress
    seconds: float
    is_main: bool
    forget_batch: int = 0
    evaluated_rows: int = 0


def train(
    base: Base,
    jobs: Sequence[Job],
    finished: Callable[[Trained], None],
    *,
    cache_folder: Path | None = None,
    resume: bool = False,
    tracker: str | None = None,
    quiet: bool = False,
) -> None:
    """Train an adapter for each job, all in one pass over one base; the adapters are left on it.

    `finished` is called with each adapter as soon as it is done. Reference activations beyond `cache_gb` go to
    `cache_folder`, or without one are computed again. See `unlearn` for the other arguments.

    Raises:
        TrainingError: if a loss stops being a number; the message says when, and the likely cause.
        Interrupted: after Ctrl-C or SIGTERM, with the path of the saved state.
    """
    with _accelerate_as_found():
        training = Training(base, jobs, cache_folder=cache_folder, tracker=tracker, quiet=quiet)
        try:
            training.start(resume)
            with stop_signals() as received:
                training.loop(finished, received)
        finally:
            training.close()


class Training:
    """Some adapters in training on one base."""

    def __init__(
        self,
        base: Base,
        jobs: Sequence[Job],
        *,
        cache_folder: Path | None = None,
        tracker: str | None = None,
        quiet: bool = True,
    ) -> None:
        from accelerate import Accelerator

        first, checkpoints = jobs[0].recipe, jobs[0].checkpoints
        self.accelerator = Accelerator(cpu=runs_on_cpu(base), device_placement=False, log_with=tracker,
                                       project_dir=str(checkpoints.folder) if checkpoints else ".")  # fmt: skip
        self.quiet = quiet or not self.accelerator.is_main_process
        self.began = time.monotonic()
        sharded = is_sharded(self.accelerator, base)
        if sharded and len(jobs) > 1:
            raise RecipeError("several adapters at once need a base that fits one process: train them one by one")
        names = ["default"] if len(jobs) == 1 else [f"adapter{n}" for n in range(len(jobs))]
        self.sharded: Any = None
        self._undo = ExitStack()
        try:
            if sharded:
                self._undo.callback(base.model.to, base.device)  # it waits in main memory while its twin is sharded
                self.sharded = shard(self.accelerator, base)
            self.model = _with_adapters(self.sharded if sharded else base.model, [job.recipe for job in jobs], names)
            training_mode(self.model, first.gradient_checkpointing)
            self.trainers = [
                AdapterTrainer(name, self.model, job.recipe, job.sets, self.accelerator, job.checkpoints)
                for name, job in zip(names, jobs, strict=True)
            ]
            for trainer in () if sharded else self.trainers:
                trainer.optimizer = self.accelerator.prepare(trainer.optimizer)
            world = self.accelerator.num_processes
            self.cache = TensorCache(
                cache_key(base.fingerprint, base.quantized, str(base.model.dtype), self.accelerator.mixed_precision),
                0 if world > 1 and cache_folder else int(first.cache_gb * 1e9),
                cache_folder,
                self.accelerator.process_index,
            )
            spelling: dict[str, torch.Tensor] = {}
            if names := [trainer.name for trainer in self.trainers if trainer.spellings]:
                numbers = spellings(base.tokenizer, vocabulary(base.model))
                spelling = dict.fromkeys(names, numbers.to(self.accelerator.device))
            self.runner = StepRunner(
                self.model, base.pad_id, {t.name: t.hidden_layer for t in self.trainers},
                cache=self.cache, spelling=spelling, sharded=self.sharded,
            )  # fmt: skip
            if first.compile:
                self._undo.enter_context(compiled(self.runner.adapted_layers, self.accelerator.device))
            if tracker:
                self._undo.callback(self.accelerator.end_training)
                settings = {**_scalars(first), "steps": self.trainers[0].length.steps}
                self.accelerator.init_trackers("unlearn_peft", config=settings)
        except BaseException:
            self.close()
            raise

    def start(self, resume: bool = False) -> None:
        """Begin at step 0 or at the newest checkpoints: compute reference activations and measure the bare base."""
        for trainer in self.trainers if resume else ():
            trainer.restore()
        rows = [example for trainer in self.trainers for example in trainer.all_rows()]
        rows = list({id(example): example for example in rows}.values())
        with self.accelerator.autocast():
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            self.runner.reference.prepare(rows[rank::world], quiet=self.quiet)
            self.accelerator.wait_for_everyone()
            give_back_freed()  # activations of whole batches; a step frees and takes its own
            self.cache.refresh()
            for trainer in self.trainers:
                if not trainer.progress.evaluations:
                    trainer.evaluate(self.runner)

    def one_step(self) -> dict[str, dict[str, float]]:
        """Do one optimiser step of each adapter that is not done; returns their figures, by adapter name."""
        live = [trainer for trainer in self.trainers if not trainer.done]
        rank, first = self.accelerator.process_index, live[0]
        seed = (first.recipe.seed * 100_003 + first.step) * 1009 + rank
        torch.manual_seed(seed % 2**63)  # dropout, the same after a resume
        parts = [trainer.parts() for trainer in live]
        for part in range(max(map(len, parts))):
            taking_part = [trainer for trainer, its in zip(live, parts, strict=True) if part < len(its)]
            rows = [its[part] for its in parts if part < len(its)]
            with self.accelerator.autocast(), self.runner.step(rows) as microbatches:
                for microbatch in microbatches:
                    loss = taking_part[microbatch.number].loss(microbatch.forget, microbatch.retain)
                    if self.sharded is not None:  # backwards too, whatever this process's rows are
                        torch.autograd.backward(loss + microbatch.forget.logits[:0].sum())
                    elif loss.requires_grad:
                        self.accelerator.backward(loss)
                    del microbatch, loss  # the next one's logits take their place
        figures = {}
        for trainer in live:
            try:
                figures[trainer.name] = trainer.update()
            except TrainingError as error:
                if len(self.trainers) == 1:
                    raise
                trainer.failed = error  # the others go on
                trainer.optimizer.zero_grad()
        return figures

    def loop(self, finished: Callable[[Trained], None], signals: list[int]) -> None:
        """Step until all are done, or one of the processes has received a signal."""
        from tqdm import tqdm

        done: set[str] = set()
        bar = tqdm(total=sum(t.length.steps for t in self.trainers), initial=sum(t.step for t in self.trainers),
                   unit="step", desc="forgetting", disable=self.quiet)  # fmt: skip
        while True:
            for number, trainer in enumerate(self.trainers):
                if trainer.done and trainer.name not in done:
                    done.add(trainer.name)
                    if trainer.failed:
                        logger.error("%s: %s", trainer.recipe.output, trainer.failed)
                        continue
                    with self.accelerator.autocast():
                        finish(trainer, self.runner)
                    seconds = time.monotonic() - self.began
                    main = self.accelerator.is_main_process
                    finished(Trained(number, self.model, trainer.name, trainer.progress, seconds, main, *trainer.sizes))
            live = [trainer for trainer in self.trainers if not trainer.done]
            if not live:
                break
            began = time.monotonic()
            tokens = sum(len(e.ids) for t in live for rows in t.rows(t.step) for e in rows)
            figures = self.one_step()
            speed = tokens / (time.monotonic() - began)
            live = [trainer for trainer in live if not trainer.failed]
            for trainer in live:
                figures[trainer.name]["tokens_per_s"] = speed
                if trainer.step % trainer.eval_every == 0 or trainer.step == trainer.length.steps:
                    with self.accelerator.autocast():
                        figures[trainer.name] |= trainer.evaluate(self.runner)
                prefix = "" if len(self.trainers) == 1 else f"{trainer.name}/"
                self.accelerator.log({f"{prefix}{k}": v for k, v in figures[trainer.name].items()}, step=trainer.step)
            bar.update(len(live))
            if live:
                bar.set_postfix_str(_progress_text(list(figures.values())))
            self._save(live, self._any_process(bool(signals)))
        bar.close()
        if failed := [trainer for trainer in self.trainers if trainer.failed]:
            names = ", ".join(str(trainer.recipe.output) for trainer in failed)
            raise TrainingError(
                f"{len(failed)} of {len(self.trainers)} adapters failed ({names}); the others are saved. "
                f"The first: {failed[0].failed}"
            )

    def close(self) -> None:
        """End what was begun beside the adapters: trackers, compiled layers, a sharded twin."""
        self._undo.close()

    def _save(self, live: Sequence[AdapterTrainer], stop: bool) -> None:
        folders = []
        for trainer in live:
            if stop or (trainer.step % trainer.recipe.checkpoint_every == 0 and not trainer.done):
                folders.append(trainer.checkpoint())
        if not stop or not live:
            return
        where = f"step {live[0].step} of {live[0].length.steps}"
        if len(live) > 1:
            where = f"step {live[0].step} with {len(live)} of {len(self.trainers)} adapters unfinished"
        saved = [str(folder) for folder in folders if folder]
        if not saved:
            raise Interrupted(f"stopped at {where}; nothing was saved (no output given)")
        raise Interrupted(
            f"stopped at {where}; the state is in {', '.join(saved)}. "
            "Run the same command with --resume to go on from there."
        )

    def _any_process(self, stop: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return stop
        count = torch.tensor([float(stop)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum") > 0)


@contextmanager
def _accelerate_as_found() -> Iterator[None]:
    """Put back what Accelerate keeps for the whole process: a caller may train by it with other settings."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in kept]
    try:
        yield
    finally:
        for state, values in zip(kept, before, strict=True):
            state.clear()
            state.update(values)


def run_digest(recipe: Recipe, rows_digest: str, base: Base) -> str:
    """Return what a checkpoint must agree in with the run that resumes it."""
    settings = recipe.model_dump(exclude={*DATA_FIELDS, *MACHINE_FIELDS})
    content = json.dumps([settings, rows_digest, base.fingerprint], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _with_adapters(bare: Any, recipes: Sequence[Recipe], names: Sequence[str]) -> Any:
    """Return a PEFT model with an adapter for each recipe, each begun as it would be alone, all of them trainable."""
    from peft import get_peft_model

    configs = [adapter_config(bare, recipe.adapter) for recipe in recipes]  # of the bare base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that merging a tied head is unsafe: ours unties first
        torch.manual_seed(recipes[0].seed)
        model = get_peft_model(bare, configs[0], adapter_name=names[0])
        for recipe, name, config in zip(recipes[1:], names[1:], configs[1:], strict=True):
            torch.manual_seed(recipe.seed)
            model.add_adapter(name, config)
        if len(names) > 1:
            model.base_model.set_adapter(list(names))
    return model


def _progress_text(figures: Sequence[dict[str, float]]) -> str:
    forget, kl = (sum(each[key] for each in figures) / len(figures) for key in ("forget_loss", "retain_kl"))
    kl = max(kl, 0.0)  # of equal distributions rounding can make it less
    count = f"{len(figures)} adapters, mean " if len(figures) > 1 else ""
    return f"{count}forget loss {forget:.2f}, retain KL {kl:.4f} nats/token, {figures[0]['tokens_per_s']:.0f} tok/s"


def _scalars(recipe: Recipe) -> dict[str, Any]:
    """What a tracker may know of a recipe: settings, never data."""
    flat = recipe.model_dump(include={"retain_weight", "learning_rate", "seed", "base", "optimizer"})
    return {**flat, "adapter": recipe.adapter.kind, "objective": recipe.objective.name}
