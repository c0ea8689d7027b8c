"""General ability: tasks of EleutherAI's lm-evaluation-harness on a live base -> one `Score` for each task and metric.

Tasks are read before anything is measured. The harness prompts without a chat template (as published figures do),
writes no files, keeps no copy of local data and logs nothing. Hub data sets go into the Hugging Face cache, as always.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UnlearnError, did_you_mean
from ..models.base import Base
from .score import RESAMPLES, SEED, Score, bootstrap, extra

PREFIX = "lm_eval:"
_SHARES = ("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "em", "quasi_exact_match")
_UNITS = {"perplexity": "perplexity", "word_perplexity": "per word", "byte_perplexity": "per byte",
          "bits_per_byte": "bits/byte"}  # fmt: skip
_LOCAL = ("json", "csv", "parquet", "text", "arrow")  # values of a task's `dataset_path` that are formats of files
_TWO_SIDED = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Ability:
    """Tasks of the harness, read and ready to be run on any state of a base."""

    names: tuple[str, ...]  # of the tasks and groups
    limit: int | None  # use only the first rows of each task
    tasks: tuple[Any, ...]  # the harness's own objects
    manager: Any  # the harness's index of tasks

    def measure(self, base: Base, *, batch_size: int = 8) -> list[Score]:
        """Run the tasks on a base in the state that it is in; what the harness switches is switched back.

        A group that has a figure of its own gives that, other groups those of their tasks. Figures that are not finite
        numbers are left out.
        """
        tokenizer = copy.deepcopy(base.tokenizer)  # the harness may change its padding
        with _isolated([base.device] if base.device.type == "cuda" else []):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            model = HFLM(pretrained=base.model, tokenizer=tokenizer, batch_size=batch_size)
            results = simple_evaluate(
                model, tasks=list(self.tasks), task_manager=self.manager, limit=self.limit, bootstrap_iters=RESAMPLES
            )
            return [score for task in self.tasks for score in _scores(task, results)]


def read_tasks(names: Sequence[str], paths: Sequence[Path] = (), limit: int | None = None) -> Ability:
    """Read tasks by name, or from a YAML file, with their data.

    `names` are tasks, groups or tags of the harness or of `paths`, or a task's YAML file; code that a YAML names runs.
    `paths` are folders with task YAMLs (or a file in one), which go before the harness's own; data files lie beside the
    YAML that names them. `limit`: use only the first rows of each task.

    Raises:
        UnlearnError: if the extra `lm-eval` is not installed, a task is unknown, or its data cannot be read.
    """
    for path in paths:
        if not path.exists():
            raise UnlearnError(f"no tasks at {path}: expected a folder with task YAML files of lm-evaluation-harness")
    folders = [path if path.is_dir() else path.parent for path in paths]
    unique = tuple(dict.fromkeys(names))
    with _isolated():
        for module in ("lm_eval", "lm_eval.models.huggingface"):
            extra(module, "lm-eval")
        manager = _manager(unique, folders)
        tasks = tuple(task for name in unique for task in _read(manager, name))
        return Ability(tuple(getattr(task, "task_name", None) or task.name for task in tasks), limit, tasks, manager)


def _manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """Return the harness's index of tasks, with its own thousands, which take ten seconds, only if they are needed."""
    from lm_eval.tasks import TaskManager

    indexed = [name for name in names if not (name.endswith(".yaml") and Path(name).is_file())]
    manager = TaskManager(include_path=[*folders], include_defaults=False)
    if set(indexed) - set(manager.all_tasks):
        manager = TaskManager(include_path=[*folders])
    if unknown := [name for name in indexed if name not in manager.task_index]:
        listed = ", ".join(f"'{name}'{did_you_mean(name, manager.all_tasks)}" for name in unknown)
        raise UnlearnError(
            f"lm-evaluation-harness knows no task {listed}. `lm-eval ls tasks` lists its own; for your own, name their "
            "folder with --lm-eval-path, or the YAML file instead of the task (one that is no valid YAML is not seen)"
        )
    return manager


