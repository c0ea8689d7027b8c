"""The one training loop, on Accelerate: a frozen base, recipes and rows in; trained adapters out.

One adapter or many: each is an `AdapterTrainer`, and all of them learn over one base in one pass a step. Batches are
global: the same rows make the same step on one process or many, in one part or several, beside other adapters or alone,
because every term is divided by the token count of the adapter's whole step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import Interrupted, RecipeError, TrainingError
from ..models.base import Base, give_back_freed
from ..recipe.schema import DATA_FIELDS, Recipe
from .adapter_config import adapter_config
from .checkpoints import Checkpoints, stop_signals
from .examples.build import Sets
from .examples.fact_tokens import spellings
from .learner import AdapterTrainer, Progress
from .step.compiling import compile_layers, restore
from .step.layers import training_mode
from .step.reference import TensorCache, states_key
from .step.runner import StepRunner
from .step.sharding import is_shared, runs_on_cpu, share_out

logger = logging.getLogger(__name__)
MACHINE_FIELDS = ("output", "checkpoint_every", "cache_gb", "compile")  # what changes nothing that is learnt


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
    """Train an adapter for each job, all in one pass over one base.

    Args:
        base: a frozen base; it is as it was when this returns or raises.
        jobs: recipes that fit the base, with their rows.
        finished: called with each adapter as soon as it is done.
        cache_folder: where what is computed once goes when `cache_gb` is full; None: it is then not kept.
        resume: go on from the newest checkpoints.
        tracker: an Accelerate tracker.
        quiet: no progress bar.

    Raises:
        TrainingError: if a loss stops being a number; the message says when and why that is likely.
        Interrupted: after Ctrl-C or SIGTERM, with the place of the saved state.
    """
    training = Training(base, jobs, cache_folder=cache_folder, tracker=tracker, quiet=quiet)
    try:
        training.start(resume)
        with stop_signals() as asked_to_stop:
            training.loop(finished, asked_to_stop)
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

        if base.model.dtype == torch.float16:
            raise RecipeError("training in float16 loses small gradients: choose dtype bfloat16 or float32")
        first, place = jobs[0].recipe, jobs[0].checkpoints
        self.accelerator = Accelerator(cpu=runs_on_cpu(base), device_placement=False, log_with=tracker,
                                       project_dir=str(place.folder) if place else ".")  # fmt: skip
        self.quiet = quiet or not self.accelerator.is_main_process
        self.tracker, self.began = tracker, time.monotonic()
        shared = is_shared(self.accelerator, base)
        if shared and len(jobs) > 1:
            raise RecipeError("several adapters at once need a base that fits one process: train them one by one")
        names = ["default"] if len(jobs) == 1 else [f"adapter{n}" for n in range(len(jobs))]
        self.base, self.home, self.model, self.whole = base, base.device, None, None
        self.compiled: list[Any] = []
        try:
            self.whole = share_out(self.accelerator, base) if shared else None
            bare = self.whole if shared else base.model
            self.model = _with_adapters(bare, [job.recipe for job in jobs], names)
            training_mode(self.model, first.gradient_checkpointing)
            self.learners = [
                AdapterTrainer(name, self.model, job.recipe, job.sets, self.accelerator, job.checkpoints)
                for name, job in zip(names, jobs, strict=True)
            ]
            for learner in () if shared else self.learners:
                learner.optimizer = self.accelerator.prepare(learner.optimizer)
            world = self.accelerator.num_processes
            self.cache = TensorCache(
                states_key(base.fingerprint, base.quantized, str(base.model.dtype), self.accelerator.mixed_precision),
                0 if world > 1 and cache_folder else int(first.cache_gb * 1e9),
                cache_folder,
                self.accelerator.process_index,
            )
            self.engine = StepRunner(
                self.model, base.tokenizer.pad_token_id, {ln.name: ln.hidden_layer for ln in self.learners},
                cache=self.cache, spelling=self._spelling(), whole=self.whole,
            )  # fmt: skip
            if first.compile:
                self.compiled = compile_layers(self.engine.adapted_layers, self.accelerator.device)
            if tracker:
                self.accelerator.init_trackers("unlearn_peft", config=_scalars(first))
        except BaseException:
            self.close()
            raise

    def _spelling(self) -> dict[str, torch.Tensor]:
        """Return which tokens read alike, for the adapters whose objective wants to know."""
        wanting = [learner.name for learner in self.learners if learner.spellings]
        if not wanting:
            return {}
        size = self.base.model.config.get_text_config().vocab_size
        return dict.fromkeys(wanting, spellings(self.base.tokenizer, size).to(self.accelerator.device))

    def start(self, resume: bool = False) -> None:
        """Begin at step 0 or where the newest checkpoints stand, with all there that is computed once."""
        for learner in self.learners if resume else ():
            learner.restore()
        rows = [example for learner in self.learners for example in learner.all_rows()]
        rows = list({id(example): example for example in rows}.values())
        with self.accelerator.autocast():
            self.engine.prepare(
                rows[self.accelerator.process_index :: self.accelerator.num_processes], quiet=self.quiet
            )
            self.accelerator.wait_for_everyone()
            give_back_freed()  # activations of whole batches; a step frees and takes its own
            self.cache.look()
            for learner in self.learners:
                if not learner.progress.evaluations:
                    learner.evaluate(self.engine)

    def one_step(self) -> dict[str, dict[str, float]]:
        """Do one optimiser step of each adapter that is not done; returns their figures, by adapter name."""
        live = [learner for learner in self.learners if not learner.done]
        rank, first = self.accelerator.process_index, live[0]
        seed = (first.recipe.seed * 100_003 + first.step) * 1009 + rank
        torch.manual_seed(seed % 2**63)  # dropout, the same after a resume
        for part in range(max(learner.recipe.gradient_accumulation_steps for learner in live)):
            taking = [learner for learner in live if part < learner.recipe.gradient_accumulation_steps]
            works = [learner.work(part) for learner in taking]
            with self.accelerator.autocast(), self.engine.step(works) as pieces:
                for piece in pieces:
                    loss = taking[piece.work].loss(piece.forget, piece.retain)
                    if self.whole is not None:  # backwards too, whatever this process's rows are
                        torch.autograd.backward(loss + piece.forget.logits[:0].sum())
                    elif loss.requires_grad:
                        self.accelerator.backward(loss)
                    del piece, loss  # the next piece's logits take their place
        figures = {}
        for learner in live:
            try:
                figures[learner.name] = learner.update()
            except TrainingError as error:
                if len(self.learners) == 1:
                    raise
                learner.failed = error  # the others go on
                learner.optimizer.zero_grad()
        return figures

    def loop(self, finished: Callable[[Trained], None], asked_to_stop: list[int]) -> None:
        """Step until all are done, or someone asks to stop."""
        from tqdm import tqdm

        done: set[str] = set()
        bar = tqdm(total=sum(ln.recipe.steps for ln in self.learners), initial=sum(ln.step for ln in self.learners),
                   unit="step", desc="forgetting", disable=self.quiet)  # fmt: skip
        while True:
            for number, learner in enumerate(self.learners):
                if learner.done and learner.name not in done:
                    done.add(learner.name)
                    if learner.failed:
                        logger.error("%s: %s", learner.recipe.output, learner.failed)
                        continue
                    learner.put(learner.best)
                    seconds = time.monotonic() - self.began
                    main = self.accelerator.is_main_process
                    finished(Trained(number, self.model, learner.name, learner.progress, seconds, main))
            live = [learner for learner in self.learners if not learner.done]
            if not live:
                break
            began = time.monotonic()
            tokens = sum(len(e.ids) for ln in live for rows in ln.rows(ln.step) for e in rows)
            shown = self.one_step()
            speed = tokens / (time.monotonic() - began)
            live = [learner for learner in live if not learner.failed]
            for learner in live:
                recipe = learner.recipe
                shown[learner.name]["tokens_per_s"] = speed
                if learner.step % recipe.eval_every == 0 or learner.step == recipe.steps:
                    with self.accelerator.autocast():
                        shown[learner.name] |= learner.evaluate(self.engine)
                prefix = "" if len(self.learners) == 1 else f"{learner.name}/"
                self.accelerator.log({f"{prefix}{k}": v for k, v in shown[learner.name].items()}, step=learner.step)
            bar.update(len(live))
            if live:
                bar.set_postfix_str(_told(list(shown.values())))
            self._save(live, self._anyone(bool(asked_to_stop)))
        bar.close()
        if failed := [learner for learner in self.learners if learner.failed]:
            named = ", ".join(str(learner.recipe.output) for learner in failed)
            raise TrainingError(
                f"{len(failed)} of {len(self.learners)} adapters failed ({named}); the others are saved. "
                f"The first: {failed[0].failed}"
            )

    def close(self) -> None:
        """Take the adapters off the base again."""
        if self.tracker:
            self.accelerator.end_training()
        restore(self.compiled)
        if self.base.device != self.home:  # it waited elsewhere while it was shared out
            self.base.model.to(self.home)
        if self.model is not None and self.whole is None:
            self.model.unload()

    def _save(self, live: Sequence[AdapterTrainer], stop: bool) -> None:
        places = []
        for learner in live:
            if stop or (learner.step % learner.recipe.checkpoint_every == 0 and not learner.done):
                places.append(learner.checkpoint())
        if not stop or not live:
            return
        where = f"step {live[0].step} of {live[0].recipe.steps}"
        if len(live) > 1:
            where = f"step {live[0].step} with {len(live)} of {len(self.learners)} adapters unfinished"
        kept = [str(place) for place in places if place]
        if not kept:
            raise Interrupted(f"stopped at {where}; nothing was saved (no output given)")
        raise Interrupted(
            f"stopped at {where}; the state is in {', '.join(kept)}. "
            "Run the same command with --resume to go on from there."
        )

    def _anyone(self, stop: bool) -> bool:
        """Return whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return stop
        told = torch.tensor([float(stop)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, reduction="sum") > 0)


