"""Adapters as PEFT's versions and other trainers write them: they do what they do elsewhere, or one clear refusal."""

import hashlib
import importlib.util
import logging
import tracemalloc
from pathlib import Path

import others
import pytest
import torch
from conftest import logits
from safetensors.torch import save_file

from unlearn_peft import attach, cli, detach, load_base, merge, read_bundle, stack
from unlearn_peft.adapters.names import factor_of, is_base_weight, weight_name
from unlearn_peft.adapters.transform.export_vllm import export_vllm
from unlearn_peft.adapters.transform.shrink import shrink
from unlearn_peft.errors import AdapterError
from unlearn_peft.files.weights import TensorDigest, digest_of, read_weights
from unlearn_peft.inference.bank import Bank

HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture
def carrying(tiny, tmp_path):
    """A LoRA on `lm_head` with the head's weight beside it."""
    folder = tmp_path / "carrying"
    folder.mkdir()
    others.beside(others.TIED)(folder, tiny.model)
    return folder


def test_what_loads_is_what_the_page_says(tiny, tmp_path):
    spec = importlib.util.spec_from_file_location("others_page", Path("docs/adapters_of_others.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.page(tiny, tmp_path)
    assert "| fails |" not in found
    assert found == module.PAGE.read_text(), "run: python docs/adapters_of_others.py"


def test_the_installed_peft_writes_no_field_that_is_not_known():
    from peft import LoraConfig

    assert LoraConfig(task_type="CAUSAL_LM").to_dict().keys() <= others.config().keys()


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], others.UNSLOTH])
@pytest.mark.parametrize("tied", [True, False])
def test_what_peft_saves_by_default_does_what_it_does_in_peft(tied, targets, tiny, tmp_path):
    from conftest import make_tiny
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny if tied else load_base(str(make_tiny(tmp_path / "untied", tied=False)))
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "saved")
    model.unload()
    plain = logits(base)
    theirs = PeftModel.from_pretrained(base.model, tmp_path / "saved")
    expected = logits(base)
    theirs.unload()
    attach(base, tmp_path / "saved")
    assert torch.allclose(logits(base), expected, atol=1e-5) and not torch.allclose(plain, expected, atol=1e-3)
    detach(base)
    assert torch.equal(logits(base), plain)
    assert bool(read_bundle(tmp_path / "saved").base_weights) == ("lm_head" in targets)


def test_base_weights_are_named_before_and_compared_when_attached(carrying, tiny, capsys, caplog, monkeypatch):
    monkeypatch.setattr("sys.argv", ["unlearn-peft", "inspect", str(carrying)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert "carries 1 base weight (lm_head.weight), compared when attached" in capsys.readouterr().out
    with caplog.at_level(logging.INFO, "unlearn_peft"):
        attach(tiny, carrying)
    assert "carries 1 base weight (lm_head.weight): equal to this base's, and left out" in caplog.text
    bundle = read_bundle(carrying)
    assert sorted(bundle.deltas) == ["lm_head", others.Q]
    assert bundle.digest == hashlib.sha256((carrying / others.WEIGHTS).read_bytes()).hexdigest()


def test_one_bit_of_a_base_weight_is_enough(tiny, tmp_path):
    def one_bit(weight):
        changed = weight.clone()
        changed.view(torch.int32)[-1, -1] ^= 1
        return changed

    (tmp_path / "bit").mkdir()
    others.beside(others.TIED, one_bit)(tmp_path / "bit", tiny.model)
    plain = logits(tiny)
    for allow in (False, True):
        with pytest.raises(AdapterError, match="was trained, or is of another base: it differs from 'lm_head.weight'"):
            attach(tiny, tmp_path / "bit", allow_different_base=allow)
    with pytest.raises(AdapterError, match="it differs from"):
        Bank.of(tiny).load("it", tmp_path / "bit")
    assert torch.equal(logits(tiny), plain)


def test_what_sees_no_base_refuses_base_weights(carrying, tiny, tiny_folder, tmp_path):
    out = tmp_path / "out"
    for run in (
        lambda: stack([carrying], out), lambda: shrink(carrying, out, rank=2), lambda: export_vllm([carrying], out),
        lambda: export_vllm([carrying], out, base=str(tiny_folder)),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match="save_embedding_layers=False"):
            run()
        assert not out.exists()
    attach(tiny, carrying)
    expected = logits(tiny)
    detach(tiny)
    merge(tiny, [carrying], out)
    assert torch.allclose(logits(load_base(str(out))), expected, atol=1e-5)


def test_a_quantised_base_cannot_be_compared(carrying, tiny):
    tiny.model.lm_head.weight = torch.nn.Parameter(torch.zeros(371, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="is quantised or not loaded"):
        read_bundle(carrying).check_fits(tiny.model)


@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theirs", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_compared_in_the_dtype_of_one_of_both(ours, theirs, tmp_path):
    weight = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))  # more than a block
    save_file({"x.weight": weight.to(theirs), "y": torch.ones(1)}, tmp_path / "w")
    read = read_weights(tmp_path / "w", [], is_base_weight)
    assert list(read.tensors) == ["y"] and read.sha256 == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    kept = read.digests["x.weight"]
    halves = {torch.bfloat16, torch.float16}
    source = weight.to(theirs) if {ours, theirs} == halves else weight
    assert kept.equals(source.to(ours))
    changed = source.clone()
    changed[-1, -1] += 0.5
    assert not kept.equals(changed.to(ours)) and not kept.equals(source.to(ours).T)
    assert kept.sha256[theirs] == digest_of(weight.to(theirs), theirs)


def test_a_digest_of_whole_numbers_equals_no_float():
    zeros = torch.zeros(4)
    assert not TensorDigest(torch.int8, (4,), {torch.int8: digest_of(zeros, torch.int8)}).equals(zeros + 1)


def test_base_weights_take_no_memory(tmp_path):
    save_file({"x.weight": torch.zeros(16_000_000), "y.lora_A.weight": torch.ones(4, 4)}, tmp_path / "w")
    tracemalloc.start()
    try:
        read = read_weights(tmp_path / "w", [], is_base_weight)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(read.digests) == ["x.weight"] and peak < 8_000_000


@pytest.mark.parametrize(
    "key, found",
    [
        ("base_model.model.a.b.lora_A.weight", ("a.b", "lora_A")),
        ("module.base_model.model.a.lora_B.my_adapter.weight", ("a", "lora_B")),
        ("_orig_mod.base_model.model._orig_mod.a._orig_mod.lora_A.weight", ("a", "lora_A")),
        ("module.lora_A.weight", ("module", "lora_A")),
        ("a.lora_embedding_A", None),
        ("a.lora_A.bias", None),
        ("a.lora_A.x.y.weight", None),
        ("lora_A.weight", None),
    ],
)
def test_names_of_factors(key, found):
    assert factor_of(key) == found


@pytest.mark.parametrize(
    "key, name",
    [
        (HEAD, "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.bias", "lm_head.bias"),
        ("base_model.model.score.modules_to_save.default.dense.weight", "score.dense.weight"),
        ("base_model.model.a.lora_A.weight", None),
        ("base_model.model.lm_head.dense_head_delta.weight", None),
        ("weight", None),
    ],
)
def test_names_of_base_weights(key, name):
    assert (weight_name(key) if is_base_weight(key) else None) == name
