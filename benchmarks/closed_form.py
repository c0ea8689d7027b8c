"""A start without training: low-rank edits that make a subject's name look to later layers like one never heard.

As in MEMIT (Meng et al. 2022, arXiv:2210.07229, whose equation this solves), the last linear layer of some layers' MLP
is changed by the D that minimises `sum |D k - r|^2 + sum of retained |D k|^2`. Its inputs k are taken where a forget
row names the subject; r is an equal share of what is missing there, at the output of the last of the layers, to the
mean state of made-up names in the subject's place. What is retained are the inputs at all tokens of the retain rows;
those of near neighbours count `_NEAR` times. D is cut to the adapter's rank: an ordinary LoRA.

The last token of a name is changed, and those before it from which the base knows what follows ("Mahatma", not "Star").
"""

import math

import torch

from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.inference.stand_ins import made_up, replaced_row
from unlearn_peft.models.layers import decoder_layers

_RETAINED, _NEAR = 1000.0, 100.0  # weights of the mean over retained tokens, and of that over neighbours' beside it
_OVERSHOOT = 1.5  # times what is missing: the cut to the rank and what is retained take some of it away
_STAND_INS = 4
_SURE = 0.5  # the probability of the rest of a name after its beginning


class Inputs:
    """Inside a `with` block: the last inputs of layers' last linear layer, and the outputs of the layers."""

    def __init__(self, model, numbers, name):
        self.layers = {n: decoder_layers(model)[n] for n in numbers}
        self.linear = {n: next(m for path, m in layer.named_modules() if path.endswith(name))
                       for n, layer in self.layers.items()}  # fmt: skip
        self.keys, self.states, self.scales, self.handles = {}, {}, {}, []

    def __enter__(self):
        for n, layer in self.layers.items():
            self.handles += [
                self.linear[n].register_forward_hook(self._keep_linear(n)),
                layer.register_forward_hook(lambda _m, _i, out, n=n: self.states.__setitem__(
                    n, (out[0] if isinstance(out, tuple) else out)[0].float())),
            ]  # fmt: skip
            if norm := getattr(layer, "post_feedforward_layernorm", None):  # Gemma's: the output is scaled once more
                self.handles.append(norm.register_forward_hook(
                    lambda _m, inputs, out, n=n: self.scales.__setitem__(n, (out / inputs[0])[0].float())))  # fmt: skip
        return self

    def _keep_linear(self, n):
        return lambda _m, inputs, _out: self.keys.__setitem__(n, inputs[0][0].float())

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def edit(base, rows, known, retain, near, numbers, rank, name="down_proj"):
    """Return (B, A) by layer, (out, r) and (r, in); the base is as it was.

    Args:
        base: bare.
        rows: forget rows, and the base's own answers that name a fact.
        known: of the forget rows (`find_known`), whose subjects count.
        retain: tokenised rows that must stay.
        near: those of them on neighbours.
        numbers: of the layers, in order.
        rank: of each edit.
        name: of the last linear layer of a layer's MLP.
    """
    names = list(dict.fromkeys(contrast.subject for contrast in known.rows if contrast.subject))
    with Inputs(base.model, numbers, name) as seen:
        jobs = targets(base, rows, names, seen, numbers[-1])
        held = second_moments(base, retain, seen)
        for n, moment in second_moments(base, near, seen).items():
            held[n] = _RETAINED * (held[n] + _NEAR * moment)
        before = {n: seen.linear[n].weight.data.clone() for n in numbers}
        found = {}
        try:
            for done, n in enumerate(numbers):
                keys, missing = [], []
                for ids, places, wanted in jobs:
                    run(base, ids)
                    share = _OVERSHOOT * (wanted - seen.states[numbers[-1]][places]) / (len(numbers) - done)
                    if n in seen.scales:
                        share = share / seen.scales[n][places]
                    keys.append(seen.keys[n][places])
                    missing.append(share)
                k, r = torch.cat(keys), torch.cat(missing)
                delta = r.T @ torch.linalg.solve(held[n] + k.T @ k, k.T).T
                u, s, vh = torch.linalg.svd(delta, full_matrices=False)
                found[n] = (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous()
                weight = seen.linear[n].weight
                weight.data = (before[n].float() + found[n][0] @ found[n][1]).to(weight.dtype)
        finally:
            for n, weight in before.items():
                seen.linear[n].weight.data = weight
    return found


def targets(base, rows, names, seen, last):
    """Return for each row that names a subject its tokens, the n places to change, and the states wanted, (n, d)."""
    how = {"max_length": None, "closing": False, "what": "forget"}
    sure = {name: tokens_that_tell(base, name) for name in names}
    jobs, known = [], set()
    for row in rows:
        (example,) = tokenize([row], base.tokenizer, **how)
        wanted = {}
        for k in range(_STAND_INS):
            others = {name: made_up(name, f"{k}") for name in names}
            if (changed := replaced_row(row, others)) == row:
                break
            (variant,) = tokenize([changed], base.tokenizer, **how)
            run(base, variant.ids)
            for name, other in others.items():
                for old, new in zip(places_of(example, name), places_of(variant, other), strict=False):
                    for back, place in enumerate(reversed(old)):
                        if back < sure[name]:
                            state = seen.states[last][new[max(len(new) - 1 - back, 0)]]
                            wanted.setdefault(place, []).append(state)
        places = [place for place in sorted(wanted) if tuple(example.ids[: place + 1]) not in known]
        known |= {tuple(example.ids[: place + 1]) for place in places}
        if places:
            states = torch.stack([torch.stack(wanted[place]).mean(0) for place in places])
            jobs.append((example.ids[: places[-1] + 1], places, states))
    return jobs


def tokens_that_tell(base, name):
    """Return how many tokens at a name's end there are from which the base knows the rest of it: one at least."""
    start = len(base.tokenizer("1.")["input_ids"])
    ids = base.tokenizer(f"1. {name}")["input_ids"]
    log_p = run(base, ids).log_softmax(-1)
    count, rest = 1, 0.0
    for place in range(len(ids) - 1, start, -1):
        rest += float(log_p[place - 1, ids[place]])
        if math.exp(rest) < _SURE:
            break
        count += 1
    return count


def places_of(example, name):
    """Return the numbers of the tokens of each place where a rendered row says a name."""
    text, name, found = example.text.casefold(), name.casefold(), []
    start = text.find(name)
    while start >= 0:
        stop = start + len(name)
        found.append([n for n, (a, b) in enumerate(example.characters) if a < stop and b > start])
        start = text.find(name, stop)
    return [place for place in found if place]


def second_moments(base, examples, seen):
    """Return the mean of k k^T over all tokens of the rows, (in, in), by layer."""
    sums, count = {}, 0
    for example in examples:
        run(base, example.ids)
        count += len(example.ids)
        for n, keys in seen.keys.items():
            sums[n] = sums.get(n, 0) + keys.T @ keys
    return {n: total / count for n, total in sums.items()}


def run(base, ids):
    """Return the logits of one row, (T, V), in float32."""
    return base.model(torch.tensor([ids], device=base.device)).logits[0].float()


@torch.no_grad()
def start_from(trainer, deltas, scaling):
    """Set an adapter's layers to the edits, which stay so in training."""
    for n, (b, a) in deltas.items():
        for name, parameter in trainer.parameters.items():
            if f".layers.{n}." in name:
                parameter.copy_(a if "lora_A" in name else b / scaling)
                parameter.requires_grad_(False)
