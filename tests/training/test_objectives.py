import math

import pytest
import torch
from conftest import FORGET, RETAIN

from unlearn_peft.data.batch import collate
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.models.forward import picked_logits
from unlearn_peft.models.losses import cross_entropy, log_odds_against
from unlearn_peft.recipe.schema import GaKlSettings, LoraSettings
from unlearn_peft.training.adapter_config import adapter_config
from unlearn_peft.training.objectives import Tokens, ga_kl, kl_divergence, row_means
from unlearn_peft.training.schedule import Schedule
from unlearn_peft.training.step.runner import StepRunner


def by_hand(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def tokens(p, label, reference=None):
    logits = torch.tensor([p]).log() + 3.0  # a constant shift of logits changes nothing
    ref = None if reference is None else torch.tensor([reference]).log() - 1.0
    return Tokens(logits, torch.tensor([label]), torch.tensor([0]), ref)


P, Q = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]


def test_kl_against_the_formula_by_hand():
    retain = tokens(P, 0, Q)
    assert kl_divergence(retain).item() == pytest.approx(by_hand(P, Q), abs=1e-6)
    assert kl_divergence(retain, "forward").item() == pytest.approx(by_hand(Q, P), abs=1e-6)
    with pytest.raises(ValueError, match="reference"):
        kl_divergence(tokens(P, 0))


@pytest.mark.parametrize(
    ("label", "ceiling", "hold", "expected"),
    [
        (1, None, True, math.log(0.2)),  # plain: -CE
        (1, 5.0, True, math.log(0.2)),  # below the ceiling all forms are plain ascent
        (1, 5.0, False, math.log(0.2)),
        (2, 2.0, False, -2.0),  # CE 2.303 is beyond the cap: constant
        (2, 2.0, True, (-math.log(0.1) - 2.0) - 2.0),  # and is pulled back by hold
        (1, 1.0, True, math.log(0.2) + 2 * (-math.log(0.2) - -math.log(0.25))),  # but to the base's loss at the most
    ],
)
def test_ga_kl_against_the_formula_by_hand(label, ceiling, hold, expected):
    settings = GaKlSettings(forget_ceiling=ceiling, hold=hold)
    terms = ga_kl(tokens(P, label, Q), tokens(P, 0, Q), settings)
    assert terms.forget.item() == pytest.approx(expected, abs=1e-5)
    assert terms.retain.item() == pytest.approx(by_hand(P, Q), abs=1e-6)


def test_log_odds_against_the_formula_by_hand_and_their_gradient_where_a_token_is_certain():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert log_odds_against(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-6)
    certain = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    for loss, pull in ((cross_entropy, 0.0), (log_odds_against, -1.0)):
        certain.grad = None
        loss(certain, torch.tensor([0])).sum().backward()
        assert certain.grad[0, 0].item() == pytest.approx(pull, abs=1e-6)


@pytest.mark.parametrize(("probability", "pull"), [(0.98, 1.0), (0.85, 0.15)])
def test_a_row_known_by_heart_is_pushed_as_hard_as_any(probability, pull):
    """At 0.98 the cross-entropy has a gradient of 0.02: a page taught by heart was hardly forgotten."""
    p = [[probability, 1 - probability], [probability, 1 - probability]]
    logits = torch.tensor(p).log().requires_grad_()
    labels = torch.tensor([0, 0])
    forget = Tokens(logits, labels, labels, torch.tensor(p).log(), torch.tensor([True, False]))
    terms = ga_kl(forget, forget, GaKlSettings())
    terms.forget.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([pull, -pull], abs=1e-5)  # downhill is away from the label
    assert logits.grad[1].tolist() == pytest.approx([0, 0], abs=1e-6)  # held
    all_tokens = ga_kl(forget, forget, GaKlSettings(forget_tokens="all", forget_ceiling=None))
    assert all_tokens.forget.tolist() == pytest.approx([math.log(probability)] * 2, abs=1e-6)  # plain ascent is -CE


def test_gradient_turns_round_at_the_ceiling():
    for ce, sign in ((1.0, 1), (9.0, -1)):
        logits = torch.tensor([[0.0, math.log(math.expm1(ce))]], requires_grad=True)
        t = Tokens(logits, torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 2))
        assert t.cross_entropy.item() == pytest.approx(ce, abs=1e-4)
        retain = Tokens(logits.detach(), t.labels, t.rows, logits.detach())
        ga_kl(t, retain, GaKlSettings(forget_ceiling=5)).forget.sum().backward()
        assert torch.sign(logits.grad[0, 0]) == sign  # descending pushes the label down (+) or up (-)


