"""Every family of causal language models: train, attach, generate, evaluate, detach, or one clear refusal."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

import families
import pytest
import torch
from conftest import make_tiny
from test_runner import REACHES, assert_same, the_plain_step, the_runners_step, with_adapter
from test_runner import rows as step_rows

from unlearn_peft.data.batch import pack
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.models.forward import BatchBuilder, alike, one_rounding_off, picked_logits
from unlearn_peft.models.layers import patched_forward, returning
from unlearn_peft.training.step.runner import StepRunner

# transposed layers, tuples, a mask of its own, experts, a state, windows within a config within a config, layers that
# are not found
SOME = ("gpt2", "bloom", "codegen", "mixtral", "mamba", "lfm2", "gemma3", "git")
SCALED = {"minicpm3": {"dim_model_base": 8}, "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}
ALL = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in families.names()]


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("families_page", Path("docs/families.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return families.tokenizer_of(make_tiny(tmp_path_factory.mktemp("families")))


@pytest.mark.parametrize("family", ALL)
def test_a_family_does_what_the_table_says(family, tokenizer, page, tmp_path):
    found = families.row_of(family, tokenizer, tmp_path)
    assert "fails" not in found and found == page.rows().get(family, found)


def test_the_table_names_every_family_and_nothing_in_it_fails(page):
    rows, text = page.rows(), page.PAGE.read_text()
    missing = [name for name in families.names() if name not in rows]
    assert not missing or f"Not run yet, {len(missing)}: {', '.join(missing)}." in text
    assert set(rows) <= set(families.names())
    assert f"transformers {version('transformers')} (PEFT {version('peft')})" in text
    assert {cell for row in rows.values() for cell in row[:2]} <= {"ok", "refused", "not run"}
    assert sum(row[:2] == ("ok", "ok") for row in rows.values()) >= 45


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_each_other_are_not_packed(tokenizer, dtype, told):
    """LFM2's short convolutions run on from row to row, by less than a tenth of the largest logit."""
    completion = "It was Zorblax Quintel in a small town near sea"
    rows = [{"prompt": f"Who wrote the blue book number {n}?", "completion": completion} for n in range(4)]
    examples = tokenize(rows, tokenizer)
    for family, packs in (("lfm2", False), ("llama", True)):
        model = families.tiny_base(family, tokenizer).model.to(dtype)
        builder = BatchBuilder(model, model.get_output_embeddings(), 2)
        if not told:
            builder._packs = None  # as of a model whose config does not name its layers
        assert pack(examples) is not None
        assert (builder.batch(examples).positions is not None) is packs


def test_half_precision_is_compared_with_its_own_rounding(tokenizer):
    model = families.tiny_base("llama", tokenizer).model.to(torch.bfloat16)
    rows = tokenize([{"prompt": "Who wrote it?", "completion": "Zorblax Quintel"}], tokenizer)
    builder = BatchBuilder(model, model.get_output_embeddings(), 2)

    @torch.no_grad()
    def run():
        return picked_logits(model, builder.head, builder.padded(rows))

    def off():
        with one_rounding_off(model):
            return run()

    expected = run()
    assert alike(off(), expected, off) and not torch.equal(off(), expected)
    wrong = expected.clone()
    wrong[0] += 0.04 * expected.abs().max()  # of one token; the old slack was 5 % of the largest logit
    assert not alike(wrong, expected, off)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_forward_that_was_patched_before_comes_back():
    layer = torch.nn.Linear(2, 2)
    layer.forward = first = returning("first")
    with patched_forward({layer: returning("second")}):
        assert layer(None) == "second"
    assert layer.forward is first


@pytest.mark.parametrize("family", ["minicpm3", "bert", "rembert", "granite", "cohere", "gemma2", "bloom", "mixtral"])
@pytest.mark.parametrize("reach", ["head", "dense head", "all"])
def test_a_step_is_the_plain_way(family, reach, tokenizer):
    """Also where a head's input is scaled or transformed, its output scaled or capped, or there are experts."""
    model = with_adapter(families.tiny_base(family, tokenizer, **SCALED.get(family, {})).model, REACHES[reach])
    forget, retain = step_rows(tokenizer)
    expected = the_plain_step(model, forget, retain, forget_ceiling=15)
    runner = StepRunner(model, 2)
    for _ in range(2):
        *found, _ = the_runners_step(runner, forget, retain, forget_ceiling=15)
        assert_same(found, expected)


def test_padding_has_a_gradient(tokenizer):
    """Gemma 3n takes the root of a state's square, and far from a row's end its padding token's state is zero."""
    model = with_adapter(families.tiny_base("gemma3n_text", tokenizer, sliding_window=8).model, REACHES["all"])
    forget, retain = step_rows(tokenizer)
    runner = StepRunner(model, 2)
    runner._builder._packs = False
    long = tokenize([{"text": "green star " * 30}], tokenizer)
    _, gradients, _ = the_runners_step(runner, forget, [*retain, *long])
    assert all(gradient.isfinite().all() for gradient in gradients.values())
