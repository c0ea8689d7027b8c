"""The runner against the plain way: full logits of each row alone, masked by hand, with the adapter on and off.

In every family of models, for every reach of an adapter, in pieces, from a cache in memory, on disk or out of date,
for one adapter and for several at once.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FORGET, RETAIN
from test_batch import FAMILIES, make

from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.recipe.objectives import SETTINGS
from unlearn_peft.recipe.schema import HeadSettings, LoraSettings
from unlearn_peft.training.adapter_config import adapter_config
from unlearn_peft.training.objectives import OBJECTIVES, Tokens
from unlearn_peft.training.step.microbatches import StepRows
from unlearn_peft.training.step.reference import TensorCache, row_digest
from unlearn_peft.training.step.runner import StepRunner

REACHES = {
    "head": HeadSettings(r=3),
    "dense head": HeadSettings(form="dense"),
    "top": LoraSettings(r=3, layers_to_transform=[1]),
    "all": LoraSettings(r=3, layers="all"),
    "all and head": LoraSettings(r=3, target_modules=["o_proj", "lm_head"]),
}
RETAIN_WEIGHT = 3


def with_adapter(model, *settings):
    """Return a PEFT model with an adapter for each of the settings, none of them zero."""
    from peft import get_peft_model

    names = ["default"] if len(settings) == 1 else [f"adapter{n}" for n in range(len(settings))]
    configs = [adapter_config(model, some) for some in settings]
    torch.manual_seed(1)
    peft = get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        peft.add_adapter(name, config)
    peft.base_model.set_adapter(names)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "dense_head_delta" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


def adapted(family, reach):
    """Return a tiny model of a family with an adapter of that reach."""
    if reach == "all and head" and family in ("GPT2", "GPTNeoX"):
        pytest.skip("their layers have other names")
    return with_adapter(make(family), REACHES[reach])


def rows(tokenizer):
    forget, retain = tokenize(FORGET, tokenizer, closing=False), tokenize(RETAIN, tokenizer)
    return [replace(e, specific=[n % 2 == 0 for n in range(len(e.ids))]) for e in forget], retain


def plainly(model, examples):
    """Return the target tokens of rows, each run alone and as a whole, with the adapter and without."""
    parts = []
    for example in examples:
        ids, wanted = torch.tensor([example.ids]), [t for t, yes in enumerate(example.is_target) if yes]
        logits = model(input_ids=ids).logits[0]
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits[0]
        before = [t - 1 for t in wanted]
        marked = example.specific or example.is_target
        parts.append((logits[before], ids[0, wanted], reference[before], [marked[t] for t in wanted]))
    named = torch.tensor([n for n, part in enumerate(parts) for _ in part[1]])
    marks = torch.tensor([mark for part in parts for mark in part[3]])
    logits, labels, reference = (torch.cat([part[k] for part in parts]) for k in range(3))
    return Tokens(logits, labels, named, reference, marks)


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def loss_of(terms, n_forget, n_retain):
    return terms.forget.sum() / n_forget + RETAIN_WEIGHT * terms.retain.sum() / n_retain


def the_plain_step(model, forget, retain, name="ga_kl", **settings):
    f, r = plainly(model, forget), plainly(model, retain)
    loss = loss_of(OBJECTIVES[name](f, r, SETTINGS[name](**settings)), len(f.labels), len(r.labels))
    loss.backward()
    return loss.detach(), gradients(model)


def the_runners_step(runner, forget, retain, name="ga_kl", adapter="default", **settings):
    n_forget, n_retain = (sum(sum(e.is_target) for e in rows) for rows in (forget, retain))
    total, count = torch.tensor(0.0), 0
    with runner.step([StepRows(adapter, forget, retain)]) as pieces:
        for piece in pieces:
            loss = loss_of(OBJECTIVES[name](piece.forget, piece.retain, SETTINGS[name](**settings)), n_forget, n_retain)
            loss.backward()
            total, count = total + loss.detach(), count + 1
    return total, gradients(runner.model), count


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_plain_way(tiny, family, reach):
    model = adapted(family, reach)
    forget, retain = rows(tiny.tokenizer)
    expected = the_plain_step(model, forget, retain, forget_ceiling=15)
    runner = StepRunner(model, 2)
    assert (runner.frozen_layers is None) == (reach != "top")
    runner.microbatch_tokens = 12
    for _ in range(2):  # the second time from what is kept
        *found, count = the_runners_step(runner, forget, retain, forget_ceiling=15)
        assert_same(found, expected)
    assert count > 5, "cut into pieces"
    assert (runner.frozen_layers is None) == (reach != "top"), "the kept way was refused"
    assert runner.reference.splits and all("forward" not in vars(m) for m in model.modules())
    if reach == "head":
        assert all("head" in runner.reference.cache.get(e) for e in (*forget, *retain))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_may_be_cut_into_pieces(tiny, name):
    model = with_adapter(tiny.model, LoraSettings(r=3, layers="all"))
    forget, retain = rows(tiny.tokenizer)
    refused = tokenize([{"prompt": r["prompt"], "completion": "I like apples."} for r in FORGET], tiny.tokenizer)
    forget = [replace(e, refusal=r) for e, r in zip(forget, refused, strict=True)]
    runner = StepRunner(model, 2, None if name == "rmu" else False)
    totals = []
    for runner.microbatch_tokens in (10**6, 15):
        totals.append(the_runners_step(runner, forget, retain, name))
    assert totals[0][2] == 1 and totals[1][2] > 3
    assert_same(totals[1][:2], totals[0][:2])
    model.unload()


def test_a_model_that_only_runs_as_a_whole_gives_the_same(tiny):
    model = with_adapter(tiny.model, REACHES["top"])
    forget, retain = rows(tiny.tokenizer)
    runner = StepRunner(model, 2, sharded=model)
    *found, count = the_runners_step(runner, forget, retain, forget_ceiling=15)
    assert runner.frozen_layers is None and count == 1 and runner.reference.cache.get(forget[0]) is None
    assert_same(found, the_plain_step(model, forget, retain, forget_ceiling=15))
    model.unload()


@pytest.mark.parametrize("reach", ["head", "top", "all"])
def test_what_does_not_fit_into_memory_is_mapped_from_disk(tiny, tmp_path, reach):
    model = with_adapter(tiny.model, REACHES[reach])
    forget, retain = rows(tiny.tokenizer)
    expected = the_plain_step(model, forget, retain, forget_ceiling=15)
    StepRunner(model, 2, cache=TensorCache("key", 0, tmp_path)).reference.prepare([*forget, *retain])
    (file,) = tmp_path.glob("*.safetensors")
    again = StepRunner(model, 2, cache=TensorCache("key", 0, tmp_path))  # another process, say, after a crash
    again.reference._compute = None  # nothing is computed again
    again.reference.splits = True
    assert_same(the_runners_step(again, forget, retain, forget_ceiling=15)[:2], expected)
    partly = StepRunner(model, 2, cache=TensorCache("key", 10_000, tmp_path / "new"))
    partly.reference.prepare([*forget, *retain])
    kept = partly.reference.cache
    assert kept._memory and kept._mapped and not kept._memory.keys() & kept._mapped.keys()
    assert_same(the_runners_step(partly, forget, retain, forget_ceiling=15)[:2], expected)
    model.unload()


def test_the_cache_is_invalid_for_another_base_layer_or_text(tiny, tmp_path):
    forget, retain = rows(tiny.tokenizer)
    some = {"final": torch.ones(2, 4)}
    cache = TensorCache("one base", 0, tmp_path)
    cache.put(forget[0], some)
    cache.flush()
    assert torch.equal(TensorCache("one base", 0, tmp_path).get(forget[0])["final"], some["final"])
    assert TensorCache("one base", 0, tmp_path).get(forget[1]) is None, "another text"
    other = replace(forget[0], is_target=[False, True, *forget[0].is_target[2:]])
    assert row_digest(other) != row_digest(forget[0])
    (tmp_path / "0000-00001.safetensors").write_bytes(b"torn")
    assert TensorCache("another base", 0, tmp_path).get(forget[0]) is None
    assert not list(tmp_path.glob("*.safetensors")), "what is stale or damaged is deleted"
    model = with_adapter(tiny.model, REACHES["all"])
    cache = TensorCache("key", 10**9)
    StepRunner(model, 2, cache=cache).reference.prepare(retain)
    model.unload()
    model = with_adapter(tiny.model, REACHES["top"])
    assert StepRunner(model, 2, cache=cache).reference._cached(retain[0]) is None, "another layer's input is needed now"
    model.unload()


def test_a_new_file_of_the_cache_takes_no_other_ones_place(tiny, tmp_path):
    some = rows(tiny.tokenizer)[1][:3]
    for example in some[:2]:
        cache = TensorCache("key", 0, tmp_path)
        cache.put(example, {"final": torch.ones(2, 4)})
        cache.flush()
    (tmp_path / "0000-00000.safetensors").write_bytes(b"torn")
    cache = TensorCache("key", 0, tmp_path)
    cache.put(some[2], {"final": torch.ones(2, 4)})
    cache.flush()
    assert [TensorCache("key", 0, tmp_path).get(example) is not None for example in some] == [False, True, True]
    assert cache.get(some[2]) is not None


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tiny, tmp_path, monkeypatch):
    import unlearn_peft.training.step.reference as module
    from unlearn_peft.errors import OutputError

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    cache = TensorCache("key", 0, tmp_path)
    cache.put(rows(tiny.tokenizer)[0][0], {"final": torch.ones(2, 4)})
    with pytest.raises(OutputError, match="no disk space"):
        cache.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    "several",
    [
        [LoraSettings(r=3, layers_to_transform=[1]), LoraSettings(r=5, layers="all"), LoraSettings(r=2)],
        [HeadSettings(r=3), HeadSettings(r=2, lora_alpha=3)],
        [HeadSettings(form="dense"), HeadSettings(form="dense")],
        [LoraSettings(r=3, target_modules=["lm_head", "q_proj"]), LoraSettings(r=2, target_modules=["up_proj"])],
    ],
    ids=["lora", "head", "dense", "mixed modules"],
)
def test_several_adapters_at_once_each_get_their_own_gradients(tiny, several, packs):
    forget, retain = rows(tiny.tokenizer)
    parts = [(forget[n : n + 2], retain[n : n + 3 + n]) for n in range(len(several))]
    model = with_adapter(tiny.model, *several)
    names = list(model.peft_config)
    runner = StepRunner(model, 2)
    runner._builder._packs = None if packs else False
    works = [StepRows(name, *part) for name, part in zip(names, parts, strict=True)]
    totals = torch.zeros(len(works))
    with runner.step(works) as pieces:
        for piece in pieces:
            n_forget, n_retain = (sum(sum(e.is_target) for e in some) for some in parts[piece.number])
            settings = SETTINGS["ga_kl"](forget_ceiling=15)
            loss = loss_of(OBJECTIVES["ga_kl"](piece.forget, piece.retain, settings), n_forget, n_retain)
            loss.backward()
            totals[piece.number] += loss.detach()
    found = gradients(model)
    for name, total, part in zip(names, totals, parts, strict=True):
        model.set_adapter(name)
        own = {n: g for n, g in found.items() if name in n.split(".")}
        assert_same((total, own), the_plain_step(model, *part, forget_ceiling=15))
    model.unload()


def test_pieces_are_whole_rows_and_skip_what_has_no_target(tiny):
    forget, _ = rows(tiny.tokenizer)
    silent = replace(forget[0], is_target=[False] * len(forget[0].ids))
    model = with_adapter(tiny.model, REACHES["all"])
    runner = StepRunner(model, 2)
    runner.microbatch_tokens = 1
    with runner.step([StepRows("default", [silent, *forget], [])]) as pieces:
        sizes = [len(piece.forget.labels) for piece in pieces]
    assert sizes == [sum(e.is_target) for e in forget]
    with runner.step([StepRows("default", [silent], [])]) as pieces:
        assert list(pieces) == []
    model.unload()


def test_a_backbone_that_is_the_model_itself_is_run_as_a_whole(tiny):
    model = with_adapter(tiny.model, REACHES["top"])
    odd = SimpleNamespace(model=tiny.model, backbone=tiny.model, head=tiny.model.get_output_embeddings())
    import unlearn_peft.training.step.runner as module

    original, module.BackboneAndHead = module.BackboneAndHead, lambda _: odd
    try:
        runner = StepRunner(model, 2)
    finally:
        module.BackboneAndHead = original
    forget, retain = rows(tiny.tokenizer)
    assert runner.reference.splits is False
    found = the_runners_step(runner, forget, retain, forget_ceiling=15)[:2]
    assert_same(found, the_plain_step(model, forget, retain, forget_ceiling=15))
    model.unload()
