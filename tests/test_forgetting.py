"""The main claim, on the real model: forgotten with the adapter, back without it, neighbours kept."""

import re
from pathlib import Path

import pytest
import torch
from conftest import logits

from unlearn_peft import attach, detach, load_recipe, read_bundle, unlearn
from unlearn_peft.data.prompt import has_template
from unlearn_peft.data.rows import read_rows
from unlearn_peft.data.source import DataSpec
from unlearn_peft.evaluate.compare import compare

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "fixtures"
SETS = ("forget", "retain", "probes", "neighbours")
OTHERS = {target: {name: str(DATA / f"{target}_{name}.jsonl") for name in SETS} for target in ("van_gogh", "apple")}


def is_english(text):
    """No word salad: mostly known letters, several words, no run of one word."""
    words = re.findall(r"[a-z']+", text.casefold())
    letters = sum(c.isascii() for c in text) / max(len(text), 1)
    repeated = max((len(m.group(0).split()) for m in re.finditer(r"\b(\w+)(?: \1\b)+", " ".join(words))), default=1)
    return letters > 0.95 and repeated < 4 and len(set(words)) >= max(2, min(len(words), 40) * 0.35)


def perplexity(base, prompt, text):
    """Of an answer under the base alone: word salad is thousands."""
    from unlearn_peft.data.batch import collate
    from unlearn_peft.data.tokenize import tokenize
    from unlearn_peft.models.forward import picked_logits

    examples = tokenize([{"prompt": prompt, "completion": text}], base.tokenizer, closing=False)
    batch = collate(examples, 2)
    with torch.no_grad():
        scores = picked_logits(base.model, base.model.get_output_embeddings(), batch)
    return torch.nn.functional.cross_entropy(scores, batch.ids[:, 1:][batch.targets[:, 1:]]).exp().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "target"),
    # each real model, one with a chat template and one without; of Van Gogh's probes Gemma itself answers none
    [("smol", "harry_potter"), *(("smol", other) for other in OTHERS), ("gemma", "harry_potter"), ("gemma", "apple")],
)
def test_the_recipe_forgets(request, tmp_path, model, target):
    """The demo's recipe, and a copy of it with only the data changed."""
    real, changed = request.getfixturevalue(model), OTHERS.get(target, {})
    recipe = load_recipe(ROOT / "recipes" / "harry_potter.yaml", output=str(tmp_path / "adapter"))
    recipe = recipe.model_copy(update={name: DataSpec(path=path) for name, path in changed.items()})
    before = logits(real)
    adapter = unlearn(real, recipe=recipe, quiet=True)
    assert adapter.bytes <= 5_000_000
    result = compare(
        real, [adapter.path], read_rows(recipe.probes, "probes"), read_rows(recipe.neighbours, "neighbours")
    )
    print(result["leaks"], result["neighbour_kl"], adapter.metrics)
    for probe in result["probes"]:
        print(probe["prompt"], "->", probe["with"]["text"])
    assert result["leaks"]["before"] >= 3 and result["leaks"]["with"] == 0
    assert [p["after"] for p in result["probes"]] == [p["before"] for p in result["probes"]]
    assert result["neighbour_kl"]["with"] <= (0.1 if changed else 0.02) and result["neighbour_kl"]["after"] == 0
    for probe in result["probes"]:
        text, chat = probe["with"]["text"], has_template(real.tokenizer)
        assert is_english(text) or not chat, text  # Gemma itself says "Apple" alone, or one line again and again
        assert perplexity(real, probe["prompt"], text) < (60 if len(text.split()) > 1 else 1000), text  # "Samsung"
    attach(real, adapter.path)
    detach(real)
    assert torch.equal(logits(real), before)


@pytest.mark.slow
def test_the_original_experiment(smol, tmp_path):
    """Its headline was +42.6 % forget loss; ours is at least +100 % at a held-in retain KL of at most 0.01."""
    recipe = load_recipe(ROOT / "recipes" / "seed_lm_head.yaml", output=str(tmp_path / "adapter"))
    metrics = unlearn(smol, recipe=recipe, quiet=True).metrics
    print(metrics)
    assert metrics["forget_loss_change_percent"] >= 100
    assert metrics["retain_kl"] <= 0.01


@pytest.mark.long
def test_a_head_adapter_of_rank_8_is_small_on_the_real_model(smol, tmp_path):
    text = logits(smol)
    fields = {name: OTHERS["van_gogh"][name] for name in ("forget", "retain")}
    adapter = unlearn(
        smol, **fields, adapter={"kind": "head", "r": 8}, steps=1, anchor_batch=0, forget_batch=2, retain_batch=2,
        objective={"retain_budget": None}, own_answers=0, output=str(tmp_path / "h"), quiet=True,
    )  # fmt: skip
    weights = adapter.path / "adapter_model.safetensors"
    assert 100_000 < weights.stat().st_size < adapter.bytes <= 1_000_000
    head = read_bundle(adapter.path).deltas["lm_head"]
    assert (tuple(head.up.shape), head.rank) == ((49152, 8), 8)
    assert torch.equal(logits(smol), text)


def test_is_english_knows_word_salad():
    assert is_english("The author of the book is a British writer who lived in London.")
    for salad in ("the the the the the", ",,,, ,,,,", "an an an an an an", "я не знаю что это такое"):
        assert not is_english(salad)
