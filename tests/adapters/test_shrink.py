"""Smaller adapters: what they lose, who can read them, and packed weights that lie."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import logits
from safetensors.torch import load_file, save_file

from unlearn_peft import attach, detach, read_bundle, unlearn
from unlearn_peft.adapters.quantized import pack, packed_matrices
from unlearn_peft.adapters.transform.export_vllm import export_vllm
from unlearn_peft.adapters.transform.shrink import shrink
from unlearn_peft.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tiny, make_adapter):
    return make_adapter(tiny, "a", r=8)


def changes(path):
    """Each module's whole change, as a matrix."""
    return {
        name: delta.scale * (delta.up.float() if delta.down is None else delta.up.float() @ delta.down.float())
        for name, delta in read_bundle(path).deltas.items()
    }


def with_it(tiny, path):
    attach(tiny, path)
    changed = logits(tiny)
    detach(tiny)
    return changed


@pytest.mark.parametrize("bits, most", [(8, 0.01), (4, 0.17)])
@pytest.mark.parametrize("shape", [(8, 32), (3, 64), (2, 200), (1, 2), (5, 33)])
@pytest.mark.parametrize("side", ["lora_A", "lora_B", "dense_head_delta"])
def test_a_packed_matrix_comes_back_nearly(bits, most, shape, side):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    problems = []
    stored = pack(f"m.{side}", matrix.T if side == "lora_B" else matrix, bits)
    found = packed_matrices(stored, problems)[f"m.{side}.weight"].unpack()
    assert not problems and found.is_contiguous()
    assert (found - (matrix.T if side == "lora_B" else matrix)).norm() / matrix.norm() < most
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= matrix.numel() + 2 * sum(shape) * 2
    zeros = packed_matrices(pack(f"m.{side}", torch.zeros(2, 64), bits), [])[f"m.{side}.weight"]
    assert zeros.unpack().abs().max() == zeros.largest == 0


@pytest.mark.parametrize("how", [{"bits": 8}, {"bits": 4}, {"rank": 4}, {"rank": 2, "bits": 8}, {"rank": 1, "bits": 4}])
def test_what_is_lost_is_told_truly_and_it_attaches(tiny, adapter, tmp_path, how):
    made = shrink(adapter, tmp_path / "small", **how)
    before, after = changes(adapter), changes(made.path)
    assert before.keys() == after.keys() == made.errors.keys()
    for name, error in made.errors.items():
        assert error == pytest.approx(
            float((after[name] - before[name]).norm() / before[name].norm()), rel=1e-3, abs=1e-6
        )
    assert made.worst[1] == max(made.errors.values())
    manifest = read_bundle(made.path).manifest["shrunk"]
    assert manifest["worst"]["relative_error"] == made.worst[1]
    assert manifest["weights_sha256"] == read_bundle(adapter).digest
    full, small = with_it(tiny, adapter), with_it(tiny, made.path)
    assert (small - full).norm() < (logits(tiny) - full).norm()  # nearer to the adapter than the base is
    if how == {"bits": 8}:
        assert made.worst[1] < 0.02 and (small - full).norm() < 0.02 * (logits(tiny) - full).norm()


def test_ranks_are_cut_as_well_as_can_be_and_peft_reads_it(tiny, adapter, tmp_path):
    from peft import PeftModel

    made = shrink(adapter, tmp_path / "small", rank=3)
    for name, whole in changes(adapter).items():
        values = torch.linalg.svdvals(whole)
        assert made.errors[name] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3)
    expected = with_it(tiny, made.path)
    tiny.model = PeftModel.from_pretrained(tiny.model, made.path)
    assert torch.allclose(logits(tiny), expected, atol=1e-4)
    assert shrink(adapter, tmp_path / "same", rank=64).worst[1] < 1e-5


