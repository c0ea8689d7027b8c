"""A base shared out between two processes on CPUs gives the adapter that one process gives, and stays as it was."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import cli, together
from test_train import RMU, _recipe, assert_same

from unlearn_peft import read_bundle
from unlearn_peft.errors import RecipeError
from unlearn_peft.training.step.sharding import is_sharded

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
import faulthandler, os, signal, time
faulthandler.dump_traceback_later(200, exit=True)  # processes that wait for each other
import torch
from accelerate import PartialState
from unlearn_peft.training import run
from unlearn_peft.cli import main
from unlearn_peft.training.trainer import Training
{told}
assert PartialState().num_processes == 2
step, train = Training.one_step, run.train

def one_step(self):
    assert self.accelerator.distributed_type.value == "{way}" and self.sharded is not None
    if "{way}" == "FSDP":
        layers = [p for n, p in self.sharded.named_parameters() if ".layers." in n and not p.requires_grad]
        assert all(p.to_local().numel() <= 0.51 * p.numel() for p in layers)
    if str(self.trainers[0].step) == os.environ.get("STOP_AT") and PartialState().is_main_process:
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
DENSE = {"adapter": {"kind": "head", "form": "dense"}}
long, slow = pytest.mark.long, pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "more", "sets"),
    [
        pytest.param(
            "FSDP", {}, ["gradient_accumulation_steps=2"], id="FSDP, parts without a row of one's own", marks=long
        ),
        pytest.param(
            "FSDP", RMU, ["forget_batch=1"], id="FSDP, evaluations too, and a layer without a gradient", marks=long
        ),
        pytest.param("DEEPSPEED", {}, ["forget_batch=1", "gradient_accumulation_steps=2"], id="DEEPSPEED"),
        pytest.param("FSDP", {"adapter": "head"}, [], id="FSDP, head", marks=slow),
        pytest.param("FSDP", DENSE, [], id="FSDP, dense head", marks=slow),
        pytest.param("FSDP", {}, ["gradient_checkpointing=true"], id="FSDP, checkpointing", marks=slow),
        pytest.param("DEEPSPEED", RMU, [], id="DEEPSPEED, rmu", marks=slow),
        pytest.param("DEEPSPEED", DENSE, [], id="DEEPSPEED, dense head", marks=slow),
    ],
)
def test_two_processes_that_share_the_base_out_give_the_same_adapter_as_one(tmp_path, tiny_folder, way, more, sets):
    if way == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    recipe = _recipe(tmp_path, tiny_folder, steps=6, **more)
    train = ("train", recipe, *(f"--set={value}" for value in sets))
    one = cli(*train, "--output", tmp_path / "one", OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    (tmp_path / "half.py").write_text(SCRIPT.format(way=way, told=TOLD[way]))
    settings = {
        f"ACCELERATE_USE_{way}": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }  # fmt: skip
    train, half = (*train, "--output", tmp_path / "two"), tmp_path / "half.py"
    stopped = together(2, *train, script=half, **settings, STOP_AT="3")
    assert all(one.returncode for one in stopped) and not (tmp_path / "two").exists(), stopped[0].stderr
    assert any("--resume" in one.stderr for one in stopped), stopped[0].stderr
    for one in together(2, *train, "--resume", script=half, **settings):
        assert one.returncode == 0, one.stderr
    assert_same(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=5e-4)
    found, expected = (read_bundle(tmp_path / name).manifest for name in ("two", "one"))
    losses = [[step["forget_loss"] for step in m["history"]["steps"]] for m in (found, expected)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    for key in ("forget_loss", "answer_probability", "best_step"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-3)


def _accelerator(way, **plugin):
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if way == "FSDP":
        plugin = {"fsdp_plugin": FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})}
    elif way == "DEEPSPEED":
        plugin = {"deepspeed_plugin": SimpleNamespace(**{"zero_stage": 3, "offload_param_device": "none", **plugin})}
    return SimpleNamespace(
        distributed_type=DistributedType(way), state=SimpleNamespace(**plugin), is_main_process=True,
        mixed_precision="no",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("way", "plugin", "told"),
    [
        ("FSDP", {"fsdp_version": 1}, "fsdp_version: 2.*fsdp2.yaml"),
        ("FSDP", {"cpu_offload": True}, "fsdp_offload_params: false"),
        ("FSDP", {"activation_checkpointing": True}, "gradient_checkpointing: true"),
        ("DEEPSPEED", {"zero_stage": 2}, "zero_stage: 3.*deepspeed_zero3.yaml"),
        ("DEEPSPEED", {"offload_param_device": "cpu"}, "offload_param_device: none"),
        ("MEGATRON_LM", {}, "launch with one of recipes/accelerate"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_with_those_that_can(tiny, way, plugin, told):
    with pytest.raises(RecipeError, match=told):
        is_sharded(_accelerator(way, **plugin), tiny)
    if way != "MEGATRON_LM":
        assert is_sharded(_accelerator(way), tiny)
        half = _accelerator(way)
        half.mixed_precision = "fp16"
        with pytest.raises(RecipeError, match="bfloat16"):
            is_sharded(half, tiny)
    assert not is_sharded(_accelerator("MULTI_GPU"), tiny)


def test_fsdp_on_cpus_is_told_to_share_nothing_out(tiny, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_sharded(_accelerator("MULTI_CPU"), tiny)
    assert "shares no base out between CPUs" in caplog.text


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_takes_the_recipes(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = Path(__file__).parents[2] / "recipes" / "accelerate" / f"{name}.yaml"
    assert len(path.read_text().splitlines()) < 40
    line = ["--config_file", str(path), "-m", "unlearn_peft.cli", "train", "recipe.yaml"]
    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    kinds = {"ddp": given.multi_gpu, "fsdp2": given.use_fsdp, "deepspeed_zero3": given.use_deepspeed}
    assert [kind for kind, chosen in kinds.items() if chosen] == [name] and given.num_processes == 2
    if name == "fsdp2":
        told = prepare_multi_gpu_env(given)
        assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2"
        assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert told["FSDP_OFFLOAD_PARAMS"] == told["FSDP_ACTIVATION_CHECKPOINTING"] == "false"
    if name == "deepspeed_zero3":
        assert (given.zero_stage, given.offload_param_device) == (3, "none")
