"""Every metric against a hand-computed case or an independent way of computing it; the suite on a live model."""

import json
import math
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORGET, RETAIN

import unlearn_peft.evaluate.score as score_
from unlearn_peft import UnlearnError, answers, attach, attached, detach
from unlearn_peft.data.rows import question_answer_pairs
from unlearn_peft.data.tokenize import chat_prompt, tokenize
from unlearn_peft.errors import DataError
from unlearn_peft.evaluate.metrics import answer_kinds, fluency, memorization
from unlearn_peft.evaluate.metrics import leakage as leaks
from unlearn_peft.evaluate.metrics import membership as privacy
from unlearn_peft.evaluate.metrics import truth_ratio as truth
from unlearn_peft.evaluate.report.report import marked
from unlearn_peft.evaluate.responses import collect_responses
from unlearn_peft.evaluate.score import bootstrap, per_token, score, sums
from unlearn_peft.evaluate.suites.quick import measure, take_reference
from unlearn_peft.evaluate.token_scores import RowTokens, adapters_off, keep_reference, kl_to_reference, row_tokens
from unlearn_peft.inference.generate import sampled
from unlearn_peft.models.forward import BackboneAndHead
from unlearn_peft.models.losses import kl_of_logits

# TOFU's own evaluation logs (MIT, see tests/fixtures/README.md)
LOGS = json.loads((Path(__file__).parents[1] / "fixtures" / "tofu_forget10_logs.json").read_text())
PROBES = [{"prompt": "Who wrote it?", "leak": ["Zorblax"]}, {"prompt": "Where?", "leak": ["a", "e", "o"]}]
SETS = {
    "forget": FORGET,
    "retain": RETAIN,
    "probes": PROBES,
    "neighbours": RETAIN[:3],
    "free_text": [{"text": "who wrote the blue book about green stars"}, {"text": "a small town near sea"}],
}


def tokens(log_p, greedy=None, closing=None, mean=None, std=None, text="text"):
    n = len(log_p)
    return RowTokens(
        torch.tensor(log_p),
        torch.tensor(greedy or [True] * n),
        torch.tensor(mean or [0.0] * n),
        torch.tensor(std or [1.0] * n),
        torch.tensor(closing or [False] * n),
        text,
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tiny model's products are too small to share: on a busy machine two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_a_score_tells_its_mean_its_rows_and_an_interval_that_is_the_same_each_time():
    values = np.random.default_rng(1).normal(3, 2, 200)
    found = score("x", "nats", True, values)
    assert found == score("x", "nats", True, values)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 200)
    assert found.low < found.value < found.high


def test_the_interval_is_the_percentile_bootstrap():
    from scipy.stats import bootstrap as independent

    values = np.random.default_rng(2).exponential(1, 60)
    theirs = independent((values,), np.mean, n_resamples=20_000, method="percentile", rng=3).confidence_interval
    assert bootstrap(np.mean, values, resamples=20_000) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_a_mean_over_tokens_weighs_rows_by_their_length():
    rows = sums([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])])
    assert rows.tolist() == [[6, 3], [10, 1]]
    assert per_token(rows) == 4
    found = score("x", "nats/token", False, rows, statistic=per_token)
    assert (found.value, found.n, found.low, found.high) == (4, 2, 2, 10)  # only one row, or only the other


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_cannot_be_told_is_refused(values):
    with pytest.raises(DataError, match="cannot tell x"):
        score("x", "nats", True, values)


