"""Attach, stack, swap, strength, detach: on the tiny model, and on the real one."""

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import logits

from unlearn_peft import Trust, attach, attached, detach, forgetting, load_base, merge, read_bundle, stack, swap
from unlearn_peft.errors import AdapterError
from unlearn_peft.models.layers import head_is_tied


def through_peft(base, path, text="Who wrote the blue book about stars?"):
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, path)
    out = logits(base, text)
    model.unload()
    base.model.__dict__.pop("peft_config", None)
    return out


@pytest.fixture(params=["tiny", "smol"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def two(base, make_adapter):
    a = make_adapter(base, "a", targets=("q_proj", "down_proj"), r=4, seed=1, scale=0.02)
    b = make_adapter(base, "b", targets=("lm_head", "q_proj"), r=3, seed=2, scale=0.02)
    return a, b


def test_attach_equals_peft_and_removal_is_bit_equal(base, two):
    plain = logits(base)
    for path in two:
        expected = through_peft(base, path)
        attach(base, path)
        got = logits(base)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (got - plain).abs().max() > 1e-2
        detach(base)
        assert torch.equal(logits(base), plain)
    assert not [m for m in base.model.modules() if m._forward_hooks]


def test_a_stack_is_the_sum_of_the_deltas_in_any_order(base, two, tmp_path):
    """Each linear layer's output changes by the sum of what either adapter changes it by."""
    x = {}
    names = [name for name in {**read_bundle(two[0]).deltas, **read_bundle(two[1]).deltas}]
    modules = dict(base.model.named_modules())
    torch.manual_seed(0)
    for name in names:
        x[name] = torch.randn(5, modules[name].in_features)

    def outputs():
        with torch.no_grad():
            return {name: modules[name](x[name]) for name in names}

    plain = outputs()
    with forgetting(base, two[0]):
        first = outputs()
    with forgetting(base, two[1]):
        second = outputs()
    with forgetting(base, *two):
        both, text = outputs(), logits(base)
    for name in names:
        expected = (first[name] - plain[name]) + (second[name] - plain[name])
        got = both[name] - plain[name]
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, both[name].abs().max().item())
    with forgetting(base, two[1], two[0]):
        assert torch.equal(logits(base), text)
    written = stack(two, tmp_path / "stacked")
    with forgetting(base, written):
        torch.testing.assert_close(logits(base), text, rtol=0, atol=1e-5 * text.abs().max().item())
    expected = through_peft(base, written)
    assert (expected - text).abs().max() <= 1e-5 * text.abs().max()


def test_with_block_restores_what_was_there_even_after_an_error(tiny, make_adapter):
    a, b = make_adapter(tiny, "a", seed=1), make_adapter(tiny, "b", seed=2)
    attach(tiny, a, strength=0.5)
    held = logits(tiny)
    with pytest.raises(ZeroDivisionError), forgetting(tiny, b):
        assert attached(tiny) == {"a": 0.5, "b": 1.0}
        raise ZeroDivisionError
    assert attached(tiny) == {"a": 0.5} and torch.equal(logits(tiny), held)


def test_strength_scales_the_effect(tiny, make_adapter):
    a = make_adapter(tiny, "a", targets=("lm_head",))
    plain = logits(tiny)
    with forgetting(tiny, a):
        full = logits(tiny) - plain
    for strength in (0.0, 0.25, 1.5, -1.0):
        with forgetting(tiny, a, strength=strength):
            torch.testing.assert_close(logits(tiny) - plain, strength * full, rtol=1e-4, atol=1e-4)


def test_swap_and_refusals_leave_things_as_they_were(tiny, make_adapter, tmp_path):
    a, b = make_adapter(tiny, "a", seed=1), make_adapter(tiny, "b", seed=2)
    assert attach(tiny, a) == ["a"]
    with pytest.raises(AdapterError, match="attached already"):
        attach(tiny, a)
    with pytest.raises(AdapterError, match="no adapter at"):
        swap(tiny, "a", tmp_path / "none")
    with pytest.raises(AdapterError, match="did you mean 'a'|attached: a"):
        detach(tiny, "aa")
    with pytest.raises(AdapterError, match="2 strengths for 1"):
        attach(tiny, b, strength=[1, 2])
    assert attached(tiny) == {"a": 1.0}
    assert swap(tiny, "a", b) == "b" and attached(tiny) == {"b": 1.0}
    with_b, read = logits(tiny), read_bundle(a)
    with pytest.raises(AdapterError, match="no adapter named 'a' is attached"):
        swap(tiny, "a", read)
    with pytest.raises(AdapterError, match="it has no signature"):
        swap(tiny, "b", read, trust=Trust({}))
    assert attached(tiny) == {"b": 1.0} and torch.equal(logits(tiny), with_b)
    shutil.rmtree(a)  # what was read needs its files no more
    assert swap(tiny, "b", read) == "a" and attached(tiny) == {"a": 1.0}
    assert not torch.equal(logits(tiny), with_b)
    detach(tiny)


def test_works_on_a_plain_transformers_model(tiny, make_adapter):
    a = make_adapter(tiny, "a")
    plain = logits(tiny)
    with forgetting(tiny.model, a):
        assert not torch.equal(logits(tiny), plain)
    assert torch.equal(logits(tiny), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_merge_equals_attach_and_spares_the_embeddings(tmp_path, tied, make_adapter, caplog):
    from conftest import make_tiny

    base = load_base(str(make_tiny(tmp_path / "base", tied=tied)))
    embeddings = base.model.get_input_embeddings().weight.clone()
    a = make_adapter(base, "a", targets=("q_proj", "lm_head"))
    with forgetting(base, a):
        expected = logits(base)
    with caplog.at_level(logging.WARNING):
        folder = merge(base, [a], tmp_path / "merged")
    assert ("untied" in caplog.text) == tied
    merged = load_base(str(folder))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.model.get_input_embeddings().weight, embeddings)
    assert not head_is_tied(merged.model)
    with pytest.raises(Exception, match="not empty"):
        merge(base, [a], folder)


def test_merge_keeps_the_tie_where_the_head_is_not_touched(tmp_path, make_adapter):
    from conftest import make_tiny

    base = load_base(str(make_tiny(tmp_path / "base")))
    a = make_adapter(base, "a", targets=("q_proj",))
    assert head_is_tied(load_base(str(merge(base, [a], tmp_path / "merged"))).model)


@pytest.mark.long
def test_loads_with_plain_peft_in_a_process_without_this_package(tiny, tiny_folder, fields, tmp_path):
    from unlearn_peft import unlearn

    for kind in ("lora", "head"):
        objective = {"forget_ceiling": 15, "stop_when": None, "retain_budget": None}
        path = unlearn(tiny, **{**fields, "adapter": kind, "objective": objective, "output": str(tmp_path / kind)}).path
        with forgetting(tiny, path):
            expected = logits(tiny)
        code = f"""
import sys, torch, json
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tiny_folder)!r}), {str(path)!r})
ids = AutoTokenizer.from_pretrained({str(tiny_folder)!r})("Who wrote the blue book about stars?", return_tensors="pt")
assert not [m for m in sys.modules if m.startswith("unlearn_peft")]
print(json.dumps(model(**ids).logits[0, -1].tolist()))
"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        got = torch.tensor(json.loads(out.stdout.splitlines()[-1]))
        torch.testing.assert_close(got, expected[0, -1], rtol=1e-4, atol=1e-4)


def test_stack_refuses_dense(tiny, fields, tmp_path):
    from unlearn_peft import unlearn

    path = unlearn(tiny, **{**fields, "adapter": {"kind": "head", "form": "dense"}}).path
    with pytest.raises(AdapterError, match="dense"):
        stack([path, path], tmp_path / "s")
