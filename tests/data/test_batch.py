"""Packed rows give what padded rows give: same logits, same gradients, in every family of models."""

import pytest
import torch
from conftest import FORGET, RETAIN

from unlearn_peft.data.batch import collate, pack
from unlearn_peft.data.tokenize import Example, tokenize
from unlearn_peft.models.forward import BatchBuilder, picked_logits

SMALL = dict(
    vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, head_dim=8, pad_token_id=2, initializer_range=0.2,
)  # fmt: skip
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Gemma2", "GPTNeoX", "GPT2"]


def make(family):
    import transformers

    given = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400} if family == "GPT2" else dict(SMALL)
    if family == "GPTNeoX":
        given.pop("num_key_value_heads")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**given)
    return getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()


@pytest.fixture
def examples(tiny):
    return tokenize([*FORGET, *RETAIN], tiny.tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family, examples):
    model = make(family)
    head = model.get_output_embeddings()
    padded, packed = collate(examples, 2), pack(examples, getattr(model.config, "sliding_window", None))
    assert packed.shared >= 4 and packed.ids.numel() < 0.9 * padded.ids.numel()
    grads = []
    for batch in (padded, packed.to(torch.device("cpu"))):
        model.zero_grad()
        logits = picked_logits(model, head, batch)
        logits.float().logsumexp(-1).sum().backward()
        grads.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert batch.rows[:, 1:][batch.targets[:, 1:]].tolist() == [
            n for n, example in enumerate(examples) for _ in range(sum(example.is_target))
        ]
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-4)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_is_not_worth_it_or_not_right_is_not_packed(examples):
    assert pack(examples[:1]) is None
    unlike = [Example([n, 5, 6], [False, False, True]) for n in range(3)]
    assert pack(unlike) is None  # nothing shared, nothing padded
    assert pack(examples, sliding_window=10) is None  # a sliding window would cut the mask
    long = [Example([1, *range(500)], [False] * 500 + [True]) for _ in range(9)]
    assert pack([*long, Example([2, 3], [False, True])]) is None  # the mask would be too large


def test_a_first_target_is_predicted_by_its_own_row():
    rows = [Example([7, 8, 9, n], [False, False, True, True]) for n in (1, 2, 3)]
    packed = pack(rows)
    assert packed.shared == 1  # 7 alone: 8 predicts the target 9, so each row has its own 8
    assert packed.ids.tolist() == [[7, 8, 9, 1, 8, 9, 2, 8, 9, 3]]


def test_a_model_that_does_not_take_the_mask_is_run_padded(tiny, fields, monkeypatch):
    """The engine compares once; where packed and padded differ, it pads."""
    import unlearn_peft.models.forward as engine_
    from unlearn_peft import unlearn

    seen = []
    monkeypatch.setattr(engine_, "alike", lambda *_: False)
    original = BatchBuilder.batch

    def watched(self, examples):
        seen.append(original(self, examples))
        return seen[-1]

    monkeypatch.setattr(BatchBuilder, "batch", watched)
    unlearn(tiny, **fields)
    assert seen and all(batch.positions is None for batch in seen)
