"""Recipes -> finished adapter directories: read the rows, check, train, save."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ..adapters.bundle import CONFIG
from ..adapters.read import read_bundle
from ..adapters.write import check_output
from ..data.rows import keyed_digest
from ..errors import AdapterError, OutputError, RecipeError
from ..files.atomic import folder_bytes
from ..files.paths import digest_key
from ..inference.attach import attached
from ..models.base import Base, freeze, load_base
from ..models.restore import left_as_found
from ..recipe.load import make_recipe
from ..recipe.schema import Recipe
from .checkpoints import Checkpoints, Progress
from .examples.build import build_examples, find_known, make_retain, read_sets
from .preflight import check_trainable
from .save import metrics_of, save_adapter, settings_of
from .step.sharding import runs_on_cpu
from .trainer import Job, Trained, run_digest, train

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """A finished adapter: where it is, how large it is, and what its training recorded."""

    path: Path
    bytes: int
    metrics: dict[str, Any]
    progress: Progress

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def unlearn(
    base: str | Base | None = None,
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    tracker: str | None = None,
    quiet: bool = False,
    **fields: Any,
) -> Adapter:
    """Train a forget adapter and save it; the base is left as it was, to the last bit.

    Args:
        base: a loaded `Base`, or a name as `load_base` takes it; by default the recipe's.
        recipe: all settings at once, see `load_recipe`.
        fields: settings by name, which override those of `recipe`: `forget`, `retain` (rows or paths), `output`, ...
        resume: continue from the newest checkpoint beside the output, if there is one.
        tracker: an Accelerate tracker: tensorboard, trackio or wandb.
        quiet: no progress bar.

    Raises:
        UnlearnError: see errors.py; nothing is written over that was there before.
    """
    if recipe is None:
        recipe = make_recipe({**fields, **({"base": base} if isinstance(base, str) else {})}, origin="unlearn(...)")
    elif fields:
        recipe = make_recipe({**recipe.model_dump(exclude_unset=True), **fields}, origin="unlearn(...)")
    return unlearn_many(
        [recipe], base if isinstance(base, Base) else None, resume=resume, tracker=tracker, quiet=quiet
    )[0]


def unlearn_many(
    recipes: Sequence[Recipe],
    base: Base | None = None,
    *,
    resume: bool = False,
    tracker: str | None = None,
    quiet: bool = False,
) -> list[Adapter]:
    """Train an adapter for each recipe, all in one pass over one base; each is as if it were trained alone.

    The recipes name the same base (or `base` is given, loaded), and adapters of one kind. Each adapter is saved as soon
    as it is done; with `resume`, finished ones are left as they are. See `unlearn` for the arguments and errors.
    """
    outputs = [Path(recipe.output or "out/adapter") for recipe in recipes]
    _check_together(recipes, outputs)
    for output in outputs:
        check_output(output)
    data_key, read = digest_key(), [read_sets(recipe) for recipe in recipes]
    adapters: dict[int, Adapter] = {}
    if resume and len(recipes) > 1:
        for n, output in enumerate(outputs):
            if earlier := _finished_before(output, recipes[n], keyed_digest(read[n]["forget"], data_key)):
                adapters[n] = earlier
                logger.info("%s is finished already", output)
    remaining = [n for n in range(len(recipes)) if n not in adapters]
    if not remaining:
        return [adapters[n] for n in range(len(recipes))]
    first = recipes[remaining[0]]
    live = base or load_base(first.base, first.dtype, first.device, first.quantize)
    if names := attached(live):
        raise AdapterError(f"attached to the base: {', '.join(names)}. Detach first: the bare base is the reference")
    main = int(os.environ.get("RANK", 0)) == 0
    jobs: list[Job] = []
    digests: list[dict[str, str]] = []
    with ExitStack() as locks:
        locks.enter_context(left_as_found(live.model))
        freeze(live.model)
        for n in remaining:
            check_trainable(live, recipes[n])
        locks.enter_context(live.asked_by(first.prompt_format))
        for n in remaining if main else ():
            locks.enter_context(_locked(outputs[n]))
        for n in remaining:
            rows = read[n]
            known = find_known(rows, live, recipes[n], quiet=quiet or not main)
            if recipes[n].makes_retain:
                made = make_retain(rows, live, recipes[n], known)
                rows["retain"] = _of_main_process(made.rows, live)
                logger.info("%s", made.summary())
            sets = _of_main_process(build_examples(rows, live, recipes[n], known, quiet=quiet or not main), live)
            digests.append({name: keyed_digest(row_set, data_key) for name, row_set in rows.items()})
            checkpoints = Checkpoints(outputs[n], run_digest(recipes[n], str(sorted(digests[-1].items())), live))
            if main and not resume and (aside := checkpoints.put_aside()):
                logger.warning("An unfinished run was put aside in %s (--resume would have gone on with it)", aside)
            jobs.append(Job(recipes[n], sets, checkpoints))

        def finished(trained: Trained) -> None:
            n = remaining[trained.number]
            if trained.is_main:
                save_adapter(outputs[n], trained, live, recipes[n], digests[trained.number], data_key)
                jobs[trained.number].checkpoints.clear()  # type: ignore[union-attr]
            size = folder_bytes(outputs[n]) if outputs[n].is_dir() else 0
            adapters[n] = Adapter(outputs[n], size, metrics_of(trained), trained.progress)

        output = outputs[remaining[0]]
        cache = output.with_name(output.name + ".cache")
        try:
            train(live, jobs, finished, cache_folder=cache, resume=resume, tracker=tracker, quiet=quiet)
        except PermissionError as error:
            raise _refused(output, error) from None
        if main:
            shutil.rmtree(cache, ignore_errors=True)
    return [adapters[n] for n in range(len(recipes))]


def _check_together(recipes: Sequence[Recipe], outputs: Sequence[Path]) -> None:
    """Refuse what cannot be trained in one run, before anything is loaded."""
    if len(recipes) == 1:
        return
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise RecipeError(f"each recipe needs an output of its own, these are: {', '.join(map(str, outputs))}")
    if len({(r.base, r.dtype, r.device, r.quantize) for r in recipes}) > 1:
        raise RecipeError(
            f"recipes trained at once must name one base, these are: {', '.join(r.base for r in recipes)}"
        )
    if len({r.prompt_format for r in recipes}) > 1:
        raise RecipeError("recipes trained at once must ask alike: give them one prompt_format")
    kinds = {(r.adapter.kind, getattr(r.adapter, "form", None)) for r in recipes}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{kind} {form}" if form else kind for kind, form in kinds))
        raise RecipeError(f"adapters that are trained at once must be of one kind, these are: {names}")
    for recipe in recipes:
        if getattr(recipe.adapter, "lora_dropout", 0):
            raise RecipeError(
                "adapter.lora_dropout draws other masks beside other adapters: train this recipe alone, or set it to 0"
            )
        if recipe.compile:
            raise RecipeError("compile: true cannot be combined with several adapters at once: set it to false")


def _of_main_process(made: T, base: Base) -> T:
    """Return what the main process made: answers could differ by a rounding, and processes would run apart."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return made
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=runs_on_cpu(base))  # joins the other processes, as Accelerator would later
    return broadcast_object_list([made])[0]  # type: ignore[no-any-return]


def _finished_before(output: Path, recipe: Recipe, forget_digest: str) -> Adapter | None:
    """Return the adapter that an earlier run of the same recipe on the same forget set left, if there is one."""
    if not (output / CONFIG).is_file():
        return None
    bundle = read_bundle(output)
    settings, metrics, history = (bundle.manifest.get(key, {}) for key in ("recipe", "metrics", "history"))
    digests = bundle.manifest.get("data_digests", {}).get("hmac_sha256", {})
    if settings != settings_of(recipe) or digests.get("forget") != forget_digest:
        return None
    progress = Progress(history.get("steps", []), history.get("evaluations", []), metrics.get("best_step", 0))
    return Adapter(output, bundle.bytes, metrics, progress)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other runs from writing to the same output."""
    lock = FileLock(output.with_name(output.name + ".lock"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()  # where that is refused, the lock would say that another run has it
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"another run is writing to {output}: wait for it, or choose another --output") from None
    except OSError as error:
        raise _refused(output, error) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who locks a deleted file tries anew
        lock.release()


def _refused(output: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {output} ({error.strerror}): choose a folder that this user may write to")
