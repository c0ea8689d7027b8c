"""Answers from one refilled batch are those of each prompt alone, and nothing is read twice."""

import random

import pytest
import torch

from unlearn_peft.errors import BaseModelError
from unlearn_peft.inference import decoding
from unlearn_peft.inference.decoding import Decoding, generate
from unlearn_peft.models.base import Base


def models():
    import transformers as hf

    small = dict(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    yield hf.LlamaForCausalLM(hf.LlamaConfig(**small))
    yield hf.MistralForCausalLM(hf.MistralConfig(**small, sliding_window=6))
    yield hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**small, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    )
    yield hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=4))
    yield hf.MambaForCausalLM(hf.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.fixture(params=range(5), ids=["llama", "mistral", "gemma3", "gpt2", "mamba"])
def base(request, tiny):
    torch.manual_seed(0)
    return Base(list(models())[request.param].eval(), tiny.tokenizer, "model")


def prompts():
    some = random.Random(0)
    shared = some.choices(range(5, 290), k=9)
    return [shared + some.choices(range(5, 290), k=length) for length in (1, 12, 3, 3, 20, 7)]


def alone(model, ids, tokens, ends):
    """Greedily, without a cache."""
    said = []
    while len(said) < tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("begin", ["alike", "differently"])
def test_greedy_answers_are_those_of_each_prompt_alone(base, monkeypatch, rows, begin):
    monkeypatch.setattr(decoding, "_ROWS", rows)
    monkeypatch.setattr(decoding, "_READ", 30)
    asked = prompts() if begin == "alike" else [ids[n:] for n, ids in enumerate(prompts())]
    plain = [alone(base.model, ids, 9, ()) for ids in asked]
    ends = {plain[0][4], plain[2][1]}  # rows end at different steps
    config = base.model.generation_config
    found = generate(base, asked, Decoding(9, ends))
    assert found == [[alone(base.model, ids, 9, ends)] for ids in asked]
    assert len({len(said) for (said,) in found}) > 1 and base.model.generation_config is config


def test_samples_depend_on_their_own_prompt_alone(base):
    how, asked = Decoding(6, {7, 8, 9}, temperature=1.0), prompts()
    state = torch.get_rng_state()
    found = generate(base, asked, how, 5, 3)
    assert found == [generate(base, [ids], how, 5, 3 + n)[0] for n, ids in enumerate(asked)]
    assert [len(said) for said in found] == [5] * len(asked) and len({tuple(ids) for ids in found[0]}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_ends_where_it_is_said_to(base):
    (whole,) = generate(base, prompts()[:1], Decoding(9))[0]
    assert generate(base, prompts()[:1], Decoding(9, ended=lambda ids: len(ids) == 3))[0] == [whole[:3]]


def test_samples_are_drawn_from_the_whole_distribution(base):
    (ids,) = prompts()[:1]
    found = generate(base, [ids], Decoding(1, temperature=0.7), 4000)[0]
    with torch.no_grad():
        shares = (base.model(torch.tensor([ids])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.tensor([token for (token,) in found]).bincount(minlength=300)
    error = (counts - 4000 * shares).abs() / (4000 * shares * (1 - shares)).sqrt().clamp(min=1)
    assert error.max() < 5


def test_a_common_beginning_and_a_prompt_are_read_once(base, monkeypatch):
    if decoding._runner_of(base.model) is None:
        pytest.skip("rows of this model cannot be joined: each answer reads its prompt")
    seen = []
    base.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    asked = [[*range(5, 105), 200 + n, 20] for n in range(4)]
    generate(base, asked, Decoding(5, temperature=1.0), 10)
    assert sum(seen) == 100 + 4 * 2 + 4 * 10 * 4  # the fifth token of an answer is not run


def test_logits_that_are_nan_are_told(base):
    with torch.no_grad():
        base.model.get_input_embeddings().weight[20] = float("nan")
    with pytest.raises((BaseModelError, RuntimeError), match=r"NaN|nan"):
        generate(base, [[5, 20]], Decoding(3, temperature=1.0), 2)
