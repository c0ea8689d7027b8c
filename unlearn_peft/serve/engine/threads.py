"""The thread that runs the model goes on undisturbed by the others (`benchmarks/serve_threads.py` shows by how much).

Only it computes with several processors. GNU OpenMP, as torch has it on Linux, gives each thread that computes in
parallel workers of its own, for as long as the thread lives. Where all of them together are more than there are
processors, they sleep between two operations instead of waiting busily.

And it gets Python's lock back at once. Each operation lets go of it, and another thread that runs Python keeps it for
the switch interval, 5 ms: of a small model's thousand operations each takes that long while a body is parsed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

import torch

_SWITCH_SECONDS = 5e-5

T = TypeVar("T")


def in_own_thread(run: Callable[[], T]) -> T:
    """Return what `run` does, in a thread that ends with it, and its workers with the thread."""
    done = Future[T]()

    def work() -> None:
        try:
            done.set_result(run())
        except BaseException as error:  # its caller's
            done.set_exception(error)

    thread = Thread(target=work, name="unlearn-peft loading", daemon=True)  # Ctrl-C ends the process at once
    thread.start()
    thread.join()
    return done.result()


def compute_alone() -> None:
    """Let this thread compute without workers; those that begin later have as many as they would have had."""
    threads = torch.get_num_threads()  # which also settles it for this thread, or the last line would undo the next
    torch.set_num_threads(1)  # of this thread, and of all later ones
    in_own_thread(lambda: torch.set_num_threads(threads))


def switch_quickly() -> None:
    """Let all threads of this process take turns at Python's lock more often."""
    sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
