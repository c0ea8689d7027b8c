"""A base shared out between two processes on CPUs gives the adapter that one process gives, and stays as it was."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from test_train import _cli, _recipe, assert_same

from unlearn_peft import read_bundle

# Accelerate shares nothing out between CPUs (AcceleratorState looks for the kinds of GPUs only). Told that these
# processes are of such a kind it does, by the same code and on the CPU; DeepSpeed only has to be told of gloo.
TOLD = {
    "FSDP": """
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
""",
    "DEEPSPEED": 'PartialState(backend="gloo")\n',
}
SCRIPT = """
import os, signal, time
import torch
from accelerate import PartialState
from unlearn_peft import run
from unlearn_peft.cli import main
from unlearn_peft.train import Training
{told}
assert PartialState().num_processes == 2
step, train = Training.one_step, run.train

def one_step(self):
    assert self.accelerator.distributed_type.value == "{way}" and self.whole is not None
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in self.whole.parameters())
    all_of_it = sum(p.numel() for p in self.base.model.parameters())
    assert held < 0.7 * all_of_it, (held, all_of_it)
    if str(self.learners[0].step) == os.environ.get("STOP_AT") and PartialState().is_main_process:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    return step(self)

def and_look(base, *rest, **more):
    before = {{name: p.clone() for name, p in base.model.named_parameters()}}
    kinds = [type(m) for m in base.model.modules()]
    try:
        train(base, *rest, **more)
    finally:
        after = dict(base.model.named_parameters())
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert kinds == [type(m) for m in base.model.modules()]

Training.one_step, run.train = one_step, and_look
main()
"""
CASES = {
    "lora": {},
    "head": {"adapter": "head"},
    "dense head": {"adapter": {"kind": "head", "form": "dense"}},
    "rmu": {"objective": {"name": "rmu", "hidden_layer": 0, "retain_budget": None}, "adapter": {"layers": "all"}},
}


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_the_base_out_give_the_same_adapter_as_one(tmp_path, tiny_folder, way, case):
    if way == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    recipe = _recipe(tmp_path, tiny_folder, steps=6, **CASES[case])
    one = _cli("train", recipe, "--output", tmp_path / "one")
    assert one.wait(300) == 0, one.stderr.read()
    (tmp_path / "half.py").write_text(SCRIPT.format(way=way, told=TOLD[way]))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "half.py")
    settings = {
        f"ACCELERATE_USE_{way}": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }  # fmt: skip
    stopped = _cli("train", recipe, "--output", tmp_path / "two", launch=launch, **settings, STOP_AT="3")
    _, errors = stopped.communicate(timeout=300)
    assert stopped.returncode and "--resume" in errors and not (tmp_path / "two").exists(), errors
    two = _cli("train", recipe, "--output", tmp_path / "two", "--resume", launch=launch, **settings)
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    assert_same(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=5e-4)
    found, expected = (read_bundle(tmp_path / name).manifest for name in ("two", "one"))
    losses = [[step["forget_loss"] for step in m["history"]["steps"]] for m in (found, expected)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    for key in ("forget_loss", "answer_probability", "best_step"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-3)
