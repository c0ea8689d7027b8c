"""`response_format`: answers that are JSON of a schema, with random models of several families; hostile schemas."""

import json
import threading
import time
from contextlib import suppress

import jsonschema
import openai
import pytest
import torch
from models.families import tiny_base
from serving import client, make_policy_values, running

from unlearn_peft import load_base
from unlearn_peft.serve.engine import schema_trial
from unlearn_peft.serve.engine.base import FormatError
from unlearn_peft.serve.engine.grammar import Grammars
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits

MODEL = "tiny"
BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12}, "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "colour": {"enum": ["red", "blue", "größer"]},
        "notes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "by": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/author"}]},
    },
    "required": ["title", "year", "colour", "by"],
    "additionalProperties": False,
    "$defs": {"author": {"type": "object", "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"}},
                         "required": ["name"], "additionalProperties": False}},
}  # fmt: skip


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


@pytest.fixture(scope="module")
def shared(tiny_folder):
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL, max_batch=4)
    policy = make_policy_values({}, {"alice": {}, "bob": {}})
    with running(engine, policy, limits=Limits(batch=4)) as (handler, url):
        yield handler, url


def chat(ask, schema=None, **settings):
    settings = {"max_tokens": 200, "response_format": json_schema(schema) if schema else openai.omit, **settings}
    return ask.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a book"}], **settings)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3_text", "phi3", "gpt_neox"])
def test_random_models_write_json_of_the_schema(family, tiny_folder):
    base = tiny_base(family, load_base(str(tiny_folder)).tokenizer)
    with running(LocalEngine(base, name=MODEL), make_policy_values({}, {"alice": {}})) as (_, url):
        for seed in range(4):
            choice = chat(client(url), BOOK, seed=seed, temperature=1.5).choices[0]
            jsonschema.validate(json.loads(choice.message.content), BOOK)
            assert choice.finish_reason == "stop"


def test_an_answer_that_is_cut_is_a_beginning(shared):
    choice = chat(client(shared[1]), BOOK, max_tokens=5).choices[0]
    assert choice.finish_reason == "length" and choice.message.content.startswith("{")
    with pytest.raises(ValueError):
        json.loads(choice.message.content)


def test_any_object(shared):
    settings = {"response_format": {"type": "json_object"}, "max_tokens": 220, "temperature": 0.1}
    answers = [chat(client(shared[1]), seed=seed, **settings).choices[0] for seed in range(12)]
    whole = [json.loads(a.message.content) for a in answers if a.finish_reason == "stop"]
    assert all(a.message.content.startswith("{") for a in answers) and all(isinstance(one, dict) for one in whole)


def test_completions_and_streams(shared):
    ask = client(shared[1])
    settings = {"model": MODEL, "prompt": "a book:", "max_tokens": 200, "seed": 3}
    whole = ask.completions.create(**settings, extra_body={"response_format": json_schema(BOOK)}).choices[0].text
    jsonschema.validate(json.loads(whole), BOOK)
    events = chat(ask, BOOK, seed=3, stream=True)
    parts = [event.choices[0] for event in events]
    text = "".join(part.delta.content or "" for part in parts)
    jsonschema.validate(json.loads(text), BOOK)
    assert len(parts) > 4 and parts[-1].finish_reason == "stop"
    assert text == chat(ask, BOOK, seed=3).choices[0].message.content


def test_several_answers_to_a_prompt_keep_apart(shared):
    answers = chat(client(shared[1]), BOOK, n=3, seed=1, temperature=1.5).choices
    texts = [answer.message.content for answer in answers]
    assert len(set(texts)) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), BOOK)


