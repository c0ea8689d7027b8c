"""What the base expects of made-up names in the subject's place, as a target for the fact tokens.

Generic predictions (Eldan and Russinovich 2023, arXiv:2310.02238) in small: at each fact token the mean of the frozen
base's distributions with other names in the row, without the tokens that spell the label. KL(target || current) is
trained alone, or beside the ascent of `ga_kl`, then over what is not the label.
"""

from contextlib import contextmanager

import torch
from closed_form import run

from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.inference.contrast import moved_back
from unlearn_peft.inference.stand_ins import made_up, replaced_row
from unlearn_peft.models.layers import vocabulary
from unlearn_peft.training import objectives
from unlearn_peft.training.examples.fact_tokens import spellings
from unlearn_peft.training.step.runner import StepRunner

_STAND_INS = 2
_NEVER = 1e-9  # a probability


@torch.no_grad()
def predictions(base, rows, known):
    """Return for each row, by its token ids, the targets' mean distribution with made-up names, (targets, V)."""
    how = {"max_length": None, "closing": False, "what": "forget"}
    names = {contrast.subject for contrast in known.rows if contrast.subject}
    found = {}
    for row, example in zip(rows, tokenize(rows, base.tokenizer, **how), strict=True):
        own = distributions(base, example)
        total, count = torch.zeros_like(own), torch.zeros(len(own), 1)
        places = {span: n for n, span in enumerate(target_spans(example))}
        for k in range(_STAND_INS):
            others = {name: made_up(name, f"target {k}") for name in names}
            (variant,) = tokenize([replaced_row(row, others)], base.tokenizer, **how)
            made = dict(zip(target_spans(variant), distributions(base, variant), strict=True))
            for span, p in moved_back(made, variant, example, others).items():
                if span in places:
                    total[places[span]] += p
                    count[places[span]] += 1
        found[tuple(example.ids)] = torch.where(count > 0, total / count.clamp(min=1), own)
    return found


def distributions(base, example):
    targets = [t - 1 for t, target in enumerate(example.is_target) if target]
    return run(base, example.ids)[targets].softmax(-1).cpu()


def target_spans(example):
    return [span for span, target in zip(example.characters, example.is_target, strict=True) if target]


@contextmanager
def pushed_to_stand_ins(base, rows, known, *, alone):
    """Inside the block `ga_kl` pushes fact tokens to the stand-ins' prediction, alone or beside its ascent."""
    targets, spelt = predictions(base, rows, known), spellings(base.tokenizer, vocabulary(base.model))
    make_tokens, ascent = StepRunner._tokens, objectives._bounded_ascent

    def with_targets(self, rows, states, places, **how):
        tokens = make_tokens(self, rows, states, places, **how)
        if how.get("is_forget") and len(tokens.labels):
            examples = [rows.examples()[n] for n in places if any(rows.examples()[n].is_target)]
            object.__setattr__(tokens, "stand_ins", torch.cat([targets[tuple(e.ids)] for e in examples]))
        return tokens

    def pushed(forget, settings):
        if not len(forget.labels):  # a part of a step that has retain rows alone
            return ascent(forget, settings)
        same = spelt == spelt[forget.labels][:, None]
        target = forget.stand_ins.masked_fill(same, 0)
        target = target / target.sum(-1, keepdim=True).clamp(min=_NEVER)
        logits = forget.logits.float()
        log_p = (logits if alone else logits.masked_fill(same, -1e4)).log_softmax(-1)
        distance = (target * (target.clamp(min=_NEVER).log() - log_p)).sum(-1)
        return distance if alone else ascent(forget, settings) + distance

    StepRunner._tokens, objectives._bounded_ascent = with_targets, pushed
    try:
        yield
    finally:
        StepRunner._tokens, objectives._bounded_ascent = make_tokens, ascent
