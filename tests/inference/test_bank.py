"""A set of adapters for each row of a batch: every row is what it would be alone, through plain PEFT."""

import asyncio
import gc
import random
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unlearn_peft import Bank, attach, detach, load_base
from unlearn_peft.errors import AdapterError
from unlearn_peft.inference.multi_lora import AdapterBatch, LoadedAdapter, WeightedAdapter

STRENGTHS = {"a": 1.0, "b": 1.0, "c": 0.25, "d": -1.5}
ADAPTERS = {
    "a": dict(targets=("q_proj", "down_proj"), r=4, seed=1, scale=0.1),
    "b": dict(targets=("lm_head", "q_proj"), r=3, seed=2, scale=0.1),
    "c": dict(targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), r=2, seed=3),
    "d": dict(targets=("v_proj",), r=8, seed=4, scale=0.2),
}


@pytest.fixture
def paths(tiny, make_adapter):
    return {name: make_adapter(tiny, name, **how) for name, how in ADAPTERS.items()}


@pytest.fixture
def bank(tiny, paths):
    bank = Bank.of(tiny)
    for name, path in paths.items():
        bank.load(name, path)
    yield bank
    for name in bank.known:
        bank.remove(name)
    assert not [m for m in tiny.model.modules() if m._forward_hooks or m._forward_pre_hooks]


def padded(rows, left=True):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[n, where], mask[n, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def through_peft(base, paths, sets, rows):
    """Return the logits of each row alone, with its set on the base through PEFT."""
    from peft import PeftModel

    found, model = [], None
    for name in {name for chosen in sets for name in chosen}:
        if model is None:
            model = PeftModel.from_pretrained(base.model, paths[name], adapter_name=name)
        else:
            model.load_adapter(paths[name], name)
    for chosen, row in zip(sets, rows, strict=True):
        ids = torch.tensor([row])
        if not chosen:
            with model.disable_adapter() if model else torch.no_grad():
                found.append(base.model(ids).logits[0])
            continue
        model.base_model.set_adapter(list(chosen))
        for name, strength in chosen.items():
            for layer in model.modules():
                if hasattr(layer, "set_scale") and name in layer.scaling:
                    layer.set_scale(name, strength)
        found.append(base.model(ids).logits[0])
    if model is not None:
        model.unload()
        base.model.__dict__.pop("peft_config", None)
    return found


sets_ = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1.0, 0.25, 1.5, -0.5, 0.0]), max_size=4)
rows_ = st.lists(
    st.tuples(sets_, st.lists(st.integers(3, 300), min_size=1, max_size=7)), min_size=1, max_size=6
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_, st.booleans())
def test_each_row_is_what_it_is_alone_through_peft(tiny, paths, bank, given_rows, left):
    sets, rows = [s for s, _ in given_rows], [row for _, row in given_rows]
    batch = padded(rows, left)
    with torch.no_grad():
        plain = tiny.model(**batch).logits
        with bank.rows(sets):
            found = tiny.model(**batch).logits
        again = tiny.model(**batch).logits
    assert torch.equal(plain, again)
    expected = through_peft(tiny, paths, sets, rows)
    for n, chosen in enumerate(sets):
        own = found[n][batch["attention_mask"][n].bool()]
        assert (own - expected[n]).abs().max() <= 1e-5 * expected[n].abs().max()
        if not any(chosen.values()):
            assert torch.equal(found[n], plain[n])