def test_logprobs_are_of_the_model_and_not_of_what_was_left(shared, tiny_folder):
    choice = chat(client(shared[1]), BOOK, logprobs=True, top_logprobs=2, temperature=0, max_tokens=3).choices[0]
    base = load_base(str(tiny_folder), device="cpu")
    from unlearn_peft.data.prompt import ask

    ids = base.tokenizer(ask([{"role": "user", "content": "a book"}], base.tokenizer), add_special_tokens=False)
    with torch.no_grad():
        values = base.model(input_ids=torch.tensor([ids["input_ids"]])).logits[0, -1].log_softmax(-1)
    first = choice.logprobs.content[0]
    assert bytes(first.bytes).startswith(b"{") and first.logprob < first.top_logprobs[0].logprob
    assert first.top_logprobs[0].logprob == pytest.approx(float(values.max()), abs=1e-4)
    token = next(n for n in range(len(values)) if base.tokenizer.decode([n]) == first.token)
    assert first.logprob == pytest.approx(float(values[token]), abs=1e-4)


def test_rows_beside_it_answer_bit_for_bit_as_without(tiny_folder):
    """The same four rows, one of them with a schema that allows everything it says, or refused in the middle."""
    import asyncio

    from unlearn_peft.serve.engine.base import Generation
    from unlearn_peft.serve.engine.scheduler import ActiveRow

    def answers(grammar):
        engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name=MODEL, max_batch=4)
        compiled = asyncio.run(_compiled(engine, grammar))
        lease = engine.bank.hold({})
        rows, chunks, logits = [], [[] for _ in range(4)], []
        prefill, step = engine.scheduler._runner.prefill, engine.scheduler._runner.step

        def kept(run):
            def running(*arguments):
                out = run(*arguments)
                logits.append((out[1] if isinstance(out, tuple) else out)[:3].clone())
                return out

            return running

        engine.scheduler._runner.prefill, engine.scheduler._runner.step = kept(prefill), kept(step)
        for n in range(4):
            more = {"grammar": compiled, "temperature": 0.0} if n == 3 else {"seed": n}
            request = Generation(tuple(range(5 + n, 12)), 12, ignore_eos=True, logprobs=2, **more)
            rows.append(ActiveRow(request, lease, chunks[n].append, lambda: None))
        with engine.scheduler._wake:  # all join in one prefill
            for row in rows:
                row.text = _text(engine, row)
            engine.scheduler._waiting.extend(rows)
            engine.scheduler._wake.notify()
        deadline = time.monotonic() + 60
        while not all(row.ended for row in rows) and time.monotonic() < deadline:
            time.sleep(0.01)
        asyncio.run(engine.close())
        return chunks, logits

    def _text(engine, row):
        from unlearn_peft.serve.engine.detokenize import TextStream

        return TextStream(engine.scheduler._tokenizer, row.request.ids, ())

    async def _compiled(engine, grammar):
        return None if grammar is None else engine.compile(json.dumps(grammar))

    plain, without = answers(None)
    constrained, with_schema = answers({"type": "string"})
    assert plain[:3] == constrained[:3] and plain[3] != constrained[3]
    assert len(without) == len(with_schema) and torch.equal(without[0], with_schema[0])
    assert not isinstance(constrained[3][-1], Exception)