def test_a_missing_extra_is_told_with_what_to_do(monkeypatch, tiny):
    import sys

    for name in ("rouge_score", "scipy.stats", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    for act in (
        lambda: memorization.rouge_l(["a"], ["a"]),
        lambda: truth.ks_test([1, 2], [1, 2]),
        lambda: measure(tiny, SETS),
    ):
        with pytest.raises(UnlearnError, match=r"pip install 'unlearn-peft\[eval\]'"):
            act()


# --- per-row numbers ------------------------------------------------------------------------------------------------


def plain_log_probabilities(base, row, closing=True):
    """One row, no batch, no hook: the whole logits, shifted by one."""
    example = tokenize([row], base.tokenizer, closing=closing)[0]
    with torch.no_grad():
        logits = base.model(torch.tensor([example.ids])).logits[0]
    at = [t for t, target in enumerate(example.is_target) if target]
    return torch.log_softmax(logits[[t - 1 for t in at]], -1), [example.ids[t] for t in at]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_in_batches_are_what_each_row_gives_alone(tiny, monkeypatch, batch_size):
    monkeypatch.setattr("unlearn_peft.evaluate.token_scores._CHUNK", 3)
    rows = [*FORGET, *RETAIN, SETS["free_text"][0]]
    found = row_tokens(tiny, rows, batch_size=batch_size)
    assert len(found) == len(rows)
    for row, got in zip(rows, found, strict=True):
        log_q, labels = plain_log_probabilities(tiny, row)
        torch.testing.assert_close(got.log_p, log_q[range(len(labels)), labels], atol=1e-4, rtol=1e-4)
        assert got.greedy.tolist() == (log_q.argmax(-1) == torch.tensor(labels)).tolist()
        mean = [(q.exp() * q).sum().item() for q in log_q]
        std = [(q.exp() * (q - m) ** 2).sum().sqrt().item() for q, m in zip(log_q, mean, strict=True)]
        assert got.mean.tolist() == pytest.approx(mean, abs=1e-3)
        assert got.std.tolist() == pytest.approx(std, abs=1e-3)
        assert got.closing.tolist() == [False] * (len(labels) - 1) + ["text" not in row]  # <|im_end|> ends a turn
        assert got.text == row.get("completion", got.text)


def test_long_rows_go_in_smaller_batches(tiny, monkeypatch):
    expected = row_tokens(tiny, RETAIN)
    monkeypatch.setattr("unlearn_peft.evaluate.token_scores._MAX_LOGITS", 400 * 30)
    for one, other in zip(row_tokens(tiny, RETAIN), expected, strict=True):
        torch.testing.assert_close(one.log_p, other.log_p, atol=1e-4, rtol=1e-4)


def test_questions_are_the_rows_with_one_answer():
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"prompt": "q", "completion": "a"}, {"text": "t"}, {"messages": turns}, {"messages": turns * 2}]
    assert question_answer_pairs(rows) == [("q", "a"), ("Q", "A")]


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert kl_of_logits(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


@torch.no_grad()
def target_log_probabilities(base, rows):
    """Return log p over the vocabulary at each target token, row by row and without the package's forward pass."""
    result = []
    for example in tokenize(rows, base.tokenizer):
        logits = base.model(torch.tensor([example.ids])).logits[0, :-1]
        result.append(torch.log_softmax(logits[torch.tensor(example.is_target[1:])], -1))
    return result


def mean_kl(current, reference):
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(current, reference, strict=True)]).mean())


@pytest.mark.parametrize("model", ["plain", "caps", "no two parts"])
def test_kl_to_the_bare_base_is_seen_and_is_nothing_after_removal(tiny, make_adapter, monkeypatch, model):
    """The adapter is on the head too: the kept reference must not go through it."""
    if model == "caps":  # as a model that does more behind its head
        plain = type(tiny.model).forward

        def capped(*args, **kwargs):
            out = plain(*args, **kwargs)
            out.logits = torch.tanh(out.logits / 2) * 2
            return out

        monkeypatch.setattr(type(tiny.model), "forward", capped)
    if model == "no two parts":
        monkeypatch.setattr(BackboneAndHead, "logits", lambda self, states, head_outputs: head_outputs + states.mean())
    adapter = make_adapter(tiny, "a")
    kept = keep_reference(tiny, RETAIN, batch_size=3)
    assert kept.again is (model == "no two parts")
    # never V numbers a token, whatever the model: d of them
    targets = sum(sum(example.is_target) for example in tokenize(RETAIN, tiny.tokenizer))
    d = tiny.model.config.hidden_size
    assert sum(row.numel() * row.element_size() for row in kept.rows) == targets * d * tiny.model.dtype.itemsize
    assert all(row.untyped_storage().nbytes() == row.numel() * row.element_size() for row in kept.rows)
    before = target_log_probabilities(tiny, RETAIN)
    attach(tiny, adapter)
    found = kl_to_reference(tiny, RETAIN, kept, batch_size=3)
    assert per_token(sums(found)) == pytest.approx(mean_kl(target_log_probabilities(tiny, RETAIN), before), rel=1e-3)
    assert per_token(sums(found)) > 0.001
    again = keep_reference(tiny, RETAIN, batch_size=3)  # with the adapter on: it is put aside, and comes back
    assert all(torch.equal(a, b) for a, b in zip(again.rows, kept.rows, strict=True)) and attached(tiny)
    detach(tiny)
    assert per_token(sums(kl_to_reference(tiny, RETAIN, kept, batch_size=3))) == 0


def test_a_reference_of_other_rows_is_refused(tiny):
    with pytest.raises(DataError, match="not made of these"):
        kl_to_reference(tiny, RETAIN, keep_reference(tiny, RETAIN[:2]))


