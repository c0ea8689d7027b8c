"""Prompts that are read in parts: the same answers, and running rows go on in between."""

import math
import queue
import random
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from serving import greedy

from unlearn_peft.inference.bank import Bank
from unlearn_peft.inference.model_runner import ModelRunner
from unlearn_peft.serve.engine import scheduler
from unlearn_peft.serve.engine.base import Generation
from unlearn_peft.serve.engine.rows import ActiveRow
from unlearn_peft.serve.engine.scheduler import Scheduler

SMALL = dict(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
FAMILIES = {
    "llama": lambda **more: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **more)),
    "mistral": lambda **more: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, **more, sliding_window=6)),
    "qwen2": lambda **more: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, **more, **SLIDING, use_sliding_window=True)),
    "gemma3": lambda **more: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, **more, **SLIDING, head_dim=8)),
    "gpt2": lambda **more: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=300, n_positions=1200, n_embd=32, n_layer=2, n_head=4)
    ),
}
SETS = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 0.5}]


def make_model(name, context=512):
    torch.manual_seed(0)
    return FAMILIES[name](max_position_embeddings=context).eval()


def make_lora(model, folder, seed):
    """Write a random LoRA on all kinds of layers, strong enough to be seen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=2 + seed, lora_alpha=8, target_modules="all-linear"))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.unload()
    model.__dict__.pop("peft_config", None)
    return folder


class Run:
    """A scheduler over a model with the adapters a and b, and what its passes were."""

    def __init__(self, model, tokenizer, adapters=None, **settings):
        self.bank, self.passes, self.charges = Bank(model), [], []
        for name, path in (adapters or {}).items():
            self.bank.register(name, path)
        self.scheduler = Scheduler(model, tokenizer, self.bank, **settings)
        runner = self.scheduler._runner
        for kind in ("prefill", "read", "append", "step"):
            setattr(runner, kind, self.noted(kind, getattr(runner, kind)))
        model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: self.tokens.append(inputs[0].numel()))
        self.tokens = []  # through the layers, by pass

    def noted(self, kind, run):
        def call(*arguments):
            before = len(self.tokens)
            found = run(*arguments)
            self.passes.append((kind, sum(self.tokens[before:])))
            return found

        return call

    def submit(self, ids, forget=(), max_tokens=6, **settings):
        pieces, held = queue.Queue(), self.bank.hold(forget)
        settings = {"temperature": 0.0, "ignore_eos": True, "logprobs": 3, **settings}
        request = Generation(tuple(ids), max_tokens, prefilled=self.charges.append, **settings)
        row = ActiveRow(request, held, pieces.put, held.release)
        row.pieces = pieces
        self.scheduler.submit(row)
        return row

    def result(self, row):
        """Return the entries of the answer's tokens, those that are part of a text."""
        found = []
        while not found or found[-1].finish_reason is None:
            piece = row.pieces.get(timeout=60)
            if isinstance(piece, Exception):
                raise piece
            found.append(piece)
        return [entry for piece in found for entry in piece.logprobs]


@contextmanager
def runs(tokenizer):
    """Yield a function that makes a `Run`; all that it made end with the block."""
    with ExitStack() as stack:

        def make(model, adapters=None, **settings):
            one = Run(model, tokenizer, adapters, **settings)
            stack.callback(one.scheduler.close)
            return one

        yield make


@pytest.fixture
def run(tiny):
    with runs(tiny.tokenizer) as make:
        yield make


def prompts(seed=0):
    rng = random.Random(seed)
    return [rng.choices(range(5, 290), k=length) for length in (70, 3, 33, 8, 9, 120, 1, 17)]


