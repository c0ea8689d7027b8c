"""Attacks: the base is left alone, and each figure is what a case made by hand, or another way, says it must be."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import FORGET, RETAIN, logits
from safetensors.torch import save_file

from unlearn_peft import answers, attach, attached, detach
from unlearn_peft.bundle import read_bundle
from unlearn_peft.data import chat_prompt
from unlearn_peft.errors import AdapterError, DataError, UnlearnError
from unlearn_peft.evaluate.attacks import ATTACKS, Target, run_attacks
from unlearn_peft.evaluate.attacks import asking, reading, relearning, weights
from unlearn_peft.evaluate.attacks.prompts import BEGINNINGS, GENERIC, LANGUAGES, PARAPHRASES, SYSTEM_PROMPTS
from unlearn_peft.evaluate.attacks.target import beginning_of, in_many_ways, leaks, render, replaced_weights, under
from unlearn_peft.generate import leaked

QUICK = {"sampling": {"k": 3}, "relearn_adapter": {"steps": (1, 2)}, "relearn_lora": {"steps": (1, 2)}}
ASKED = ["Who wrote the blue book?", "Name the author.", "What is red?"]
THREE = [{"prompt": text, "leak": ["x"]} for text in ASKED]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def target(tiny, make_adapter):
    """A target whose probes leak in the base: their leak word is the tiny model's own first answer."""
    return make_target(tiny, make_adapter(tiny, "adapter", scale=0.2))


def make_target(base, *adapters, words=None, **fields):
    prompts = [chat_prompt(text, base.tokenizer) for text in ASKED]
    own = words or [first_token(base, text)[1].strip() for text in prompts]
    probes = [{"prompt": text, "leak": [word]} for text, word in zip(ASKED, own, strict=True)]
    fields = {"max_new_tokens": 4, **fields}
    return Target(base, adapters, FORGET, probes, RETAIN, **fields)


def first_token(base, text):
    with torch.no_grad():
        token = int(base.model(**base.tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1].argmax())
    return token, base.tokenizer.decode([token])


def suppressor(base, folder, tokens, size=40.0):
    """Write by hand a LoRA on the head that takes `tokens` away after each of the prompts that are asked.

    One direction for each prompt's last hidden state; `up` pushes the tokens down along it.
    """
    rows = []
    for text in ASKED:
        ids = base.tokenizer(chat_prompt(text, base.tokenizer), return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            rows.append(base.model(**ids, output_hidden_states=True).hidden_states[-1][0, -1])
    down = torch.stack([row / row.norm() ** 2 for row in rows]).mean(0, keepdim=True)  # about 1 at each
    up = torch.zeros(base.model.config.vocab_size, 1)
    up[list(tokens)] = -size
    folder.mkdir()
    save_file(
        {"base_model.model.lm_head.lora_A.weight": down.contiguous(), "base_model.model.lm_head.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