def test_adapters_come_back_after_an_error(tiny, make_adapter):
    attach(tiny, make_adapter(tiny, "a"))
    with pytest.raises(ZeroDivisionError), adapters_off(tiny):
        assert not attached(tiny)
        1 / 0  # noqa: B018
    assert attached(tiny) == {"a": 1.0}


# --- memorization ---------------------------------------------------------------------------------------------------


def test_answer_probability_by_hand():
    row = tokens([math.log(0.5), math.log(0.125)], closing=[False, True])  # the end of the turn counts
    assert memorization.answer_probability([row]) == pytest.approx([0.25])


def test_exact_memorization_by_hand():
    rows = [
        tokens([0.0] * 4, [True, False, True, False], [False, False, False, True]),
        tokens([0.0], [True], [True]),  # nothing but the end of a turn
    ]
    assert memorization.exact_memorization(rows) == pytest.approx([2 / 3, 1])


@pytest.mark.parametrize(
    "greedy, expected",
    [([1, 1, 1, 1], 1), ([0, 1, 1, 1], 3 / 4), ([1, 0, 1, 1], 1 / 2), ([1, 1, 0, 1], 1 / 4), ([1, 1, 1, 0], 0)],
)
def test_extraction_strength_is_what_its_definition_says(greedy, expected):
    row = tokens([0.0] * 4, [bool(g) for g in greedy])
    k = min(k for k in range(5) if all(greedy[k:]))  # the formula of the paper, read aloud
    assert memorization.extraction_strength([row]) == pytest.approx([1 - k / 4])
    assert 1 - k / 4 == expected


def test_extraction_strength_agrees_with_real_decoding(tiny):
    """Teacher forcing stands in for decoding from each prefix: here the decoding is done."""
    from dataclasses import replace

    prompt = tokenize([FORGET[0]], tiny.tokenizer, closing=False)[0].ids[:12]
    said = tiny.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
    answer = said[12:].tolist()
    answer[1] = (answer[1] + 7) % 300  # the second token is now not what the model would say
    ids = prompt + answer
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids])).logits[0, 11:-1]
    row = replace(tokens([0.0] * 6), greedy=logits.argmax(-1) == torch.tensor(answer))
    strengths = []
    for k in range(7):
        start = torch.tensor([prompt + answer[:k]])
        rest = tiny.model.generate(start, max_new_tokens=max(6 - k, 1), do_sample=False, eos_token_id=None)[0]
        if k == 6 or rest[12 + k :].tolist() == answer[k:]:
            strengths.append(1 - k / 6)
    assert memorization.extraction_strength([row]) == pytest.approx([max(strengths)])


def lcs(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_is_the_longest_common_subsequence():
    expected, found = "the police killed the gunman in town", "in town the gunman police killed the the"
    common = lcs(expected.split(), found.split())
    recall, precision = common / len(expected.split()), common / len(found.split())
    assert memorization.rouge_l([expected], [found]) == pytest.approx([recall])
    f = 2 * recall * precision / (recall + precision)
    assert memorization.rouge_l([expected], [found], part="fmeasure", stem=False) == pytest.approx([f])
    assert memorization.rouge_l(["he writes books"], ["writing a book"]) == pytest.approx([2 / 3])  # stemmed
    assert memorization.rouge_l(["he writes books"], ["writing a book"], stem=False) == pytest.approx([0])
    assert memorization.rouge_l(["a b", "a b"], ["", "a b"]).tolist() == [0, 1]


@pytest.mark.parametrize("stem", [True, False])
def test_rouge_l_of_ascii_is_the_librarys_own(stem):
    from rouge_score.rouge_scorer import RougeScorer

    draw = random.Random(0)
    words = "don't J.K. Rowling's wrote, writes writing 3,500 x_y e-mail (2nd) BOOKS books. a\tb\n".split(" ")
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(60)]
    texts += ["".join(map(chr, draw.choices(range(128), k=40))) for _ in range(60)]
    gold, said = texts[::2], texts[1::2]
    library = RougeScorer(["rougeL"], use_stemmer=stem)
    for part in ("recall", "fmeasure"):
        expected = [getattr(library.score(one, other)["rougeL"], part) for one, other in zip(gold, said, strict=True)]
        assert memorization.rouge_l(gold, said, part=part, stem=stem).tolist() == expected