def assert_same(found, want):
    assert [entry.chosen.id for entry in found] == [entry.chosen.id for entry in want]
    for one, other in zip(found, want, strict=True):
        assert [c.id for c in one.top] == [c.id for c in other.top]
        assert [c.logprob for c in one.top] == pytest.approx([c.logprob for c in other.top], abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_read_in_parts_gets_the_same_answer(run, family, tmp_path):
    model, adapters = make_model(family), {}
    if family != "gpt2":  # its layers are no linear ones
        adapters = {name: make_lora(model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    sets = SETS if adapters else [{}]
    found = {}
    for most in (8, 1000):
        one = run(model, adapters, prefill_tokens=most, max_batch=3)
        rows = [one.submit(ids, sets[n % len(sets)]) for n, ids in enumerate(prompts())]
        found[most] = [one.result(row) for row in rows]
        read = [tokens for kind, tokens in one.passes if kind != "step"]
        assert max(read) <= 8 if most == 8 else max(read) >= 120
    for parts, whole in zip(found[8], found[1000], strict=True):
        assert_same(parts, whole)
    for ids, entries in zip(prompts()[:: len(sets)], found[8][:: len(sets)], strict=True):
        assert [entry.chosen.id for entry in entries] == greedy(model, ids, 6)[: len(entries)]


def test_running_rows_get_a_token_between_any_two_parts(run):
    one = run(make_model("llama"), prefill_tokens=16)
    first = [one.submit(ids, max_tokens=200) for ids in prompts()[3:5]]
    for row in first:
        row.pieces.get(timeout=60)
    del one.passes[:], one.charges[:]
    long = one.submit(prompts()[5] * 3, max_tokens=2)  # 360 tokens
    one.result(long)
    parts = [n for n, (kind, _) in enumerate(one.passes) if kind != "step"]
    assert len(parts) == math.ceil(360 / 16) and max(one.passes[n][1] for n in parts) == 16
    steps = [one.passes[before + 1 : after] for before, after in zip(parts, parts[1:], strict=False)]
    assert steps == [[("step", 2)]] * len(steps), "both running rows, once between two parts"
    assert len(one.charges) == len(parts), "each part is charged when it has been read"


def test_while_a_tenant_reads_prompts_others_rows_have_two_thirds_of_the_time(run, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(scheduler.time, "perf_counter", lambda: clock.now)
    one = run(make_model("llama"), prefill_tokens=16)
    runner = one.scheduler._runner
    for kind, seconds in (("prefill", 0.6), ("read", 0.6), ("append", 0.6), ("step", 0.125)):
        setattr(runner, kind, taking(clock, seconds, getattr(runner, kind)))
    first = one.submit(prompts()[3], max_tokens=400, tenant="first")
    first.pieces.get(timeout=60)
    for tenant, steps in (("first", 1), ("second", 10)):  # of one's own, and of another's
        del one.passes[:]
        one.result(one.submit(prompts()[5], max_tokens=1, tenant=tenant))
        parts = [n for n, (kind, _) in enumerate(one.passes) if kind != "step"]
        between = {after - before - 1 for before, after in zip(parts, parts[1:], strict=False)}
        assert len(parts) == math.ceil(120 / 16) and between == {steps}
    one.scheduler.cancel(first)


def taking(clock, seconds, run):
    def call(*arguments):
        clock.now += seconds
        return run(*arguments)

    return call


def test_prompts_are_read_in_turn_and_short_ones_together(run):
    one = run(make_model("llama"), prefill_tokens=16)
    ended, lock = [], one.scheduler._wake
    with lock:  # so that all are there at once
        rows = {"long": one.submit(prompts()[5], max_tokens=1)}
        rows |= {f"short {n}": one.submit(prompts()[3], max_tokens=1) for n in range(2)}
        rows |= {"later": one.submit(prompts()[3], max_tokens=1)}
        for name, row in rows.items():
            row.deliver = lambda piece, name=name, put=row.deliver: (ended.append(name), put(piece))
    for row in rows.values():
        one.result(row)
    assert ended[:2] == ["short 0", "short 1"] and ended[-1] == "long"
    assert [tokens for kind, tokens in one.passes if kind != "step"][:3] == [16, 16, 8]


def test_a_row_that_is_cancelled_is_read_no_further(run):
    one = run(make_model("llama"), prefill_tokens=8)
    keep, gone = one.submit(prompts()[3], max_tokens=300), one.submit(prompts()[5] * 3)
    keep.pieces.get(timeout=60)
    one.scheduler.cancel(gone)
    one.result(keep)
    one.scheduler.close()
    parts = sum(kind == "read" for kind, _ in one.passes)
    assert gone.ended and gone.lease.released and gone.pieces.empty() and parts < 360 / 8
    assert one.scheduler.running == 0 and gone.batch is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_rotation_depends_on_the_length_is_read_whole(run, kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, **factors}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, max_position_embeddings=512, rope_parameters=rope)).eval()
    one = run(model, prefill_tokens=8)
    assert not one.scheduler._runner.splits and ModelRunner(make_model("llama")).splits
    ids = prompts()[5]
    for _ in range(2):
        found = one.result(one.submit(ids, max_tokens=1, cache_salt="me"))
        assert [entry.chosen.id for entry in found] == greedy(model, ids, 1)[: len(found)]
    assert one.passes == [("prefill", 120)] * 2 and one.scheduler.prefixes.bytes == 0
