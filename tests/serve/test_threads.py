"""Only the thread that runs the model has workers."""

import asyncio
import sys
import threading

import pytest
import torch

from unlearn_peft import load_base
from unlearn_peft.errors import UnlearnError
from unlearn_peft.serve.engine.base import Generation
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.engine.rows import ActiveRow
from unlearn_peft.serve.engine.threads import compute_alone, in_own_thread, switch_quickly


@pytest.fixture
def three_threads():
    """torch's setting, and this thread's, while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_thread_computes_alone_and_no_other_does(three_threads):
    def alone():
        compute_alone()
        return torch.get_num_threads()

    assert in_own_thread(alone) == 1
    assert torch.get_num_threads() == in_own_thread(torch.get_num_threads) == 3


def test_who_reads_adapters_computes_alone_and_who_runs_the_model_does_not(three_threads, tiny_folder):
    engine, seen = in_own_thread(lambda: LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")), []
    engine.bank.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        assert engine._threads.submit(torch.get_num_threads).result() == 1
        ended = threading.Event()
        lease = engine.bank.hold({})
        engine.scheduler.submit(ActiveRow(Generation((1, 2, 3), 1), lease, lambda _: None, ended.set))
        assert ended.wait(60)
        lease.release()
    finally:
        asyncio.run(engine.close())
    assert set(seen) == {3}


def test_what_a_thread_of_its_own_raises_is_raised_and_the_thread_has_gone():
    def fails():
        raise UnlearnError(threading.current_thread().name)

    with pytest.raises(UnlearnError, match="loading") as caught:
        in_own_thread(fails)
    assert str(caught.value) not in [thread.name for thread in threading.enumerate()]


def test_threads_take_turns_sooner_and_never_later():
    before = sys.getswitchinterval()
    try:
        for interval in (5e-3, 1e-6):
            sys.setswitchinterval(interval)
            switch_quickly()
            assert sys.getswitchinterval() <= min(interval, 1e-4)
    finally:
        sys.setswitchinterval(before)