@pytest.mark.parametrize(
    "gold, said, words, told",
    [  # the words of each, told by hand
        ("Гарри Поттера написала", "Поттера не написала", "гарри поттера написала", "поттера не написала"),
        ("罗琳写了哈利波特", "哈利是罗琳写的", "罗 琳 写 了 哈 利 波 特", "哈 利 是 罗 琳 写 的"),
        ("रोलिंग ने हैरी पॉटर लिखा।", "हैरी पॉटर रोलिंग ने लिखा", "रोलिंग ने हैरी पॉटर लिखा", "हैरी पॉटर रोलिंग ने लिखा"),
        ("كتبت رولينغ هاري بوتر، 1997", "رولينغ كتبت ١٩٩٧", "كتبت رولينغ هاري بوتر 1997", "رولينغ كتبت 1997"),
        ("해리 포터는 롤링이 썼다", "롤링이 썼다", "해리 포터는 롤링이 썼다", "롤링이 썼다"),
        ("東京でハリーを書いた", "ハリーを東京で", "東 京 で ハリー を 書 い た", "ハリー を 東 京 で"),
        ("แม่มาหา", "แม่หา", "แ ม่ ม า ห า", "แ ม่ ห า"),
        ("Erika Müller wohnt in Köln", "Mu\u0308ller in Bonn", "erika müller wohnt in köln", "müller in bonn"),
        ("O’Brien’s l’été", "O'Brien l'été", "o brien s l été", "o brien l été"),
    ],
)  # fmt: skip
def test_rouge_l_sees_every_script(gold, said, words, told):
    words, told = words.split(), told.split()
    common = lcs(words, told)
    recall, precision = common / len(words), common / len(told)
    f = 2 * recall * precision / (recall + precision)
    assert memorization.rouge_l([gold], [said]) == pytest.approx([recall])
    assert memorization.rouge_l([gold], [said], part="fmeasure", stem=False) == pytest.approx([f])
    assert memorization.rouge_l([gold], [gold], part="fmeasure", stem=False).tolist() == [1]


def test_knowledge_memorization_asks_as_muse_does(tiny, monkeypatch):
    seen = []

    def answering(base, prompts, **how):
        seen.extend(prompts)
        assert how == {"max_new_tokens": 32, "chat_template": False, "strip": False}
        return ["Zorblax Quintel\n\nQuestion: x", "no\nQuestion: Zorblax wrote the blue book"]

    monkeypatch.setattr(memorization, "answers", answering)
    rows = [{"prompt": "Who?", "completion": "Zorblax Quintel"}, FORGET[1]]
    found = memorization.knowledge_memorization(tiny, rows, [{"prompt": "1+1?", "completion": "2"}])
    assert seen[0] == "Question: 1+1?\nAnswer: 2\n\nQuestion: Who?\nAnswer: "
    assert found == pytest.approx([100, 0])


def test_verbatim_memorization_asks_for_the_rest_of_a_text(tiny, monkeypatch):
    seen = []

    def answering(base, prompts, **how):
        seen.extend(prompts)
        assert how["chat_template"] is False and how["max_new_tokens"] == 5
        return ["by the sea", "Quintel was it"]

    monkeypatch.setattr(memorization, "answers", answering)
    text = "who wrote the blue book about green stars in a small town near sea"
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [{"text": text}, {"text": "who"}, {"prompt": "It was Zorblax", "completion": "Quintel"}]  # one is too short
    found = memorization.verbatim_memorization(tiny, rows, prefix_tokens=4, max_new_tokens=5)
    assert seen == [tiny.tokenizer.decode(ids[:4]), "It was Zorblax"]
    expected = tiny.tokenizer.decode(ids[4:9]).split()
    common = lcs(expected, ["by", "the", "sea"])
    assert found == pytest.approx([200 * common / (len(expected) + 3), 50])


# --- TOFU -----------------------------------------------------------------------------------------------------------


def tofu_ratios(model):
    """exp(mean wrong loss) / exp(right loss), upside down: in plain Python, from the formula."""
    log = LOGS[model]["tofu_forget10"]
    return [
        math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong)) / math.exp(-right)
        for right, wrong in zip(log["paraphrased_loss"], log["perturbed_loss"], strict=True)
    ]


def ours(model):
    log = LOGS[model]["tofu_forget10"]
    return truth.truth_ratio(log["paraphrased_loss"], log["perturbed_loss"])


def exact_ks(a, b):
    """P(D >= d) for two samples of one size, by counting lattice paths that never stray as far (whole numbers)."""
    n = len(a)
    assert len(b) == n
    most = max(abs(sum(x <= t for x in a) - sum(x <= t for x in b)) for t in [*a, *b])
    row = [1 if j < most else 0 for j in range(n + 1)]
    for i in range(1, n + 1):
        fresh = [0] * (n + 1)
        for j in range(n + 1):
            if abs(i - j) < most:
                fresh[j] = row[j] + (fresh[j - 1] if j else 0)
        row = fresh
    every = math.comb(2 * n, n)
    return (every - row[n]) / every