def _peft(tiny, **settings):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny.model, adapter_config(tiny.model, LoraSettings(**settings)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_engine_equals_the_plain_way(tiny):
    """Loss and KL from picked positions and cached references = full logits, shifted and masked by hand."""
    model = _peft(tiny)
    forget = tokenize(FORGET, tiny.tokenizer, closing=False)
    retain = tokenize(RETAIN, tiny.tokenizer)
    runner = StepRunner(model, 2)
    for _ in range(2):  # the second time from the cache
        f, r = runner.tokens(forget, retain)
    losses, kls = [], []
    for example in forget:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, example.ids[t]] for t, yes in enumerate(example.is_target) if yes]
    for example in retain:
        ids = torch.tensor([example.ids])
        p = model(input_ids=ids).logits[0].log_softmax(-1)
        with model.disable_adapter():
            q = model(input_ids=ids).logits[0].log_softmax(-1)
        kls += [(p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum() for t, yes in enumerate(example.is_target) if yes]
    torch.testing.assert_close(f.cross_entropy, torch.stack(losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl_divergence(r), torch.stack(kls), rtol=1e-3, atol=1e-4)
    assert runner.reference.cache.get(retain[0]) and max(kls) > 1e-3
    model.unload()


def test_more_padding_changes_nothing(tiny):
    model = _peft(tiny)
    short = tokenize(FORGET, tiny.tokenizer)
    long = tokenize([{"text": "the blue book of stars " * 10}], tiny.tokenizer)
    alone = StepRunner(model, 2).tokens(short, short)
    padded = StepRunner(model, 0).tokens(short, [*short, *long])
    torch.testing.assert_close(alone[0].cross_entropy, padded[0].cross_entropy, rtol=1e-4, atol=1e-4)
    n = len(alone[1].labels)
    torch.testing.assert_close(kl_divergence(alone[1]), kl_divergence(padded[1])[:n], rtol=1e-3, atol=1e-4)
    model.unload()


def test_models_that_scale_their_logits_are_not_cached_wrongly(tiny):
    model = _peft(tiny)
    plain = tiny.model.forward
    tiny.model.forward = lambda *a, **k: type(o := plain(*a, **k))(logits=o.logits * 0.5)
    try:
        runner, retain = StepRunner(model, 2), tokenize(RETAIN, tiny.tokenizer)
        _, r = runner.tokens([], retain)
        with model.disable_adapter():
            batch = collate(retain, 2)
            expected = picked_logits(tiny.model, tiny.model.get_output_embeddings(), batch)
        torch.testing.assert_close(r.reference_logits, expected)
    finally:
        tiny.model.forward = plain
        model.unload()


def test_schedule_visits_every_row_and_is_a_function_of_seed_and_step():
    schedule = Schedule(10, 4, seed=1)
    assert sorted(sum((schedule.at(s) for s in range(5)), [])) == sorted(list(range(10)) * 2)
    assert schedule.at(3) == Schedule(10, 4, seed=1).at(3) != Schedule(10, 4, seed=2).at(3)


def test_row_means():
    means = row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [2.0, 5.0]


def test_equal_distributions_have_no_divergence_to_the_last_bit_and_its_gradient_is_right():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 100, 5000)
    labels = rows = torch.zeros(100, dtype=torch.long)
    for same in (logits, logits + 15, 10 * logits + 15):
        assert kl_divergence(Tokens(same, labels, rows, same.clone())).tolist() == [0.0] * 100
    found = [logits.clone().requires_grad_() for _ in range(2)]
    kl_divergence(Tokens(found[0], labels, rows, other)).sum().backward()
    p, q = torch.log_softmax(found[1], -1), torch.log_softmax(other, -1)
    (p.exp() * (p - q)).sum().backward()
    torch.testing.assert_close(found[0].grad, found[1].grad, rtol=1e-4, atol=1e-8)


def test_cross_entropy_and_its_gradient_are_pytorchs_to_rounding():
    logits = 20 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.arange(50), torch.linspace(-1, 1, 50)
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    ours = cross_entropy(found, labels)
    theirs = torch.nn.functional.cross_entropy(expected, labels, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
