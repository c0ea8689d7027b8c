"""Short chat templates in the form of well-known ones, with tokenizers that have their special tokens."""

import copy

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA31 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last or r %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINYLLAMA = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OLD_CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>You are a model.<|end|>' }}{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else "
    "'<|end|>') }}{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# template, BOS, EOS, further special tokens, and what ends an answer: text of the end, and its token
FAMILIES = {
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "phi": (PHI, "<s>", "<|endoftext|>", ["<|end|>", "<|user|>", "<|assistant|>"], "<|end|>"),
    "llama2": (LLAMA2, "<s>", "</s>", [], "</s>"),
    "llama31": (
        LLAMA31, "<|begin_of_text|>", "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
    ),
    "qwen3": (QWEN3, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "tinyllama": (TINYLLAMA, "<s>", "</s>", [], "</s>"),
    "old chatml": (OLD_CHATML, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "deepseek r1": (DEEPSEEK_R1, "<s>", "</s>", ["<|User|>", "<|Assistant|>", "<think>", "</think>"], "</s>"),
    "gpt-oss": (
        HARMONY, "<|startoftext|>", "<|return|>",
        ["<|start|>", "<|end|>", "<|channel|>", "<|message|>"], "<|return|>",
    ),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], "</s>"),
}  # fmt: skip


def family(tokenizer, name):
    """Return a copy of the tokenizer with a family's template and special tokens; those with a BOS add it to a text."""
    from tokenizers.processors import TemplateProcessing

    template, bos, eos, others, _ = FAMILIES[name]
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
    made.add_tokens(others, special_tokens=True)
    made.chat_template = template
    if bos:
        special = [(bos, made.convert_tokens_to_ids(bos))]
        made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    else:
        made.bos_token = None
    return made
