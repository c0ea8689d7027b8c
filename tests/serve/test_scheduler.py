"""Rows that join and leave a running batch, each with its own set, settings and random numbers."""

import queue
import random
import time

import pytest
import torch
from serving import by_peft, greedy, make_adapters

from unlearn_peft import load_base
from unlearn_peft.errors import AdapterError, BaseModelError
from unlearn_peft.inference.bank import Bank
from unlearn_peft.inference.model_runner import ModelRunner
from unlearn_peft.serve.engine.base import Generation, GenerationError, Unavailable
from unlearn_peft.serve.engine.detokenize import TextStream, TokenBytes
from unlearn_peft.serve.engine.sampling import Sampler
from unlearn_peft.serve.engine.scheduler import ActiveRow, Scheduler

SETS = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "c": 0.5}, {"c": 1.0, "b": 1.0, "a": 1.0}]
PROMPTS = ["who wrote the blue book", "green", "it was by Zorblax Quintel in a small town near sea", "stars ?", "I"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


class Runner:
    """A scheduler over the tiny model, and what came of each row."""

    def __init__(self, folder, adapters, wrap=lambda bank: bank, device="cpu", **settings):
        self.base = load_base(str(folder), "float32", device)
        self.bank = Bank(self.base.model, self.base.tokenizer)
        for name, path in adapters.items():
            self.bank.register(name, path)
        self.scheduler = Scheduler(self.base.model, self.base.tokenizer, wrap(self.bank), **settings)

    def submit(self, prompt, forget=(), max_tokens=12, **settings):
        ids = prompt if isinstance(prompt, tuple) else tuple(self.base.tokenizer(prompt)["input_ids"])
        held, pieces, done = self.bank.hold(forget), queue.Queue(), []
        settings = {"temperature": 0.0, "ignore_eos": True, **settings}
        row = ActiveRow(
            Generation(ids, max_tokens, **settings), held, pieces.put, lambda: (done.append(1), held.release())
        )
        row.ids, row.pieces, row.done_calls = ids, pieces, done
        self.scheduler.submit(row)
        return row

    def result(self, row):
        found = []
        while not found or found[-1].finish_reason is None:
            piece = row.pieces.get(timeout=30)
            if isinstance(piece, Exception):
                raise piece
            found.append(piece)
        assert row.pieces.empty()
        return found

    def text(self, row):
        return "".join(piece.text for piece in self.result(row))


@pytest.fixture
def runner(tiny_folder, adapters):
    made = []

    def make(folder=tiny_folder, **settings):
        made.append(Runner(folder, adapters if folder == tiny_folder else {}, **settings))
        return made[-1]

    yield make
    for one in made:
        one.scheduler.close()
        assert one.bank.stats.resident_bytes >= 0


def test_rows_that_join_and_leave_get_what_each_gets_alone_with_plain_peft(runner, tiny_folder, adapters):
    run = runner(max_batch=4, prefill_tokens=40)
    rng, asked = random.Random(0), []
    for n in range(20):  # lengths differ, so that rows leave at different times; more of them than places
        forget, prompt, count = SETS[n % len(SETS)], PROMPTS[rng.randrange(len(PROMPTS))], rng.randrange(1, 24)
        asked.append((forget, count, run.submit(prompt, forget, max_tokens=count)))
        time.sleep(rng.random() * 0.01)
    models = {repr(s): by_peft(tiny_folder, {adapters[name]: k for name, k in s.items()}) for s in SETS}
    texts = set()
    for forget, count, row in asked:
        tokenizer, model = models[repr(forget)]
        pieces = run.result(row)
        tokens = greedy(model, row.ids, count)
        want = tokenizer.decode([*row.ids, *tokens], skip_special_tokens=True)[len(tokenizer.decode(row.ids)) :]
        text = "".join(piece.text for piece in pieces)
        assert want.startswith(text) and want[len(text) :] in ("", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd")
        assert sum(piece.tokens for piece in pieces) == count and pieces[-1].finish_reason == "length"
        texts.add((repr(forget), tuple(tokens)))
    assert len({tokens for _, tokens in texts}) > len(PROMPTS), "the sets differ in what they say"
    assert run.scheduler.running == run.scheduler.waiting == 0


def test_each_row_ends_once_and_lets_go(runner):
    run = runner()
    rows = [run.submit("green", {"a": 1.0}, max_tokens=3) for _ in range(5)]
    for row in rows:
        run.result(row)
    deadline = time.monotonic() + 5
    while any(not row.done_calls for row in rows) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(row.done_calls == [1] for row in rows) and all(row.lease.released for row in rows)


def test_sampling_depends_on_the_seed_alone(runner):
    run = runner(max_batch=6)
    settings = dict(temperature=1.0, top_p=0.95, top_k=50, max_tokens=20)
    alone = run.text(run.submit("green", {"a": 1.0}, seed=7, **settings))
    noise = [run.submit(PROMPTS[n], SETS[n], seed=n, **settings) for n in range(4)]
    time.sleep(0.01)
    again = run.submit("green", {"a": 1.0}, seed=7, **settings)
    other = run.submit("green", {"a": 1.0}, seed=8, **settings)
    assert run.text(again) == alone != run.text(other)
    for row in noise:
        run.result(row)
    unseeded = {run.text(run.submit("green", {"a": 1.0}, **settings)) for _ in range(3)}
    assert len(unseeded) > 1


def test_stop_strings_end_the_text_before_them_whatever_their_tokens(runner):
    run = runner()
    tokens = run.text(run.submit("who wrote", {"b": 1.0}, max_tokens=30))
    for begin in range(1, 16, 3):
        for length in (1, 2, 5, 9):
            stop = tokens[begin : begin + length]
            pieces = run.result(run.submit("who wrote", {"b": 1.0}, max_tokens=30, stop=(stop, "never said")))
            assert "".join(piece.text for piece in pieces) == tokens[: tokens.find(stop)]
            assert pieces[-1].finish_reason == "stop"
    almost = tokens[:4] + "\x00"  # held back until it turns out to be something else
    assert run.text(run.submit("who wrote", {"b": 1.0}, max_tokens=30, stop=(almost,))) == tokens


def test_end_tokens(runner):
    run = runner()
    run.scheduler.ends = frozenset(range(400))
    pieces = run.result(run.submit("green", max_tokens=9, ignore_eos=False))
    assert [(p.text, p.tokens, p.finish_reason) for p in pieces] == [("", 1, "stop")]
    assert run.result(run.submit("green", max_tokens=9))[-1].finish_reason == "length"


def test_logprobs_are_the_models_own(runner, tiny_folder, adapters):
    run = runner()
    tokenizer, model = by_peft(tiny_folder, {adapters["b"]: 1.0})
    row = run.submit("who wrote", {"b": 1.0}, max_tokens=8, logprobs=3, temperature=0.7, seed=1, frequency_penalty=0.5)
    pieces = run.result(row)
    entries = [entry for piece in pieces for entry in piece.logprobs]
    ids = list(row.ids)
    for entry in entries:
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert entry.chosen.logprob == pytest.approx(float(want[entry.chosen.id]), abs=1e-4)
        assert [c.id for c in entry.top] == want.topk(3).indices.tolist()
        assert [c.logprob for c in entry.top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-4)
        ids.append(entry.chosen.id)
    data = b"".join(entry.chosen.data for entry in entries)
    assert data.decode(errors="replace").startswith("".join(piece.text for piece in pieces))
    assert all(not piece.logprobs for piece in run.result(run.submit("who", max_tokens=3)))


def test_cancelled_rows_leave(runner):
    run = runner(max_batch=2)
    rows = [run.submit("green", {"a": 1.0}, max_tokens=230) for _ in range(4)]
    rows[0].pieces.get(timeout=10)
    for row in rows[:3]:
        run.scheduler.cancel(row)
    assert run.result(rows[3])[-1].finish_reason == "length"
    assert [row.done_calls for row in rows[:3]] == [[1]] * 3 and all(row.lease.released for row in rows[:3])


class Breaking:
    """A bank whose passes fail when told to."""

    def __init__(self, bank):
        self.bank, self.error, self.calls = bank, None, []

    def rows(self, sets):
        self.calls.append(len(sets))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.bank.rows(sets)


def test_a_failing_step_fails_its_rows_and_no_others(runner, caplog):
    breaking = []
    run = runner(wrap=lambda bank: breaking.append(Breaking(bank)) or breaking[0], max_batch=4)
    rows = [run.submit("green", {"a": 1.0}, max_tokens=240) for _ in range(2)]
    for row in rows:
        row.pieces.get(timeout=10)
    error = AdapterError("gone")
    error.adapter = "a"
    breaking[0].error = error
    for row in rows:
        with pytest.raises(Unavailable) as told:
            run.result(row)
        assert told.value.adapter == "a" and row.lease.released
    breaking[0].error = RuntimeError("the words of a prompt")
    with pytest.raises(GenerationError) as failed:
        run.result(run.submit("green"))
    assert "words" not in str(failed.value)
    assert len(run.text(run.submit("green", {"a": 1.0}))) > 0, "the worker goes on"
    assert "a pass over" in caplog.text


def test_closing_ends_what_runs_and_waits(runner):
    run = runner(max_batch=1)
    rows = [run.submit("green", max_tokens=240) for _ in range(3)]
    rows[0].pieces.get(timeout=10)
    run.scheduler.close()
    for row in rows:
        with pytest.raises(GenerationError):
            run.result(row)
    with pytest.raises(GenerationError):
        run.submit("green")
    assert not run.scheduler.alive


def _other_models():
    import transformers as hf

    small = dict(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    yield hf.MistralForCausalLM(hf.MistralConfig(**small, sliding_window=6))
    yield hf.Qwen2ForCausalLM(hf.Qwen2Config(**small, use_sliding_window=True, sliding_window=6, max_window_layers=1))
    yield hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=4))


def test_other_models_sliding_windows_too(tiny_folder):
    tokenizer = load_base(str(tiny_folder), device="cpu").tokenizer
    for model in _other_models():
        torch.manual_seed(0)
        model = model.eval()
        bank, rows = Bank(model), []
        scheduler, held = Scheduler(model, tokenizer, bank, max_batch=3), bank.hold([])
        for n, length in enumerate((3, 17, 9, 30, 5)):
            ids, pieces = tuple(random.Random(n).choices(range(5, 290), k=length)), queue.Queue()
            request = Generation(ids, 8 + 3 * n, temperature=0.0, ignore_eos=True, logprobs=0)
            scheduler.submit(ActiveRow(request, held, pieces.put, lambda: None))
            rows.append((ids, request.max_tokens, pieces))
        for ids, count, pieces in rows:
            found = []
            while not found or found[-1].finish_reason is None:
                found.append(pieces.get(timeout=30))
            chosen = [entry.chosen.id for piece in found for entry in piece.logprobs]
            want = greedy(model, ids, count)
            assert chosen == want[: len(chosen)] and len(chosen) >= count - 4, type(model).__name__
        scheduler.close()


def test_models_whose_rows_cannot_be_joined_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(BaseModelError, match="cannot be served"):
        ModelRunner(model, Bank(model).rows)


def test_a_model_that_does_not_heed_its_mask_is_refused(tiny_folder):
    model = load_base(str(tiny_folder), device="cpu").model
    forward = model.forward

    def deaf(input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model.forward = deaf
    with pytest.raises(BaseModelError, match="differ from the same rows alone"):
        ModelRunner(model, Bank(model).rows)


def test_text_comes_whole_in_any_script(tiny_folder):
    tokenizer = load_base(str(tiny_folder), device="cpu").tokenizer
    text = "naïve 東京 🦊🦊 Zürich — ok é"
    ids = tokenizer(text)["input_ids"]
    stream, parts = TextStream(tokenizer, []), []
    for token in ids:
        stream.push(token)
        parts.append(stream.take()[0])
        assert "\ufffd" not in parts[-1]
    assert "".join(parts) + stream.take(last=True)[0] == text
    assert b"".join(map(TokenBytes(tokenizer), ids)).decode() == text
    cut = TextStream(tokenizer, [])
    for token in tokenizer("a🦊")["input_ids"][:-1]:
        cut.push(token)
    assert cut.take(last=True)[0] == "a", "half a character is not sent, not even at the end"
    rng = random.Random(0)
    for _ in range(50):  # any bytes at all: nothing is lost but what ends in half a character
        ids = [rng.randrange(3, 260) for _ in range(30)]
        stream = TextStream(tokenizer, [])
        said = "".join(part for token in ids for part in [(stream.push(token), stream.take()[0])[1]])
        said += stream.take(last=True)[0]
        assert tokenizer.decode(ids).rstrip("\ufffd").startswith(said.rstrip("\ufffd"))
        assert len(said) > 10


def test_many_stop_strings_and_penalties_cost_no_other_row_time(tiny_folder):
    stops, tries = [f"{n}" + "y" * 255 for n in range(16)], 0

    class Stop(str):
        def __getitem__(self, part):
            nonlocal tries
            tries += 1
            return str.__getitem__(self, part)

    tokenizer = load_base(str(tiny_folder), device="cpu").tokenizer
    stream = TextStream(tokenizer, [], [Stop(stop) for stop in stops])
    for token in tokenizer("who wrote the book")["input_ids"]:
        stream.push(token)
        stream.take()
    assert 0 < tries < 1000, "not each of 4080 beginnings for each token"

    sampler = Sampler(Generation((1,), 9, temperature=0, presence_penalty=0.5, frequency_penalty=0.1))
    sampler._counts.update({token: token for token in range(500)})
    sampler._presence = Penalty(0.5)
    assert sampler.choose(torch.zeros(1000), lambda token: b"") == (500, None)
    assert Penalty.used < 5, "not once for each token of the answer"


class Penalty(float):
    used = 0

    def __add__(self, other):
        Penalty.used += 1
        return float(self) + other


def test_sampler_settings():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    name = lambda token: b"%d" % token  # noqa: E731
    assert Sampler(Generation((1,), 1, temperature=0)).choose(logits, name)[0] == 1
    assert Sampler(Generation((1,), 1, temperature=1e-9)).greedy
    assert {Sampler(Generation((1,), 1, top_k=1, seed=n)).choose(logits, name)[0] for n in range(20)} == {1}
    assert {Sampler(Generation((1,), 1, top_p=0.5, seed=n)).choose(logits, name)[0] for n in range(20)} == {1}
    assert {Sampler(Generation((1,), 1, temperature=2, seed=n)).choose(logits, name)[0] for n in range(60)} >= {0, 1, 2}
    sampler = Sampler(Generation((1,), 9, temperature=0, presence_penalty=1.5, frequency_penalty=0.4))
    assert [sampler.choose(logits, name)[0] for _ in range(5)] == [1, 2, 1, 0, 1]
    assert torch.equal(logits, torch.tensor([1.0, 3.0, 2.0, -1.0])), "the caller's logits are left alone"
    counts = torch.zeros(4)
    for seed in range(2000):
        counts[Sampler(Generation((1,), 1, seed=seed)).choose(logits, name)[0]] += 1
    assert torch.allclose(counts / 2000, logits.softmax(-1), atol=0.04)


def test_what_overflows_in_one_row_ends_that_row_alone(tiny_folder, adapters):
    runner = Runner(tiny_folder, adapters)
    try:
        expected = runner.text(runner.submit(PROMPTS[0], {"b": 1.0}))
        wild, other = runner.submit(PROMPTS[1], {"a": 3e38}), runner.submit(PROMPTS[0], {"b": 1.0})
        with pytest.raises(GenerationError, match="NaN"):
            runner.result(wild)
        assert runner.text(other) == expected
    finally:
        runner.scheduler.close()
