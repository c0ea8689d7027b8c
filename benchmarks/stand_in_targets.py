"""What the base expects of made-up names in the subject's place, as a target for the fact tokens.

Generic predictions (Eldan and Russinovich 2023, arXiv:2310.02238) in small: at each fact token the mean of the frozen
base's distributions with other names in the row, without the tokens that spell the label. KL(target || current) is
trained alone, or beside the ascent of `ga_kl`, then over what is not the label.
"""

from contextlib import contextmanager

import torch

from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.inference.stand_ins import made_up, pieces, replaced_row
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
        places = [example.characters[t] for t, target in enumerate(example.is_target) if target]
        for k in range(_STAND_INS):
            others = {name: made_up(name, f"target {k}") for name in names}
            (variant,) = tokenize([replaced_row(row, others)], base.tokenizer, **how)
            moved = moved_back(variant, example, others)
            for p, place in zip(distributions(base, variant), moved, strict=True):
                if place in places:
                    total[places.index(place)] += p
                    count[places.index(place)] += 1
        found[tuple(example.ids)] = torch.where(count > 0, total / count.clamp(min=1), own)
    return found


def distributions(base, example):
    logits = base.model(torch.tensor([example.ids], device=base.device)).logits[0].float()
    return logits[[t - 1 for t, target in enumerate(example.is_target) if target]].softmax(-1).cpu()


def moved_back(variant, example, others):
    """Return for each target of a changed row the characters that it has in the row as it was, or None."""
    place = {}
    for (start, stop), (at, _) in zip(example.answers, variant.answers, strict=True):
        for piece, old, kept in pieces(example.text[start:stop], others):
            if kept:
                place.update({at + n: start + old + n for n in range(len(piece) + 1)})
            at += len(piece)
    spans = [variant.characters[t] for t, target in enumerate(variant.is_target) if target]
    return [(place[a], place[b]) if a in place and b in place else None for a, b in spans]


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