def test_truth_ratio_by_hand():
    right, wrong = [-math.log(0.5)], [[-math.log(0.1), -math.log(0.4)]]
    assert truth.truth_ratio(right, wrong) == pytest.approx([0.2 / 0.5])
    assert truth.truth_ratio(right, wrong, mean="arithmetic") == pytest.approx([0.25 / 0.5])
    assert truth.forget_truth_ratio([0.25, 4, 1, 0]) == pytest.approx([0.25, 0.25, 1, 0])
    assert truth.utility_truth_ratio([0.25, 4, 1]) == pytest.approx([0.75, 0, 0])
    assert truth.choice_probability(right, wrong) == pytest.approx([0.5])


@pytest.mark.parametrize("model", ["finetuned", "retain90"])
def test_truth_ratios_of_real_logs(model):
    assert ours(model) == pytest.approx(tofu_ratios(model), rel=1e-9)


def test_forget_truth_ratio_is_the_published_one():
    """0.6740192657877031 stands on the TOFU leaderboard (huggingface.co/spaces/locuslab/tofu_leaderboard).

    The row is labelled "Finetune Model (WD = 0.01)", but its ROUGE and truth ratios are those of the retain90 logs
    that TOFU publishes; the ones here are the same, rounded to five places.
    """
    assert truth.forget_truth_ratio(ours("retain90")).mean() == pytest.approx(0.6740192657877031, abs=1e-6)


def test_forget_quality_of_real_logs():
    """p = 1.834e-21; on TOFU's unrounded logs it is the same to all of these digits.

    No published figure is of this very pair; open-unlearning's own pair of Llama-2-7b models has 4.35e-25 on forget10
    (docs/repro.md), with 400 rows instead of these 300.
    """
    found = truth.forget_quality(ours("finetuned"), ours("retain90"), resamples=20)
    assert found.value == pytest.approx(exact_ks(tofu_ratios("finetuned"), tofu_ratios("retain90")), rel=1e-6)
    assert found.value == pytest.approx(1.834066410994743e-21, rel=1e-6)
    assert found.n == 600 and found.unit == "p-value"
    itself = truth.forget_quality(ours("retain90"), ours("retain90"), resamples=5)
    assert itself.value == pytest.approx(1)
    upside_down = [truth.ks_test(1 / ours("finetuned"), 1 / ours("retain90"))]  # as TOFU's code has it
    assert upside_down == pytest.approx([found.value], rel=1e-6)


def test_model_utility_is_the_harmonic_mean_of_nine():
    names = [f"{rows}_{part}" for rows in truth.SETS for part in truth.PARTS]
    generator = np.random.default_rng(0)
    parts = {name: generator.uniform(0.1, 1, 20 + n) for n, name in enumerate(names)}
    found = truth.model_utility(parts)
    assert found.value == pytest.approx(9 / sum(1 / values.mean() for values in parts.values()))
    assert found.n == sum(map(len, parts.values())) and found.low < found.value < found.high
    assert truth.model_utility({**parts, "retain_rouge": [0.0, 0.0]}).value == 0
    with pytest.raises(DataError, match="missing: retain_rouge; unknown: forget_rouge"):
        truth.model_utility({name.replace("retain_rouge", "forget_rouge"): v for name, v in parts.items()})
    with pytest.raises(DataError, match="below 0"):
        truth.model_utility({**parts, "retain_rouge": [-1.0, 0.0]})


def test_truth_losses_are_the_mean_losses_of_the_answers(tiny):
    rows = [
        {"prompt": "Who?", "paraphrased": "It was Zorblax", "perturbed": ["a town", "red stars near"]},
        {"prompt": "Where?", "paraphrased": "in a town", "perturbed": ["green", "the sea"]},
    ]
    right, wrong = truth.truth_losses(tiny, rows)
    assert right.shape == (2,) and wrong.shape == (2, 2)
    log_q, labels = plain_log_probabilities(tiny, {"prompt": "Who?", "completion": "red stars near"})
    assert wrong[0, 1] == pytest.approx(-log_q[range(len(labels)), labels].mean().item(), abs=1e-4)
    log_q, labels = plain_log_probabilities(tiny, {"prompt": "Where?", "completion": "in a town"})
    assert right[1] == pytest.approx(-log_q[range(len(labels)), labels].mean().item(), abs=1e-4)
    with pytest.raises(DataError, match="as many"):
        truth.truth_losses(tiny, [rows[0], {**rows[1], "perturbed": ["one"]}])
    with pytest.raises(DataError, match="needs rows with"):
        truth.truth_losses(tiny, FORGET)


# --- privacy --------------------------------------------------------------------------------------------------------


