"""Adapters that must be refused, each with one clear error and nothing attached."""

import json
import shutil

import pytest
import torch
from conftest import logits, make_tiny
from safetensors.torch import load_file, save_file

from unlearn_peft import attach, load_base, read_bundle, unlearn
from unlearn_peft.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tiny, make_adapter):
    return make_adapter(tiny, "good")


def edit(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def edit_config(path, **values):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **values}))


def first(tensors):
    return next(name for name in sorted(tensors) if "lora_A" in name)


def truncate(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_instead(path):
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


CASES = {
    "pickle": (pickle_instead, "pickle can run code"),
    "truncated": (truncate, "truncated"),
    "three bytes": (lambda p: (p / WEIGHTS).write_bytes(b"abc"), "truncated"),
    "huge header": (lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"), "truncated or no safetensors"),
    "no header": (lambda p: (p / WEIGHTS).write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "damaged safetensors header"),
    "NaN": (lambda p: edit(p, lambda t: t[first(t)].fill_(float("nan"))), "NaN or infinity"),
    "infinity": (lambda p: edit(p, lambda t: t[first(t)].fill_(float("inf"))), "NaN or infinity"),
    "rank 0": (lambda p: edit_config(p, r=0), "rank r is 0"),
    "rank lied": (lambda p: edit_config(p, r=7), "its config says 7"),
    "no lora_B": (lambda p: edit(p, lambda t: t.pop(first(t).replace("lora_A", "lora_B"))), "shapes"),
    "a base weight alone": (
        lambda p: save_file({"base_model.model.lm_head.weight": torch.ones(4)}, p / WEIGHTS),
        "weights of a base and no LoRA",
    ),
    "alien key": (lambda p: edit(p, lambda t: t.update({"evil": torch.zeros(1)})), "'evil' is no LoRA weight"),
    "other method": (lambda p: edit_config(p, peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (lambda p: edit_config(p, use_dora=True), "'use_dora' is True"),
    "bad json": (lambda p: (p / "adapter_config.json").write_text("{"), "not readable JSON"),
    "list json": (lambda p: (p / "adapter_config.json").write_text("[]"), "expected a JSON object"),
    "no config": (lambda p: (p / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "nothing": (lambda p: shutil.rmtree(p), "no adapter at"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(adapter, tiny, name):
    read_bundle(adapter)  # it was good
    spoil, told = CASES[name]
    spoil(adapter)
    plain = logits(tiny)
    with pytest.raises(AdapterError) as error:
        attach(tiny, adapter)
    assert told in str(error.value)
    assert torch.equal(logits(tiny), plain)


@pytest.mark.parametrize("shape", [(), (6,), (6, 4, 1)])
def test_a_dense_delta_of_other_dimensions_is_refused(tiny, tmp_path, shape):
    save_file({"base_model.model.lm_head.dense_head_delta": torch.ones(shape)}, tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "DENSE_HEAD", "target_modules": ["lm_head"]}')
    with pytest.raises(AdapterError, match="no dense delta of two dimensions"):
        attach(tiny, tmp_path)


def test_all_mismatches_are_told_at_once(adapter, tiny):
    def spoil(tensors):
        names = sorted(n for n in tensors if "lora_A" in n)
        tensors[names[0]].fill_(float("nan"))
        tensors["evil"] = torch.zeros(1)
        del tensors[names[1].replace("lora_A", "lora_B")]

    edit(adapter, spoil)
    with pytest.raises(AdapterError) as error:
        read_bundle(adapter)
    assert all(word in str(error.value) for word in ("NaN", "evil", "shapes"))


def test_a_changed_byte_is_found_by_the_manifest(tiny, fields):
    path = unlearn(tiny, **fields).path
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (path / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match="not the file that was saved"):
        read_bundle(path)


def test_another_base_is_refused_by_fingerprint_and_by_shape(tiny, fields, tmp_path):
    path = unlearn(tiny, **fields).path
    other = load_base(str(make_tiny(tmp_path / "other", seed=9)))
    with pytest.raises(AdapterError, match="the base's weights is not the one"):
        attach(other, path)
    assert attach(other, path, allow_different_base=True)


def test_the_tiny_adapter_does_not_fit_the_real_model(adapter, smol):
    plain = logits(smol)
    with pytest.raises(AdapterError) as error:
        attach(smol, adapter)
    assert "does not match this base" in str(error.value) and "has shape (576, 576)" in str(error.value)
    assert torch.equal(logits(smol), plain)


def test_fingerprints_do_not_depend_on_float32_or_bfloat16(tiny_folder):
    from unlearn_peft.models.fingerprint import fingerprint

    prints = [
        fingerprint((b := load_base(str(tiny_folder), dtype=d)).model, b.tokenizer) for d in ("float32", "bfloat16")
    ]
    assert prints[0] == prints[1]


def test_unknown_target_modules_name_those_that_exist(tiny, fields):
    adapter = {"kind": "lora", "target_modules": ["q_porj"]}
    with pytest.raises(AdapterError, match="q_porj.*did you mean 'q_proj'.*down_proj, lm_head"):
        unlearn(tiny, **{**fields, "adapter": adapter})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nan_and_infinity_are_seen_in_every_dtype(dtype):
    from unlearn_peft.files.weights import LARGEST, largest_of

    tensor = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert largest_of(tensor) == torch.finfo(dtype).max > LARGEST
    for value in (float("nan"), float("inf"), -float("inf")):
        tensor[1, 2] = value
        assert not largest_of(tensor) <= LARGEST
    assert largest_of(torch.full((2, 2), -3.0, dtype=dtype)) == 3
