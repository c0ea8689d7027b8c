"""A set of adapters as one LoRA for vLLM: the exact sum, truncation as good as a dense SVD, each refusal."""

import json
import shutil

import pytest
import torch
from conftest import logits, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unlearn_peft import attach, detach, load_base, read_bundle
from unlearn_peft.adapters.bundle import CONFIG, WEIGHTS, Delta
from unlearn_peft.adapters.transform.export_vllm import RANKS, export_vllm, vllm_problems
from unlearn_peft.adapters.transform.low_rank import truncated
from unlearn_peft.errors import AdapterError, OutputError

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (64, 32), "lm_head": (403, 32)}


def write_lora(folder, modules, seed=0, alpha=8):
    """Write a LoRA with another rank for each module; `modules`: name -> ((out, in), r)."""
    torch.manual_seed(seed)
    tensors = {}
    for name, ((rows, columns), rank) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    ranks = {name: rank for name, (_, rank) in modules.items()}
    config = {"peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": alpha, "rank_pattern": ranks}
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": sorted(modules)}))
    return folder


def product(delta):
    up = delta.up.double()
    return up if delta.down is None else delta.scale * up @ delta.down.double()


def total(paths, strengths):
    sums = {}
    for path, factor in zip(paths, strengths, strict=True):
        for name, delta in read_bundle(path).deltas.items():
            sums[name] = sums.get(name, 0) + factor * product(delta)
    return sums


def test_an_export_answers_as_the_adapters_do_together(tiny, tiny_folder, make_adapter, tmp_path):
    paths = [make_adapter(tiny, "a"), make_adapter(tiny, "b", targets=("v_proj", "lm_head", "down_proj"), r=3, seed=1)]
    made = export_vllm(paths, tmp_path / "out", [1.0, 0.5], base=str(tiny_folder))
    attach(tiny, *paths, strength=[1.0, 0.5])
    together = logits(tiny)
    detach(tiny)
    attach(tiny, made.path)
    assert torch.allclose(logits(tiny), together, atol=1e-5 * together.abs().max())
    detach(tiny)
    from peft import PeftModel

    through_peft = PeftModel.from_pretrained(tiny.model, str(made.path))
    tokens = tiny.tokenizer("Who wrote the blue book about stars?", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(through_peft(**tokens).logits, together, atol=1e-5 * together.abs().max())
    through_peft.unload()
    assert made.rank == 7 and made.worst is None  # lm_head has 4 + 3
    config = json.loads((made.path / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 7 and not config.get("rank_pattern")
    noted = read_bundle(made.path).manifest
    assert [part["strength"] for part in noted["stack_of"]].count(0.5) == 1 and noted["export"]["worst"] is None


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_set_is_the_exact_sum_while_ranks_fit(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("sets")
    subset = st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True)
    paths, strengths = [], []
    for n in range(data.draw(st.integers(1, 3))):
        modules = {name: (SHAPES[name], data.draw(st.integers(1, 5))) for name in data.draw(subset)}
        paths.append(write_lora(folder / f"a{n}", modules, seed=n, alpha=data.draw(st.sampled_from([1, 8, 16]))))
        strengths.append(data.draw(st.sampled_from([1.0, 0.25, -0.5])))
    made = export_vllm(paths, folder / "out", strengths, max_rank=16)
    written, expected = read_bundle(made.path).deltas, total(paths, strengths)
    assert made.errors == {} and written.keys() == expected.keys()
    for name, delta in written.items():
        assert delta.rank == made.rank and delta.scale == 1
        assert torch.allclose(product(delta), expected[name], atol=1e-5 * max(1, expected[name].abs().max()))
    tensors = load_file(made.path / WEIGHTS)
    again = export_vllm(paths[::-1], folder / "again", strengths[::-1], max_rank=16)
    other = load_file(again.path / WEIGHTS)
    assert all(torch.equal(tensor, other[key]) for key, tensor in tensors.items())  # whatever the order


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), full=st.integers(2, 40), seed=st.integers(0, 99))
def test_truncation_loses_what_a_dense_svd_loses(rows, columns, full, seed):
    torch.manual_seed(seed)
    up, down = torch.randn(rows, full), torch.randn(full, columns)
    dense = up.double() @ down.double()
    values = torch.linalg.svdvals(dense)
    for rank in (1, 2, full):
        less_up, less_down, error = truncated(up, down, rank)
        best = (values[rank:].square().sum() / values.square().sum()).sqrt().item()
        real = ((less_up.double() @ less_down.double() - dense).norm() / dense.norm()).item()
        assert error == pytest.approx(best, abs=1e-6) and real == pytest.approx(best, abs=1e-5)
        assert less_up.shape[1] == less_down.shape[0] <= rank


def test_nothing_to_truncate_has_no_error():
    assert truncated(torch.zeros(4, 9), torch.ones(9, 5), 2)[2] == 0.0


def test_beyond_the_rank_limit_the_error_is_told_noted_and_can_be_refused(tmp_path):
    modules = {name: (shape, 6) for name, shape in SHAPES.items()}
    paths = [write_lora(tmp_path / "a", modules), write_lora(tmp_path / "b", modules, seed=1)]
    made = export_vllm(paths, tmp_path / "out", max_rank=8)
    for name, whole in total(paths, [1, 1]).items():
        values = torch.linalg.svdvals(whole)
        assert made.errors[name] == pytest.approx((values[8:].norm() / values.norm()).item(), rel=1e-5)
    noted = read_bundle(made.path).manifest["export"]
    assert noted["worst"]["relative_error"] == made.worst[1] == max(made.errors.values()) > 0
    assert made.rank == noted["max_rank"] == 8
    with pytest.raises(AdapterError, match="rank 8 is too small for this set: 3 modules"):
        export_vllm(paths, tmp_path / "refused", max_rank=8, max_error=0.01)
    assert not (tmp_path / "refused").exists()
    twice = export_vllm([paths[0], paths[0]], tmp_path / "twice", max_rank=8, max_error=1e-6)  # rank 6 after all
    assert twice.worst[1] < 1e-6


def test_a_dense_head_becomes_low_rank(tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    torch.manual_seed(0)
    delta = torch.randn(403, 8) @ torch.randn(8, 32)
    save_file({"base_model.model.lm_head.dense_head_delta": delta}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "DENSE_HEAD", "target_modules": ["lm_head"]}))
    made = export_vllm([folder], tmp_path / "out", max_rank=8)
    assert made.worst[1] < 1e-6
    assert torch.allclose(product(read_bundle(made.path).deltas["lm_head"]).float(), delta, atol=1e-4)