NONSENSE = [
    ({"type": "foo"}, "Invalid type"),
    ({"$ref": "#"}, "cannot be used"),
    ({"$ref": "http://127.0.0.1:9/schema"}, "not present"),
    ({"$ref": "file:///etc/passwd"}, "not present"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable"),
    ({"not": {"type": "string"}}, "Unimplemented"),
]
HOSTILE = [
    ({"anyOf": [{"type": "array", "items": {"$ref": "#"}} for _ in range(200)]}, "alternatives"),
    ({"$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2600)}, "$ref": "#/$defs/d0"}, "objects"),
    ({"const": "a" * 100_000}, "bytes"),
]


@pytest.mark.parametrize("schema,reason", NONSENSE + HOSTILE)
def test_a_schema_that_cannot_be_used_is_refused_and_says_why(shared, schema, reason):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client(shared[1]), schema)
    assert refused.value.code == "invalid_response_format" and reason in str(refused.value)


def test_a_deep_schema_is_refused(shared):
    schema = {"type": "string"}
    for _ in range(70):
        schema = {"type": "array", "items": schema}
    with pytest.raises(openai.BadRequestError, match="levels"):
        chat(client(shared[1]), schema)


@pytest.mark.parametrize("value", [
    {"type": "json_schema"}, {"type": "text", "json_schema": {"schema": {}}}, {"type": "xml"},
    {"type": "json_object", "x": 1}, {"type": "json_schema", "json_schema": {"schema": True}},
])  # fmt: skip
def test_other_formats_are_refused(shared, value):
    with pytest.raises(openai.BadRequestError):
        chat(client(shared[1]), response_format=value)


@pytest.mark.parametrize("refs", [990])
def test_the_deepest_schema_that_is_let_through_does_not_end_the_process(tiny_folder, refs):
    """llguidance recurses once for each reference: 2,600 of them overflow a stack of 8 MB."""
    from unlearn_peft.serve.api.json_schema import bounded_schema

    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(refs)} | {f"d{refs}": {"type": "null"}}
    half = {f"d{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}, "required": ["a"]}
            for n in range(refs // 3)} | {f"d{refs // 3}": {"type": "null"}}  # fmt: skip
    tokenizer = load_base(str(tiny_folder)).tokenizer
    grammars = Grammars(lambda: tokenizer, len(tokenizer), [2])
    for defs in (chain, half):
        text = bounded_schema({"$defs": defs, "$ref": "#/$defs/d0"})
        assert grammars.compile(text).result().start().allowed(len(tokenizer)).any()
    grammars.close()


PATTERNS = {"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(60)]}  # within all other bounds


def test_a_schema_that_takes_too_long_to_compile_is_refused_and_charged_to_its_tenant_alone(shared, monkeypatch):
    """llguidance goes on for longer than anybody waited, in a thread that nothing ends."""
    handler, url = shared
    charged, charge = [], handler._reading.charge
    monkeypatch.setattr(handler._reading, "charge", lambda *what: charged.append(what) or charge(*what))
    for n in range(2):
        with pytest.raises(openai.BadRequestError, match="too long") as refused:
            chat(client(url), {**PATTERNS, "title": str(n)})
        assert refused.value.code == "invalid_response_format"
    jsonschema.validate(json.loads(chat(client(url, "bob"), BOOK).choices[0].message.content), BOOK)
    handler._reading._charged.clear()  # or others wait for this test
    by_tenant = {name: sum(took for tenant, took in charged if tenant == name) for name in ("alice", "bob")}
    assert by_tenant["alice"] >= 2 * 4 * schema_trial.SECONDS > 0 < by_tenant["bob"]


def test_what_compiling_takes_in_its_own_threads_is_charged(shared, monkeypatch):
    handler, url = shared
    charged = []
    monkeypatch.setattr(handler._reading, "charge", lambda *what: charged.append(what))
    monkeypatch.setattr(handler.engine._grammars, "_trials", lambda schema, took: took(5.0) or True)
    for schema in (BOOK, {"type": "foo"}):  # taken, or refused
        charged.clear()
        with suppress(openai.BadRequestError):
            chat(client(url), schema, max_tokens=2)
        assert sorted(charged)[-1][0] == "alice" and max(took for _, took in charged) >= 4 * 5.0


def test_a_schema_that_passed_is_not_tried_again(tiny_folder, monkeypatch):
    tokenizer, runs, run = load_base(str(tiny_folder)).tokenizer, [], schema_trial.subprocess.run
    monkeypatch.setattr(schema_trial.subprocess, "run", lambda *a, **k: runs.append(a) or run(*a, **k))
    grammars, took = Grammars(lambda: tokenizer, len(tokenizer), [2]), []
    for _ in range(3):
        assert grammars.compile(json.dumps(BOOK), took.append).result()
    assert len(runs) == 1 and len(took) == 4 and min(took) > 0
    grammars.close()


def test_masks_that_take_long_end_their_answer_alone(shared, monkeypatch):
    """The worst schema within the bounds: others' answers go on, and this one is refused when its time is used up."""
    monkeypatch.setattr("unlearn_peft.serve.engine.grammar._BURST_SECONDS", 0.0)
    monkeypatch.setattr("unlearn_peft.serve.engine.grammar._TOKEN_SECONDS", 0.0)
    beside = []
    thread = threading.Thread(target=lambda: beside.append(chat(client(shared[1], "bob"), max_tokens=40)))
    thread.start()
    with pytest.raises(openai.BadRequestError, match="takes too long"):
        chat(client(shared[1]), BOOK)
    thread.join(60)
    assert beside[0].usage.completion_tokens == 40 or beside[0].choices[0].finish_reason == "stop"


def test_an_answer_whose_time_is_used_up_in_the_middle_is_refused_alone(shared, monkeypatch):
    from unlearn_peft.serve.engine.grammar import Constraint

    allowed, seen = Constraint.allowed, []

    def slower(self, size):
        seen.append(self)
        self._seconds -= 1.0 if len(seen) > 4 else 0.0
        return allowed(self, size)

    monkeypatch.setattr(Constraint, "allowed", slower)
    with pytest.raises(openai.APIError, match="takes too long"):
        chat(client(shared[1]), BOOK)
    assert len(seen) == 5
    monkeypatch.undo()
    jsonschema.validate(json.loads(chat(client(shared[1]), BOOK).choices[0].message.content), BOOK)


def sentencepiece(folder):
    """A tokenizer as Llama 2's and Gemma's: words begin with a mark, other bytes are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581"]
    words += [chr(n) for n in range(33, 127)]
    pairs = [("{", '"'), ('"', ":"), ("b", "l"), ("bl", "u")]
    pairs += [("\u2581", "{"), ("\u2581{", '"'), ("i", "t"), ("t", "it")]
    words += ["".join(pair) for pair in pairs]
    vocabulary = {word: n for n, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokens_of_sentencepiece(tmp_path):
    base = tiny_base("llama", sentencepiece(tmp_path))
    with running(LocalEngine(base, name=MODEL), make_policy_values({}, {"alice": {}})) as (_, url):
        for seed in range(4):
            choice = chat(client(url), BOOK, seed=seed, temperature=1.5).choices[0]
            jsonschema.validate(json.loads(choice.message.content), BOOK)


def test_a_limit_that_is_met_in_the_middle_ends_no_answer_as_if_it_were_whole(shared):
    with pytest.raises(openai.BadRequestError, match="row has"):
        chat(client(shared[1]), {"enum": [{"a": n} for n in range(700)]}, temperature=0)


def test_a_base_whose_tokens_are_no_bytes_says_so(tiny_folder):
    """As WordPiece's and CTRL's: their text is not their tokens, joined."""
    tokenizer = load_base(str(tiny_folder)).tokenizer

    class Lower:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def __call__(self, text, **settings):
            return tokenizer(text.lower(), **settings)

    with pytest.raises(FormatError, match="cannot write JSON"):
        Grammars(Lower, len(tokenizer), [2]).compile("{}").result()


@pytest.mark.parametrize("ends", [[], [2], [0, 2]])
def test_end_tokens_come_where_the_value_may_end(tiny_folder, ends):
    tokenizer = load_base(str(tiny_folder)).tokenizer
    grammars, size = Grammars(lambda: tokenizer, len(tokenizer) + 8, ends), len(tokenizer) + 8
    constraint = grammars.compile('{"type": "integer"}').result().start()
    start = constraint.allowed(size + 16)  # a head may have more rows than the tokenizer
    assert len(start) == size + 16 and not start[len(tokenizer) :].any() and not start[ends].any()
    digit = tokenizer("7", add_special_tokens=False)["input_ids"][0]
    assert start[digit] and not constraint.push(digit)
    assert constraint.allowed(size)[ends].all()
    for end in ends[:1]:
        assert constraint.push(end)
    grammars.close()


def test_what_must_come_is_long(tiny_folder):
    """A constant of many tokens is tokenized a part at a time."""
    tokenizer = load_base(str(tiny_folder)).tokenizer
    grammars = Grammars(lambda: tokenizer, len(tokenizer), [2])
    wanted = {"a": "é blue book " * 100}
    constraint, ids, ended = grammars.compile(json.dumps({"const": wanted})).result().start(), [], False
    while not ended and len(ids) < 5000:
        ids.append(int(constraint.allowed(len(tokenizer)).nonzero()[0]))
        ended = constraint.push(ids[-1])
    assert json.loads(tokenizer.decode(ids)) == wanted
    grammars.close()