def test_others_refuse_packed_weights_instead_of_passing_over_them(tiny, adapter, tmp_path):
    from peft import PeftModel

    made = shrink(adapter, tmp_path / "small", bits=4)
    with pytest.raises(KeyError, match="LORA_QUANTIZED"):
        PeftModel.from_pretrained(tiny.model, made.path)
    with pytest.raises(KeyError, match="LORA_QUANTIZED"):
        tiny.model.load_adapter(str(made.path))
    exported = export_vllm([made.path], tmp_path / "vllm").path
    assert torch.allclose(with_it(tiny, exported), with_it(tiny, made.path), atol=1e-4)


@pytest.mark.parametrize("how", [{"bits": 8}, {"bits": 4}, {"rank": 16}, {"rank": 16, "bits": 8}])
def test_a_dense_head_is_packed_or_becomes_a_lora(tiny, fields, tmp_path, how):
    path = unlearn(tiny, **{**fields, "adapter": {"kind": "head", "form": "dense"}}).path
    made = shrink(path, tmp_path / "small", **how)
    (before,), (after,) = changes(path).values(), changes(made.path).values()
    assert made.worst[1] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-2, abs=1e-6)
    assert made.worst[1] < (0.9 if "rank" in how else 0.2)
    with_it(tiny, made.path)


def test_what_cannot_be_done_is_told(adapter, tmp_path):
    for how, told in (
        ({}, "nothing to do"), ({"bits": 5}, "expected 8 or 4"), ({"rank": 0}, "at least 1"),
        ({"rank": 1, "max_error": 0.01}, "more than 0.01"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=told):
            shrink(adapter, tmp_path / "small", **how)
    assert not (tmp_path / "small").exists()


# --- packed weights that lie ------------------------------------------------------------------------------------------


def edit(change):
    def spoil(path):
        tensors = load_file(path / WEIGHTS)
        change(tensors, sorted(key for key in tensors if key.endswith("int4"))[0].removesuffix(".int4"))
        save_file(tensors, path / WEIGHTS)

    return spoil


def config(**values):
    def spoil(path):
        old = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**old, **values}))

    return spoil