def run_digest(recipe: Recipe, rows_digest: str, base: Base) -> str:
    """Return what a checkpoint must agree in with the run that resumes it."""
    settings = recipe.model_dump(exclude={*DATA_FIELDS, *MACHINE_FIELDS})
    known = json.dumps([settings, rows_digest, base.fingerprint], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def _with_adapters(bare: Any, recipes: Sequence[Recipe], names: Sequence[str]) -> Any:
    """Return a PEFT model with an adapter for each recipe, each begun as it would be alone, all of them trainable."""
    from peft import get_peft_model

    model = None
    configs = [adapter_config(bare, recipe.adapter) for recipe in recipes]  # of the bare base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that merging a tied head is unsafe: ours unties first
        try:
            for recipe, name, config in zip(recipes, names, configs, strict=True):
                torch.manual_seed(recipe.seed)
                if model is None:
                    model = get_peft_model(bare, config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
            if len(names) > 1 and model is not None:
                model.base_model.set_adapter(list(names))
        except BaseException:
            if model is not None:
                model.unload()
            raise
    return model


def _told(shown: Sequence[dict[str, float]]) -> str:
    forget, kl = (sum(s[key] for s in shown) / len(shown) for key in ("forget_loss", "retain_kl"))
    many = f"{len(shown)} adapters, mean " if len(shown) > 1 else ""
    return f"{many}forget loss {forget:.2f}, retain KL {kl:.4f} nats/token, {shown[0]['tokens_per_s']:.0f} tok/s"


def _scalars(recipe: Recipe) -> dict[str, Any]:
    """What a tracker may know of a recipe: settings, never data."""
    flat = recipe.model_dump(include={"retain_weight", "steps", "learning_rate", "seed", "base", "optimizer"})
    return {**flat, "adapter": recipe.adapter.kind, "objective": recipe.objective.name}