@pytest.mark.parametrize("limit", [0, 1e9], ids=["gated", "by row"])
def test_both_ways_give_the_same(tiny, paths, bank, limit, monkeypatch):
    monkeypatch.setattr("unlearn_peft.inference.multi_lora._BY_ROW_UP_TO", limit)
    sets, rows = [{"a": 1}, {"a": 0.5, "c": 1}, {}, {"b": 1, "d": -1}], [[5, 6], [7, 8, 9], [5], [9, 9, 9, 9]]
    batch = padded(rows)
    with torch.no_grad(), bank.rows(sets):
        found = tiny.model(**batch).logits
    for own, mask, expected in zip(found, batch["attention_mask"], through_peft(tiny, paths, sets, rows), strict=True):
        assert (own[mask.bool()] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dense_heads_by_row(tiny, bank, tmp_path):
    """A dense delta on the head is added to those rows that have it, at their strength."""
    from safetensors.torch import save_file

    weight = tiny.model.get_output_embeddings().weight
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    (tmp_path / "dense").mkdir()
    save_file({"base_model.model.lm_head.dense_head_delta": delta}, tmp_path / "dense/adapter_model.safetensors")
    (tmp_path / "dense/adapter_config.json").write_text('{"peft_type": "DENSE_HEAD"}')
    bank.load("dense", tmp_path / "dense")
    batch = padded([[5, 6], [7, 8], [9, 9]])
    with torch.no_grad():
        plain = tiny.model(**batch)
        final = tiny.model.model(**batch).last_hidden_state
        with bank.rows([{"dense": 0.5, "d": 0}, [], ["dense"]]):
            mixed = tiny.model(**batch)
    assert torch.equal(mixed.logits[1], plain.logits[1])
    for n, strength in ((0, 0.5), (2, 1.0)):
        expected = plain.logits[n] + strength * final[n] @ delta.T
        torch.testing.assert_close(mixed.logits[n], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


SETS = [["a"], ["a", "c"], [], {"b": 1, "d": -1}]
PROMPTS = [[5, 6, 7], [8, 9], [5], [40, 41, 42, 43, 44]]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_gives_each_row_what_it_gets_alone(tiny, bank, how):
    common = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    batch = padded(PROMPTS)
    del batch["position_ids"]
    found = bank.generate(**batch, forget=SETS, **common)
    many = how.get("num_return_sequences", 1)
    outcomes = set()
    for n, (chosen, prompt) in enumerate(zip(SETS, PROMPTS, strict=True)):
        alone = bank.generate(torch.tensor([prompt]), forget=[chosen], **common)
        new = alone[:, len(prompt) :]
        assert torch.equal(found[n * many : (n + 1) * many, batch["input_ids"].shape[1] :], new)
        outcomes.add(str(new.tolist()))
    assert len(outcomes) == len(SETS)


def test_assisted_decoding_gives_what_plain_decoding_gives(tiny, bank, tmp_path):
    """What an assistant guesses is checked by the model, with the row's set: it cannot bring back the forgotten."""
    from conftest import make_tiny

    helper = load_base(str(make_tiny(tmp_path / "helper", seed=0))).model  # the same weights: a leaky assistant
    prompt, common = torch.tensor([PROMPTS[3]]), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = bank.generate(prompt, forget=[["a", "b"]], **common)
    assert torch.equal(bank.generate(prompt, forget=[["a", "b"]], assistant_model=helper, **common), plain)
    assert torch.equal(bank.generate(prompt, forget=[["a", "b"]], prompt_lookup_num_tokens=3, **common), plain)
    assert not torch.equal(bank.generate(prompt, forget=[[]], **common), plain)


def test_other_layers_and_bases(make_adapter, tmp_path):
    """GPT-2's transposed linear layers, and a base in bfloat16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=100)).eval()
    base = type("", (), {"model": model})()
    path = make_adapter(base, "gpt2", targets=("c_attn", "c_fc"))
    bank, batch = Bank(model), padded([[1, 2], [3, 4]])
    assert '"fan_in_fan_out": true' in (path / "adapter_config.json").read_text()  # PEFT writes it for Conv1D
    bank.load("g", path)
    with torch.no_grad():
        plain = model(**batch).logits
        with bank.rows([["g"], []]):
            mixed = model(**batch).logits
    assert torch.equal(mixed[1], plain[1]) and not torch.allclose(mixed[0], plain[0])


def test_bfloat16(tiny_folder, paths):
    base = load_base(str(tiny_folder), "bfloat16")
    bank, batch = Bank.of(base), padded(PROMPTS)
    for name, path in paths.items():
        bank.load(name, path)
    with torch.no_grad():
        plain = base.model(**batch).logits
        with bank.rows(SETS):
            mixed = base.model(**batch).logits
        with bank.rows([SETS[1]]):
            alone = base.model(**batch).logits
    assert torch.equal(mixed[2], plain[2])
    torch.testing.assert_close(mixed[1], alone[1], rtol=0.05, atol=0.05 * float(alone[1].abs().max()))


def test_row_sets_take_the_place_of_what_is_attached(tiny, paths):
    bank, batch = Bank.of(tiny), padded([[5, 6], [7, 8]])
    with torch.no_grad():
        plain = tiny.model(**batch).logits
        attach(tiny, paths["a"])
        all_rows = tiny.model(**batch).logits
        with bank.rows([["a"], []]):
            mixed = tiny.model(**batch).logits
        assert torch.equal(tiny.model(**batch).logits, all_rows)
        detach(tiny)
    assert torch.equal(mixed[1], plain[1])
    torch.testing.assert_close(mixed[0], all_rows[0], rtol=0, atol=1e-5 * all_rows[0].abs().max().item())


def test_a_copy_of_a_model_has_a_bank_of_its_own(tiny, bank):
    import copy

    other = copy.deepcopy(tiny.model)
    assert Bank.of(other) is not bank and Bank.of(other).model is other and Bank.of(tiny) is bank


def test_refusals_say_what_to_do(tiny, bank, paths, tmp_path):
    with pytest.raises(AdapterError, match="no adapter named 'aa' is known.*did you mean 'a'") as refused:
        bank.hold(["b", "aa"])
    assert refused.value.adapter == "aa"
    with pytest.raises(AdapterError, match=r"write \['a'\]"):
        bank.hold("a")
    with pytest.raises(AdapterError, match="known already"):
        bank.load("a", paths["b"])
    with pytest.raises(AdapterError, match="no adapter at"):
        bank.load("new", tmp_path / "none")
    assert "new" not in bank.known
    with pytest.raises(AdapterError, match="no adapter at"):
        bank.swap("a", tmp_path / "none")
    with pytest.raises(AdapterError, match="has the digest"):
        bank.load("new", paths["a"], sha256="0" * 64)
    with bank.rows([["a"], ["b"]]), pytest.raises(AdapterError, match="2 sets of adapters for a batch of 3 rows"):
        tiny.model(torch.tensor([[1], [2], [3]]))
    with pytest.raises(AdapterError, match="one for each row"), bank.rows([]):
        pass
    held = bank.hold(["a"])
    held.release()
    with pytest.raises(AdapterError, match="released"), bank.rows([held]):
        pass
    assert bank.stats.resident == 4 and all(a.pins == 1 for a in bank.cache._loaded.values())


def test_experts_tokens_are_not_guessed_to_be_rows():
    from unlearn_peft.adapters.bundle import Bundle, Delta

    deltas = {"expert": Delta(torch.ones(2, 1), torch.ones(1, 2))}
    mix = AdapterBatch([[WeightedAdapter(LoadedAdapter(Bundle(None, {}, deltas, {}, "x", "x"), deltas), 1.0)], []])
    with pytest.raises(AdapterError, match="cannot be told apart"):
        mix.add("expert", torch.ones(5, 2), torch.ones(5, 2))


def test_a_set_is_told_by_its_content(bank, paths):
    """The digest of a held set: names do not count, strengths and contents do."""
    bank.load("also a", paths["a"])
    digests = []
    for one in (["a", "b"], ["b", "also a"], {"a": 0.5, "b": 1}, ["a"], [], {"a": 0, "b": 1}, ["b"]):
        with bank.hold(one) as held:
            digests.append(held.digest)
    assert digests[0] == digests[1] and digests[4] == "" and digests[5] == digests[6]
    assert len(set(digests)) == 5
    with bank.hold({"a": 0.5}) as held:
        (applied,) = held.applied
    assert (applied.name, applied.strength) == ("a", 0.5) and len(applied.sha256) == 64


def test_an_adapter_that_is_swapped_or_removed_goes_when_its_last_request_ends(tiny, bank, paths):
    batch = padded([[5, 6, 7]])

    def logits():
        with torch.no_grad():
            return tiny.model(**batch).logits

    held = bank.hold(["a"])
    with bank.rows([held]):
        first = logits()
        gone = weakref.ref(held.parts[0].adapter)
        bank.swap("a", paths["b"])
        assert torch.equal(logits(), first)  # the same version to its end
    with bank.rows([["a"]]):
        assert not torch.equal(logits(), first)
    with bank.rows([["b"]]):
        second = logits()
    with bank.rows([["a"]]):
        assert torch.equal(logits(), second)
    held.release()
    del held
    gc.collect()
    assert gone() is None
    with bank.rows([["d"]]):
        bank.remove("d")
        assert not torch.equal(logits(), second)
    with pytest.raises(AdapterError, match="no adapter named 'd'"):
        bank.hold(["d"])
    bank.load("d", paths["d"])


def test_a_budget_keeps_the_latest_used(tiny, paths):
    size = {}
    for name, path in paths.items():
        bank = Bank(tiny.model)
        bank.load(name, path)
        size[name] = bank.stats.resident_bytes
        bank.remove(name)
    bank = Bank(tiny.model, budget_bytes=size["a"] + size["b"] + size["c"])
    for n in range(50):
        for name, path in paths.items():
            bank.register(f"{name}{n}", path)
    assert bank.stats.resident == 0 and bank.stats.registered == 200
    for n in range(3):
        for name in "ab":
            bank.hold([f"{name}{n}"]).release()
    assert bank.stats.resident_bytes <= bank.stats.budget_bytes and bank.stats.evictions > 0
    held = bank.hold(["a0", "b0", "c0"])
    with pytest.raises(AdapterError, match="no room for the adapter 'd0'.*raise the budget") as refused:
        bank.hold(["d0"])
    assert refused.value.adapter == "d0"
    held.release()
    bank.hold(["d0"]).release()
    before = bank.stats.loads
    bank.hold(["d0"]).release()
    assert bank.stats.loads == before
    for name in bank.known:
        bank.remove(name)
    assert bank.stats.resident == 0 and not [m for m in tiny.model.modules() if m._forward_hooks]


@torch.no_grad()
def test_threads_never_mix_their_sets_while_adapters_come_and_go(tiny, bank, paths):
    """Each batch gives what it gives without company; sets differ in their logits by far more than the tolerance."""
    sets = [["a"], ["b"], ["a", "c"], [], {"d": 0.5}, ["c", "d"]]
    batch = padded([[5, 6, 7], [8, 9]])
    expected = {}
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            with bank.rows([one, other]):
                expected[i, j] = tiny.model(**batch).logits
    failures, done = [], threading.Event()

    def ask(seed):
        draw = random.Random(seed)
        try:
            with torch.no_grad():
                for _ in range(60):
                    i, j = draw.randrange(len(sets)), draw.randrange(len(sets))
                    with bank.rows([sets[i], sets[j]]):
                        found = tiny.model(**batch).logits
                    if (found - expected[i, j]).abs().max() > 1e-5 * expected[i, j].abs().max():
                        failures.append((i, j))
        except BaseException as error:  # an assertion in a thread would be lost
            failures.append(error)

    def disturb():
        n = 0
        while not done.is_set():
            n += 1
            bank.load(f"x{n}", paths["c"])
            bank.swap("a", paths["a"])  # the same content: answers must not change
            with bank.rows([[f"x{n}"]]):
                bank.remove(f"x{n}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    other = threading.Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not failures


@torch.no_grad()
def test_tasks_never_mix_their_sets(tiny, bank):
    batch = padded([[5, 6, 7]])

    async def ask(chosen):
        found = []
        with bank.rows([chosen]):
            for _ in range(3):
                found.append(tiny.model(**batch).logits)
                await asyncio.sleep(0)
        found.append(tiny.model(**batch).logits)
        return found

    async def all_of_them():
        return await asyncio.gather(*map(ask, (["a"], [], ["b"], ["a", "d"])))

    plain = tiny.model(**batch).logits
    answers = asyncio.run(all_of_them())
    firsts = [found[0] for found in answers]
    for found in answers:
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and torch.equal(found[3], plain)
    assert torch.equal(firsts[1], plain)
    assert not any(torch.equal(firsts[i], firsts[j]) for i in range(4) for j in range(i))


def test_real_model(smol, make_adapter):
    """SmolLM2 in one batch: two sets and a plain row, each as alone through PEFT."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    paths = {
        "x": make_adapter(smol, "x", targets=targets, r=8, seed=1, scale=0.02),
        "y": make_adapter(smol, "y", targets=("q_proj", "lm_head"), r=4, seed=2, scale=0.02),
    }
    bank = Bank.of(smol)
    for name, path in paths.items():
        bank.load(name, path)
    sets, rows = [{"x": 1}, {"x": 0.5, "y": 1}, {}], [[20, 900, 31, 7], [5, 6], [900, 20, 4]]
    batch = padded(rows)
    with torch.no_grad():
        plain = smol.model(**batch).logits
        with bank.rows(sets):
            found = smol.model(**batch).logits
    for name in paths:
        bank.remove(name)
    assert torch.equal(found[2], plain[2])
    for own, mask, expected in zip(found, batch["attention_mask"], through_peft(smol, paths, sets, rows), strict=True):
        assert (own[mask.bool()] - expected).abs().max() <= 1e-5 * expected.abs().max()