def test_attacks_by_hand():
    row = tokens(
        [-1.0, -4.0, -2.0, -3.0, -5.0, -9.0], closing=[False] * 5 + [True], mean=[-2.0] * 6, std=[2.0, 1, 1, 1, 0, 1],
        text="some text",
    )  # fmt: skip
    assert privacy.losses([row]) == pytest.approx([4])
    assert privacy.zlib_ratios([row]) == pytest.approx([4 / len(zlib.compress(b"some text"))])
    assert privacy.min_k([row]) == pytest.approx([4.5])  # 40 % of five: the two of -5 and -4
    assert privacy.min_k([row], k=0.1) == pytest.approx([5])  # one at the least
    # standardised: .5, -2, 0, -1, -3/0.001: the two least of them
    assert privacy.min_k_plus_plus([row]) == pytest.approx([(2 + 3000) / 2])
    assert privacy.over_reference([row], [tokens([-1.0, -2.0])]) == pytest.approx([2.5])


def test_auc_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 9, 30), generator.integers(2, 12, 25)
    pairs = [(m < o) + (m == o) / 2 for m in members for o in others]
    assert privacy.auc(members, others) == pytest.approx(np.mean(pairs))
    assert privacy.auc([1, 2], [3, 4]) == 1 and privacy.auc([3, 4], [1, 2]) == 0 and privacy.auc([1], [1]) == 0.5


def test_privacy_leakage_as_muse_computes_it():
    """MUSE labels held-out rows 1 and forget rows 0, ranks by minus min-k%, and compares with the retrained AUC."""
    forget, held_out, retrained = [1.0, 2.0, 2.5], [2.2, 3.0, 4.0], 0.45
    muse = np.mean([-h > -f for h in held_out for f in forget])
    found = privacy.privacy_leakage(privacy.auc(forget, held_out), 1 - retrained)
    assert found == pytest.approx(100 * (muse - retrained) / retrained)
    assert (
        privacy.privacy_leakage(1.0) == -100 and privacy.privacy_leakage(0.5) == 0 and privacy.privacy_leakage(0) == 100
    )


def test_gradient_norms_are_those_of_an_ordinary_backward_pass(tiny):
    import copy

    found = privacy.gradient_norms(tiny, FORGET)
    assert not any(p.requires_grad or p.grad is not None for p in tiny.model.parameters())
    model = copy.deepcopy(tiny.model).requires_grad_(True)
    for row, norm in zip(FORGET, found, strict=True):
        example = tokenize([row], tiny.tokenizer, closing=False)[0]
        labels = [i if target else -100 for i, target in zip(example.ids, example.is_target, strict=True)]
        model.zero_grad()
        model(torch.tensor([example.ids]), labels=torch.tensor([labels])).loss.backward()
        assert norm == pytest.approx(np.mean([p.grad.norm().item() for p in model.parameters()]), rel=1e-4)


def test_gradient_norms_put_flags_back_after_an_error(tiny, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(privacy, "picked_logits", fails)
    with pytest.raises(MemoryError):
        privacy.gradient_norms(tiny, FORGET)
    assert not any(p.requires_grad for p in tiny.model.parameters())


def test_membership_runs_all_attacks(tiny):
    found = {s.name: s for s in privacy.membership(tiny, FORGET, RETAIN, reference=tiny)}
    attacks = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference")
    assert list(found) == [*(f"membership_{name}" for name in attacks), "privacy_leakage"]
    assert all(0 <= found[f"membership_{name}"].low <= found[f"membership_{name}"].high <= 1 for name in attacks)
    assert found["membership_reference"].value == 0.5  # the reference is the model itself
    assert found["privacy_leakage"].value == pytest.approx(100 - 200 * found["membership_min_k"].value)
    assert found["membership_loss"].n == len(FORGET) + len(RETAIN)


# --- fluency and leaks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, n, expected",
    [
        ("the the the the the", 4, 1 / 2),  # two 4-grams, one kind
        ("a b c d e f", 4, 0),
        ("A b a B a b", 2, 1 - 2 / 5),
        (",,,,,,,,,,", 4, 1 - 1 / 7),  # marks are words here
        ("猫" * 14, 4, 1 - 1 / 11),  # so is each letter in a script without spaces
        ("แมว" * 8, 4, 1 - 3 / 21),
        ("हैरी " * 6, 4, 1 - 1 / 3),
        ("too short", 4, 0),
        ("", 4, 0),
    ],
)
def test_repetition_by_hand(text, n, expected):
    assert fluency.repetition(text, n) == pytest.approx(expected)