def _read(manager: Any, name: str) -> list[Any]:
    """Return what a name stands for: a task, a group, or a tag's tasks."""
    try:
        with _local_data():
            loaded = manager.load([name])
    except Exception as error:  # of yaml, jinja, datasets, the Hub, or a task's own code
        # a message may quote data; those about files and the network do not
        reason = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else type(error).__name__
        raise UnlearnError(
            f"the task '{name}' of lm-evaluation-harness cannot be read ({reason}): check its YAML, its data files "
            "(named as seen from the YAML's folder) and, for the Hub's data sets, the network"
        ) from error
    groups = loaded["groups"].values()
    subgroups = {child for group in groups for child in group.child_names}
    return [group for group in groups if group.name not in subgroups] or list(loaded["tasks"].values())


@contextlib.contextmanager
def _local_data() -> Iterator[None]:
    """Let tasks name data files as seen from their YAML, and read them into memory, leaving no copy on disk.

    The harness reads a task's data while it makes the task, whether it was named, or is of a tag, a group, a YAML file
    or inline in a group, and has no setting for all of these: its `download` is replaced meanwhile.
    """
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download
    with tempfile.TemporaryDirectory() as cache:

        def download_beside_yaml(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            options = dict(dataset_kwargs or {})
            if task.DATASET_PATH in _LOCAL:
                folder = Path((task.config.metadata or {}).get("config_source", "inline")).parent
                options |= {"cache_dir": cache, "keep_in_memory": True}
                if "data_files" in options:
                    options["data_files"] = _seen_from(folder, options["data_files"])
            download(task, options or None, **kwargs)

        ConfigurableTask.download = download_beside_yaml
        try:
            yield
        finally:
            ConfigurableTask.download = download


def _seen_from(folder: Path, files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _seen_from(folder, part) for split, part in files.items()}
    if isinstance(files, list):
        return [_seen_from(folder, part) for part in files]
    return str(folder / files) if isinstance(files, str) and (folder / files).is_file() else files


def _scores(task: Any, results: Mapping[str, Any]) -> list[Score]:
    """Return the figures of a task, or of a group or its tasks."""
    from lm_eval.api.group import Group

    if isinstance(task, Group):
        if not task.has_aggregation:
            return [score for child in task for score in _scores(child, results)]
        name, aggregation = task.name, {}
    else:
        name, aggregation = task.task_name, task.aggregation()
    figures, better = results["results"][name], results["higher_is_better"].get(name) or {}
    scores = []
    for key, value in figures.items():
        metric, comma, answer_filter = key.partition(",")  # as in `acc,none`
        if not comma or metric.endswith("_stderr") or not _finite(value):
            continue
        unit = "share of questions" if metric in _SHARES else _UNITS.get(metric, "score")
        samples = results["samples"].get(name, [])
        rows = [row[metric] for row in samples if row["filter"] == answer_filter and metric in row]
        error = figures.get(f"{metric}_stderr,{answer_filter}")
        low, high = _interval(value, error, unit, rows, aggregation.get(metric))
        label = f"{PREFIX}{name}:{metric}" + ("" if answer_filter == "none" else f",{answer_filter}")
        n = len(rows) or figures["sample_len"]
        scores.append(Score(label, float(value), unit, n, low, high, better.get(metric) is not False))
    return scores


def _interval(value: float, error: Any, unit: str, rows: Sequence[Any], aggregate: Any) -> tuple[float, float]:
    """Return a 95 % interval: normal, from the harness's standard error.

    Without one, the percentile bootstrap over rows by the task's own aggregation; of a single row a share may be
    anything.
    """
    share = unit.startswith("share")
    if _finite(error):
        low, high = value - _TWO_SIDED * error, value + _TWO_SIDED * error
        return (max(low, 0.0), min(high, 1.0)) if share else (low, high)
    if len(rows) > 1 and aggregate:
        return bootstrap(lambda drawn: aggregate([rows[int(n)] for n in drawn]), np.arange(float(len(rows))), seed=SEED)
    return (0.0, 1.0) if share else (value, value)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating)) and math.isfinite(value)


@contextlib.contextmanager
def _isolated(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Keep the harness from printing and logging, and restore all random generators, which it seeds and uses.

    On a terminal its progress bars stay.
    """
    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=list(devices)), contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)
