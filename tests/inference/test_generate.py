"""Answers: plain whatever the model's generation_config says, and ended where the base's own answers end."""

import copy

import pytest

from unlearn_peft.inference.generate import answers, sampled
from unlearn_peft.models.base import Base


@pytest.mark.parametrize("setting", [{"min_p": 0.9}, {"repetition_penalty": 1.9}, {"suppress_tokens": [5, 6, 7]}])
def test_neither_samples_nor_greedy_answers_obey_the_models_generation_config(tiny, setting):
    def asked():
        greedy = answers(tiny, ["Who wrote the blue book?"], max_new_tokens=8)
        return greedy, sampled(tiny, ["Who wrote the blue book?"], count=20, max_new_tokens=3, seed=1)

    plain = asked()
    for name, value in setting.items():
        setattr(tiny.model.generation_config, name, value)
    config = tiny.model.generation_config
    assert asked() == plain and tiny.model.generation_config is config


def test_a_base_without_a_template_stops_before_the_next_question(tiny, monkeypatch):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = None
    base = Base(tiny.model, tokenizer, "plain")
    said = tokenizer(" A red book.\nQuestion: Who else?\nAnswer: Zorblax")["input_ids"]
    asked = []

    def generate(base, prompts, how, count, seed):
        asked.append(tokenizer.decode(prompts[0]))
        answer = [said[: n + 1] for n in range(len(said)) if how.is_over(said[: n + 1])]
        asked.append(len(answer[0]) if answer else len(said))
        return [[(answer or [said])[0]]]

    monkeypatch.setattr("unlearn_peft.inference.generate.generate", generate)
    assert answers(base, ["Who?"]) == ["A red book."]
    assert asked[0] == "Question: Who?\nAnswer:" and asked[1] < len(said)
    assert answers(base, ["Who?"], chat_template=False)[0].endswith("Zorblax"), "bare text has no next question"


def test_the_head_gets_the_last_states_of_several_prompts_in_one_piece(tiny):
    """Of a slice PyTorch had made a copy of the head's weight for each row: gigabytes, and most of the time."""
    strides = []
    seen = tiny.model.lm_head.register_forward_hook(lambda _, inputs, __: strides.append(inputs[0].is_contiguous()))
    hooks = len(tiny.model.lm_head._forward_pre_hooks)
    sampled(tiny, ["Who wrote the blue book?", "Who?"], count=3, max_new_tokens=2)
    seen.remove()
    assert strides and all(strides) and len(tiny.model.lm_head._forward_pre_hooks) == hooks