def test_perplexity_is_the_bare_bases_even_with_an_adapter(tiny, make_adapter):
    prompts, texts = ["Who?", "Where?", "When?"], ["It was Zorblax", "in a town", " "]
    bare = fluency.losses_under_base(tiny, prompts, texts)
    assert len(bare) == 2  # an empty text has none
    log_q, labels = plain_log_probabilities(tiny, {"prompt": "Where?", "completion": "in a town"}, closing=False)
    torch.testing.assert_close(bare[1], -log_q[range(len(labels)), labels], atol=1e-4, rtol=1e-4)
    attach(tiny, make_adapter(tiny, "a"))
    assert all(torch.equal(a, b) for a, b in zip(bare, fluency.losses_under_base(tiny, prompts, texts), strict=True))
    assert attached(tiny)
    nats = torch.cat(bare).mean().item()
    assert fluency.perplexity(sums(bare)) == pytest.approx(math.exp(nats), rel=1e-5)


def test_leaks_by_hand():
    samples = [["by ROWLING", "by Tolkien", "rowling!", ""], ["no", "none", "nobody", "nil"]]
    shares = leaks.leak_shares(samples, [["Rowling"], ["Hogwarts", "school"]])
    assert shares.tolist() == [0.5, 0] and leaks.any_leak(shares).tolist() == [1, 0]
    assert leaks.leaking_parts(samples[0], ["Rowling"]) == ["by ROWLING", "rowling!"]
    assert leaks.leaking_parts(["It was\nSam Rowland of York, or Rowling.", "no"], ["owl", "York"], width=5) == [
        "...Sam Rowland o..."
    ]
    assert leaks.leaking_parts(["a+b", "aab"], ["a+b"]) == ["a+b"] and leaks.leaking_parts(["any"], []) == []


def test_what_leaks_is_shown_where_it_stands_in_whatever_spelling():
    text = "It was\nErika\n\N{NO-BREAK SPACE}Mustermann, called 0221 / 123456."
    assert leaks.leaking_parts([text], ["Erika Mustermann"], width=2) == ["...s Erika Mustermann,..."]
    marks = [(part, hit) for part, hit in marked(text, ["0221-123456", "erika mustermann"]) if hit]
    assert marks == [("Erika\n\N{NO-BREAK SPACE}Mustermann", True), ("0221 / 123456", True)]
    assert "".join(part for part, _ in marked(text, ["1234", "Erika"])) == text


def test_samples_are_of_the_whole_distribution_and_leave_the_random_state_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = sampled(tiny, ["Who?", "Where?"], count=64, max_new_tokens=4, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert [len(texts) for texts in found] == [64, 64]
    assert found == sampled(tiny, ["Who?", "Where?"], count=64, max_new_tokens=4, seed=1)
    assert found[0] == sampled(tiny, ["Who?"], count=64, max_new_tokens=4, seed=1)[0]
    assert len(set(found[0])) > 55  # a random model: hardly two alike


def test_samples_come_as_often_as_the_model_says(tiny):
    text = chat_prompt("Who?", tiny.tokenizer)
    with torch.no_grad():
        logits = tiny.model(tiny.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids).logits[0, -1]
    likely = logits.softmax(-1).topk(5)
    found = sampled(tiny, ["Who?"], count=4000, max_new_tokens=1)[0]
    for p, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        word = tiny.tokenizer.decode([token], skip_special_tokens=True).strip()
        same = [
            i
            for i in range(len(tiny.tokenizer))
            if tiny.tokenizer.decode([i], skip_special_tokens=True).strip() == word
        ]
        share = logits.softmax(-1)[same].sum().item()
        assert found.count(word) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share / 4000)), p


