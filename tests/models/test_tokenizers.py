"""Bases whose tokenizer or positions are not what one expects: used as far as they go, refused with the reason."""

import pytest
from conftest import make_tiny

from unlearn_peft import answers, load_base, unlearn
from unlearn_peft.errors import DataError


@pytest.fixture
def changed(tmp_path):
    """Save a tiny base with its tokenizer changed, and load it."""

    def call(change):
        from transformers import AutoTokenizer

        folder = make_tiny(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return load_base(str(folder))

    return call


def test_tokens_that_the_base_has_no_embedding_for(changed, fields):
    from unlearn_peft.serve.engine.base import PromptError
    from unlearn_peft.serve.engine.encode import Prompts

    base = changed(lambda tokenizer: tokenizer.add_tokens(["Zorblax"]))
    assert answers(base, ["Who?"], max_new_tokens=2)
    for call in (lambda: unlearn(base, **fields), lambda: answers(base, ["Zorblax"])):
        with pytest.raises(
            DataError, match="(row [1-3] of the forget set|a prompt) has a token beyond the 3[0-9]+ that"
        ) as caught:
            call()
        assert "Zorblax" not in str(caught.value)
    prompts = Prompts(base.tokenizer, len(base.tokenizer) - 1, "tiny")
    for prompt in ("Zorblax", [{"role": "user", "content": "Zorblax"}]):
        with pytest.raises(PromptError):
            prompts(prompt)
    fine = [row for row in fields["forget"] if "Zorblax" not in str(row)]
    unlearn(base, **{**fields, "forget": fine, "steps": 1})


@pytest.mark.parametrize("pad", ["[PAD]", None])
def test_padding_needs_no_token_of_its_own(changed, fields, tiny, pad):
    def change(tokenizer):
        if pad:
            tokenizer.add_special_tokens({"pad_token": pad})  # without an embedding
        else:
            tokenizer.pad_token = tokenizer.eos_token = None

    prompts = ["Who?", "Who wrote the blue book about green stars?"]
    base = changed(change)
    if pad:  # else other tokens end an answer
        assert answers(base, prompts, max_new_tokens=4) == answers(tiny, prompts, max_new_tokens=4)
    assert len(answers(base, prompts, max_new_tokens=4)) == 2
    unlearn(base, **{**fields, "steps": 1})


def test_a_tokenizer_that_tells_no_places(tmp_path, fields):
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    assert len(answers(base, ["Who?"], max_new_tokens=2)) == 1
    with pytest.raises(DataError, match="ByT5Tokenizer.* fast tokenizer"):
        unlearn(base, **fields)


def test_rows_and_prompts_longer_than_the_positions(tmp_path, tiny, fields, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tiny.tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    assert len(answers(base, ["Who?", "who wrote the blue book " * 9], max_new_tokens=40)) == 2
    assert "only the end is asked" in caplog.text
    adapter = {"kind": "lora", "target_modules": ["c_fc"], "layers": "all"}
    with_answers = {**fields, "own_answers": 1, "steps": 1, "adapter": adapter}
    try:
        unlearn(base, **with_answers)
    except Exception as error:  # the objective here is that no row is too long
        assert type(error).__name__ != "IndexError"