HOSTILE = {
    "no scales": (edit(lambda t, n: t.pop(f"{n}.scales")), "expected one for 64 values"),
    "no values": (edit(lambda t, n: t.pop(f"{n}.int4")), "has no values beside it"),
    "few scales": (edit(lambda t, n: t.update({f"{n}.scales": torch.ones(1, 1).half()})), "expected one for 64 values"),
    "wide scales": (edit(lambda t, n: t.update({f"{n}.scales": t[f"{n}.scales"].float()})), "another dtype than F16"),
    "NaN": (edit(lambda t, n: t[f"{n}.scales"].fill_(float("nan"))), "NaN or infinity"),
    "huge": (edit(lambda t, n: t[f"{n}.scales"].fill_(9000)), "unpacks to"),
    "floats": (edit(lambda t, n: t.update({f"{n}.int4": t[f"{n}.int4"].float()})), "is no packed weight"),
    "int8 in U8": (edit(lambda t, n: t.update({f"{n}.int8": t.pop(f"{n}.int4")})), "is no packed weight"),
    "twice": (
        edit(lambda t, n: t.update({f"{n}.int8": torch.zeros(len(t[f"{n}.int4"]), 32, dtype=torch.int8)})),
        "packed twice",
    ),
    "vector": (edit(lambda t, n: t.update({f"{n}.int4": t[f"{n}.int4"].view(-1)})), "expected one for 64 values"),
    "alien": (edit(lambda t, n: t.update({"evil.int8": torch.zeros(1, 64, dtype=torch.int8)})), "expected one for 64"),
    "no LoRA": (
        edit(lambda t, n: t.update({"x.int8": torch.ones(1, 2).to(torch.int8), "x.scales": torch.ones(1, 1).half()})),
        "is no LoRA weight",
    ),
    "rank lied": (config(r=7), "says 7"),
    "said to be plain": (config(peft_type="LORA"), "has dtype 'U8'"),
    "said to be dense": (config(peft_type="DENSE_HEAD_QUANTIZED"), "no dense delta"),
    "another kind": (config(peft_type="IA3_QUANTIZED"), "peft_type is 'IA3_QUANTIZED'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_packed_weights_that_lie_are_refused(adapter, tmp_path, name):
    path = shrink(adapter, tmp_path / "small", bits=4).path
    (path / "forget.json").unlink()
    spoil, told = HOSTILE[name]
    spoil(path)
    with pytest.raises(AdapterError, match=told):
        read_bundle(path)


def test_too_much_to_unpack_is_refused(adapter, tmp_path, monkeypatch):
    path = shrink(adapter, tmp_path / "small", bits=4).path
    monkeypatch.setattr("unlearn_peft.adapters.read.MAX_BYTES", 100)
    with pytest.raises(AdapterError, match="bytes of packed weights"):
        read_bundle(path)


# --- packed weights that grow -----------------------------------------------------------------------------------------


def grown(folder, module, shape, rank):
    """An adapter of zeros in 4 bits for `module`, in a sparse file of 8 kB on the disk."""
    name, entries, end = f"base_model.model.{module}", {}, 0
    for side, size in zip("BA", shape, strict=True):
        for kind, dtype, columns, width in (("int4", "U8", size // 2, 1), ("scales", "F16", -(-size // 64), 2)):
            span = [end, end := end + rank * columns * width]
            entries[f"{name}.lora_{side}.{kind}"] = {"dtype": dtype, "shape": [rank, columns], "data_offsets": span}
    folder.mkdir()
    header = json.dumps(entries).encode()
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA_QUANTIZED", "r": rank, "lora_alpha": rank}))
    return folder


def peak(code, *arguments):
    """The bytes by which a process grows while it runs `code`, which prints what it gives."""
    code = (
        "import resource, sys, torch\nfrom unlearn_peft.adapters.read import read_bundle\n"
        "from unlearn_peft.errors import AdapterError\nfrom unlearn_peft.inference.bank import Bank\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\nbefore = peak()\n"
        f"{code}\nprint(peak() - before)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    *said, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return "\n".join(said), int(growth)


def test_reading_a_packed_adapter_allocates_its_packed_size(tmp_path):
    path = grown(tmp_path / "a", "a", (64, 1 << 21), 64)  # 68 MB packed, 537 in float32
    said, growth = peak("print(read_bundle(sys.argv[1]).deltas['a'].shape)", path)
    assert said == "(64, 2097152)" and growth < 120e6


@pytest.mark.parametrize("module, told", [("a", "'a' has shape (64, 64) in the base"), ("b", "'b' does not exist")])
def test_what_the_base_has_no_place_for_is_refused_by_its_header(tmp_path, module, told):
    path = grown(tmp_path / "a", module, (64, 1 << 21), 64)
    said, growth = peak(
        "try: Bank(torch.nn.ModuleDict({'a': torch.nn.Linear(64, 64)})).load('it', sys.argv[1])\n"
        "except AdapterError as error: print(error)",
        path,
    )
    assert told in said and "does not match this base" in said and growth < 20e6


def test_an_unpacked_adapter_for_another_base_is_refused_by_its_header(adapter, monkeypatch):
    read = []
    monkeypatch.setattr("unlearn_peft.adapters.read._SMALL", 0)
    monkeypatch.setattr("unlearn_peft.files.weights._read_block", lambda *a: read.append(a))
    with pytest.raises(AdapterError, match="does not match this base.*trained on"):
        attach(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)}), adapter)
    assert not read


def test_a_packed_rank_beyond_what_a_matrix_can_have_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"rank 65536 and shape \(64, 64\): expected a rank of at most the smaller"):
        read_bundle(grown(tmp_path / "a", "a", (64, 64), 1 << 16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_blocks_make_the_same_matrix(bits, side, monkeypatch):
    matrix = torch.randn((5, 200) if side == "lora_A" else (200, 5), generator=torch.Generator().manual_seed(1))
    (packed,) = packed_matrices(pack(f"m.{side}", matrix, bits), []).values()
    whole, largest = packed.unpack(), packed.largest
    for block in (64, 128, 512):
        monkeypatch.setattr("unlearn_peft.adapters.quantized._BLOCK", block)
        assert torch.equal(packed.unpack(), whole) and packed.largest == largest == whole.abs().max()
