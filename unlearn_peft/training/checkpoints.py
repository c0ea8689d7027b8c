"""The state of an unfinished run, beside its output: `OUTPUT.training/step-000020/`, each step whole or absent."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import TrainingError
from ..files.atomic import atomic_folder, delete_atomically


@dataclass
class Progress:
    """A run's figures so far; plain numbers, in nats/token, kept in checkpoints and in the manifest."""

    history: list[dict[str, float]] = field(default_factory=list)  # one a step
    evaluations: list[dict[str, float]] = field(default_factory=list)  # one each `eval_every` steps
    best_step: int = 0
    best_score: float = -math.inf
    start_score: float = -math.inf  # of the bare base
    kept: dict[str, float] = field(default_factory=dict)  # an evaluation of what is saved
    rows: dict[str, Any] = field(default_factory=dict)  # of what is saved, a `Reached`; at the end only
    scale: float = 1.0  # what is saved is so much of the best step's delta
    stopped_by: str = "steps"


@dataclass
class State:
    """All that a run needs to resume; no text and no row."""

    step: int
    adapter: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]  # history, best step, and the like: plain JSON


class Checkpoints:
    """The checkpoints of one run; `run_digest` ties them to the recipe and data that made them."""

    def __init__(self, output: Path, run_digest: str) -> None:
        self.folder = output.with_name(output.name + ".training")
        self.run_digest = run_digest

    def save(self, state: State) -> Path:
        """Write a step, then delete older ones; returns its folder."""
        folder = self.folder / f"step-{state.step:06d}"
        if not self.folder.exists():
            with suppress(OSError):  # atomic_folder explains why
                self.folder.mkdir(parents=True, mode=0o700)
        with atomic_folder(folder, replace=True) as temporary:
            save_file(state.adapter, temporary / "adapter.safetensors")
            save_file(state.best, temporary / "best.safetensors")
            optimizer = io.BytesIO()
            torch.save(state.optimizer, optimizer)  # into a file it would hide that the disk is full
            (temporary / "optimizer.pt").write_bytes(optimizer.getvalue())
            progress = {"step": state.step, "run": self.run_digest, **state.progress}
            (temporary / "progress.json").write_text(json.dumps(progress))
        for old in self._steps():
            if old != folder:
                delete_atomically(old)
        return folder

    def latest(self) -> State | None:
        """Read the newest step, or None where there is none.

        Raises:
            TrainingError: if it is damaged, or belongs to a run with another recipe or other data.
        """
        steps = self._steps()
        if not steps:
            return None
        folder = steps[-1]
        try:
            progress = json.loads((folder / "progress.json").read_text())
            state = State(
                step=progress.pop("step"),
                adapter=load_file(folder / "adapter.safetensors"),
                best=load_file(folder / "best.safetensors"),
                optimizer=torch.load(folder / "optimizer.pt", weights_only=True),
                progress=progress,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint {folder} is damaged ({type(error).__name__}). "
                "Delete it, or train again without --resume."
            ) from error
        if state.progress.pop("run") != self.run_digest:
            raise TrainingError(
                f"the checkpoint {folder} belongs to a run with another recipe, other data or another base. "
                "Resume with what it was started with, or train again without --resume."
            )
        return state

    def put_aside(self) -> Path | None:
        """Rename an unfinished run's folder to `OUTPUT.training.old`; returns it, or None where there was none."""
        if not self._steps():
            return None
        aside = self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(self.folder, aside)
        return aside

    def clear(self) -> None:
        """Delete the run's state; the finished adapter has taken its place."""
        delete_atomically(self.folder)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-[0-9]*"))


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached copies on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is finished first; a second one interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are someone else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
