"""Bases of 8 and 4 bits a weight: adapters are trained on them, saved and attached, and they stay as they were."""

import importlib.util

import pytest
import torch
from conftest import logits
from test_train import FREE

from unlearn_peft import Bank, attach, detach, load_base, unlearn
from unlearn_peft.adapters.transform.merge import merge
from unlearn_peft.errors import AdapterError, BaseModelError
from unlearn_peft.models.quantization import METHODS


def quantized(folder, way, dtype="float32", device="cpu"):
    if importlib.util.find_spec(METHODS[way]) is None:
        pytest.skip(f"{METHODS[way]} is not installed: pip install 'unlearn-peft[quantized]'")
    return load_base(str(folder), dtype, device, way)


def stored(model):
    """Copies of what parameters hold, of torchao's too."""
    return [getattr(p, "qdata", p).clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("way", "adapter", "dtype"),
    [
        ("int8", "lora", "float32"),
        ("int8", "lora", "bfloat16"),
        ("int8", "head", "float32"),
        ("int8", {"kind": "head", "form": "dense"}, "float32"),
        ("llm_int8", "lora", "float32"),
        ("nf4", "lora", "float32"),
        ("nf4", "head", "bfloat16"),
    ],
)
def test_forgets_on_a_quantised_base_and_leaves_it_as_it_was(tiny_folder, fields, way, adapter, dtype):
    base = quantized(tiny_folder, way, dtype)
    assert type(base.model.model.layers[1].mlp.up_proj.weight).__name__ in ("Int8Tensor", "Int8Params", "Params4bit")
    assert base.fingerprint["weights"] is None and base.quantized and "0x" not in base.quantized
    before, text = stored(base.model), logits(base)
    result = unlearn(base, **{**fields, "adapter": adapter, "objective": FREE, "steps": 20})
    assert result.metrics["forget_loss"] > result.metrics["forget_loss_base"] + 0.1
    assert all(map(torch.equal, before, stored(base.model))) and torch.equal(logits(base), text)
    attach(base, result)
    assert not torch.equal(logits(base), text)
    detach(base)
    assert torch.equal(logits(base), text)


def test_such_an_adapter_attaches_to_the_base_in_full_precision_too(tiny, tiny_folder, fields):
    text = logits(tiny)
    attach(tiny, unlearn(quantized(tiny_folder, "int8"), **fields))
    assert not torch.equal(logits(tiny), text)


@pytest.mark.parametrize("way", METHODS)
@torch.no_grad()
def test_rows_have_sets_of_their_own_on_a_quantised_base(tiny, tiny_folder, make_adapter, way):
    paths = {name: make_adapter(tiny, name, targets=("q_proj", "up_proj"), seed=n) for n, name in enumerate("ab")}
    base = quantized(tiny_folder, way)
    bank, ids = Bank.of(base), torch.tensor([[5, 6, 7]] * 3)
    for name, path in paths.items():
        bank.load(name, path)
    plain = base.model(ids).logits
    with bank.rows([["a"], [], ["a", "b"]]):
        mixed = base.model(ids).logits
    assert torch.equal(mixed[1], plain[1])
    for n, chosen in ((0, ["a"]), (2, ["a", "b"])):
        with bank.rows([chosen]):
            alone = base.model(ids).logits[0]
        torch.testing.assert_close(mixed[n], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
        assert (alone - plain[0]).abs().max() > 1e-2


def test_nothing_is_merged_into_a_quantised_base(tiny, tiny_folder, make_adapter, tmp_path):
    adapter = make_adapter(tiny, "some")
    with pytest.raises(AdapterError, match="quantised.*without quantize"):
        merge(quantized(tiny_folder, "int8"), [adapter], tmp_path / "merged")


@pytest.mark.parametrize("way", METHODS)
def test_a_missing_library_is_named_with_what_installs_it(tiny_folder, way, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in METHODS.values() else find(name)
    )
    with pytest.raises(BaseModelError, match=rf"{METHODS[way]}.*not installed.*unlearn-peft\[quantized\]"):
        load_base(str(tiny_folder), quantize=way)


def test_an_unknown_way_is_refused_with_those_that_there_are(tiny_folder):
    with pytest.raises(BaseModelError, match="int3.*int8, llm_int8, nf4"):
        load_base(str(tiny_folder), quantize="int3")