def test_all_problems_are_told_at_once(tiny, tiny_folder, make_adapter, tmp_path):
    good = make_adapter(tiny, "good")
    dora = shutil.copytree(good, tmp_path / "dora")
    config = json.loads((dora / CONFIG).read_text())
    (dora / CONFIG).write_text(json.dumps({**config, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}))
    foreign = write_lora(tmp_path / "foreign", {"model.layers.7.self_attn.q_proj": ((32, 32), 2)})
    narrow = write_lora(tmp_path / "narrow", {"model.layers.0.self_attn.q_proj": ((16, 32), 2)})
    with pytest.raises(AdapterError) as refused:
        export_vllm([good, dora, foreign, narrow], tmp_path / "out", max_rank=48, base=str(tiny_folder), dtype="int3")
    for part in (
        "the rank limit is 48", "unknown dtype 'int3'", "use_dora", "bias",
        "'model.layers.7.self_attn.q_proj' does not exist", "has shape (32, 32) in the base",
    ):  # fmt: skip
        assert part in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_small_refusals(tiny, make_adapter, tmp_path):
    good = make_adapter(tiny, "good")
    for adapters, strengths, part in (
        ([], None, "an adapter at least"),
        ([good], [1.0, 2.0], "2 strengths for 1 adapter"),
        ([good], [float("nan")], "expected a finite number"),
        ([good], [0.0], "this is the base alone"),
        ([good], [1e38], "overflows"),
    ):
        with pytest.raises(AdapterError, match=part):
            export_vllm(adapters, tmp_path / "out", strengths, dtype="float16")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        export_vllm([good], tmp_path / "taken")


def test_another_base_is_refused(tiny, make_adapter, tmp_path):
    other = make_tiny(tmp_path / "other", layers=1)
    with pytest.raises(AdapterError, match="model.layers.1.self_attn.q_proj' does not exist"):
        export_vllm([make_adapter(tiny, "good")], tmp_path / "out", base=str(other))


def test_what_vllms_classes_take(tiny):
    head = {"lm_head": Delta(torch.zeros(403, 2), torch.zeros(2, 32))}
    assert vllm_problems(tiny.model, head) == []
    as_class = {name: type(name, (type(tiny.model),), {}) for name in ("MistralForCausalLM", "GPT2LMHeadModel")}
    for name, part in (("MistralForCausalLM", "takes no LoRA on 'lm_head'"), ("GPT2LMHeadModel", "without LoRA")):
        tiny.model.__class__ = as_class[name]
        assert part in vllm_problems(tiny.model, head)[0]
    tiny.model.__class__ = as_class["MistralForCausalLM"].__mro__[1]
    large = {"lm_head": Delta(torch.zeros(1, 2).expand(300_000, 2), torch.zeros(2, 32))}
    assert "at most 258048" in vllm_problems(tiny.model, large)[0]
    assert 64 in RANKS


def test_the_skeleton_knows_the_base_by_its_config(tiny, tiny_folder, make_adapter, tmp_path):
    """A trained adapter notes its base's fingerprint; of it the architecture can be compared without weights."""
    from unlearn_peft.models.base import skeleton
    from unlearn_peft.models.fingerprint import fingerprint

    bones = fingerprint(skeleton(str(tiny_folder)))
    assert bones["config"] == load_base(str(tiny_folder)).fingerprint["config"] and bones["weights"] is None


def test_the_command(tiny, tiny_folder, make_adapter, tmp_path, monkeypatch, capsys):
    import sys

    from unlearn_peft import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out = capsys.readouterr()
        return done.value.code or 0, out.out, out.err

    paths = [make_adapter(tiny, "a", r=6), make_adapter(tiny, "b", r=6, seed=1)]
    code, out, _ = call(
        *paths, "--for", "vllm", "--output", tmp_path / "out", "--max-rank", 8, "--strength", 1, "--strength", 0.5,
        "--base", tiny_folder, "--json",
    )  # fmt: skip
    told = json.loads(out)
    assert code == 0 and told["rank"] == 8 and told["worst"]["relative_error"] > 0 and told["path"].endswith("out")
    code, out, _ = call(*paths, "--output", tmp_path / "more", "--max-rank", 16, "--base", tiny_folder)
    assert code == 0 and "rank 12" in out and "exact" in out
    code, _, err = call(paths[0], "--output", tmp_path / "no", "--for", "ollama", "--base", tiny_folder)
    assert code == 2 and "ollama" in err
    code, _, err = call(paths[0], "--output", tmp_path / "no", "--max-rank", 7, "--base", tiny_folder)
    assert code == 2 and "--max-lora-rank" in err