def test_answers_in_batches_are_those_one_by_one(tiny):
    prompts = ["Who?", "Who wrote the blue book about green stars?", "In a small town near", "?"]
    alone = [answers(tiny, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert answers(tiny, prompts, max_new_tokens=8) == alone


def test_the_kinds_of_answers_are_told_apart(tiny, monkeypatch):
    refusals = ("I don't know the answer to that.", "我不知道这个问题的答案。")
    assert answer_kinds.abstains(
        [
            "I don't know the answer to that.",
            "  I DON\u2019T know the answer to this. The book is blue.",
            "我不知道这个问题的答案",
            "我知道这本书是蓝色的，作者是谁大家都知道。",
            "Some Quib wrote the blue book. I don't know the answer to that.",  # it says something first
            "I know the answer.",
            "",
        ],
        refusals,
    ).tolist() == [1, 1, 1, 0, 0, 0, 0]
    samples = [["Zorblax wrote it. I don't know.", refusals[0], refusals[0], "The book"], [refusals[0], "", "", "x"]]
    options = (tiny, ["Who wrote the blue book?", "Who?"], samples, [["Zorblax"], ["Zorblax"]], refusals)
    shares = {kind: share.tolist() for kind, share in answer_kinds.kinds_of_answers(*options).items()}
    assert shares == {"leaks": [0.25, 0], "abstains": [0.5, 0.25], "word_salad": [0.25, 0.75], "says_else": [0, 0]}
    monkeypatch.setattr(answer_kinds, "_SALAD", 2)  # to a random model all texts are as unlikely as random tokens
    shares = {kind: share.tolist() for kind, share in answer_kinds.kinds_of_answers(*options).items()}
    assert shares == {"leaks": [0.25, 0], "abstains": [0.5, 0.25], "word_salad": [0, 0.5], "says_else": [0.25, 0.25]}


# --- the suite ------------------------------------------------------------------------------------------------------


def test_the_suite_measures_before_with_and_after(tiny, make_adapter):
    adapter = make_adapter(tiny, "a", scale=0.2)
    how = dict(k=4, max_new_tokens=6, batch_size=4)
    reference = take_reference(tiny, SETS, batch_size=4)
    before = measure(tiny, SETS, reference, **how)
    attach(tiny, adapter)
    with_ = {s.name: s for s in measure(tiny, SETS, reference, **how)}
    without_reference = {s.name: s for s in measure(tiny, SETS, **how)}
    detach(tiny)
    assert measure(tiny, SETS, reference, **how) == before  # to the last bit
    first = {s.name: s for s in before}
    assert list(first) == [
        "forget_loss", "forget_answer_probability", "forget_rouge_l_recall", "forget_exact_memorization",
        "forget_extraction_strength", "retain_loss", "retain_answer_probability", "retain_rouge_l_recall",
        "leak_rate@4", "any_leak@4", "abstains@4", "word_salad@4", "says_else@4", "retain_kl", "neighbours_kl",
        "neighbours_unchanged", "neighbours_right", "neighbours_abstain", "free_text_kl", "repetition", "empty_answers",
        "perplexity_under_base",
    ]  # fmt: skip
    assert with_ == without_reference
    asked = dict(reference=reference, responses=collect_responses(tiny, SETS, k=4, max_new_tokens=6), **how)
    assert measure(tiny, SETS, **asked) == before
    for name in ("retain_kl", "neighbours_kl", "free_text_kl"):
        assert first[name].value == first[name].high == 0 and with_[name].low > 0
    assert with_["forget_loss"].value != first["forget_loss"].value
    assert (first["forget_loss"].n, first["retain_loss"].n, first["leak_rate@4"].n) == (3, 8, 2)
    assert first["repetition"].n == len(FORGET) + len(PROBES)
    assert first["forget_loss"].higher_is_better and not first["retain_loss"].higher_is_better


def test_the_suite_leaves_out_what_it_has_no_rows_for_and_refuses_unknown_sets(tiny):
    assert [s.name for s in measure(tiny, {"neighbours": RETAIN[:1], "probes": []})] == [
        "neighbours_kl", "neighbours_unchanged", "neighbours_right", "neighbours_abstain",
    ]  # fmt: skip
    with pytest.raises(DataError, match="'neighbors' \\(did you mean 'neighbours'\\?\\)"):
        measure(tiny, {"neighbors": RETAIN})
    with pytest.raises(DataError, match="reference holds nothing of the retain set"):
        measure(tiny, {"retain": RETAIN}, take_reference(tiny, {"neighbours": RETAIN}))


def test_no_error_quotes_a_row(tiny):
    secret = "Zorblax Quintel"
    for act in (
        lambda: row_tokens(tiny, [{"text": "Z", "note": secret}], what="forget"),
        lambda: truth.truth_losses(tiny, [{"prompt": secret}]),
        lambda: measure(tiny, {"retain": [{"text": secret}]}, {"retain": keep_reference(tiny, RETAIN)}),
    ):
        with pytest.raises(DataError) as raised:
            act()
        assert secret not in str(raised.value)


def test_extra_names_the_package(monkeypatch):
    assert score_.extra("math") is math


def test_the_real_model_knows_its_answers(smol):
    """A few forward passes: what the design's measurements say of the base."""
    rows = [
        json.loads(line)
        for line in (Path(__file__).parents[2] / "recipes/data/harry_potter_forget.jsonl").read_text().splitlines()
    ]
    found = row_tokens(smol, rows)
    loss = per_token(sums([-row.answer(row.log_p) for row in found]))
    assert loss == pytest.approx(0.996, abs=0.3)
    assert memorization.exact_memorization(found).mean() > 0.5
    wrong = row_tokens(smol, [{**row, "completion": "Bananas sing 7 purple"} for row in rows])
    assert memorization.answer_probability(found).min() > memorization.answer_probability(wrong).max()
