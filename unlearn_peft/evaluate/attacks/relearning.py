"""Relearning: a few training steps on a few forget rows, through the adapter itself or through a fresh LoRA on top.

The probes are asked after so many steps. Rows that say an answer teach it anew, so the figures that tell recovery
from learning stand beside it: probes whose answer no trained row says (as Deeb and Roger 2024, arXiv:2410.08827, ask
held-out facts after training on others), and a made-up answer in place of the right one, taught in the same way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.batch import collate
from ...data.source import Row
from ...data.tokenize import tokenize
from ...inference.generate import leaked
from ...models.forward import picked_logits
from ...models.layers import head_name
from ..score import Array
from .harness import Attacked, Target, adapters_on, attacked, leaks
from .weights import linear_layers, shape_of

_SYLLABLES = ("vor", "lim", "tas", "ger", "pol", "nuk", "dre", "zab", "mif", "sor", "kel", "hub")


@dataclass(frozen=True)
class _Trained:
    """A delta that is trained: `scale * up @ down`, or a dense `up` alone."""

    up: nn.Parameter  # (out, r); dense: (out, in)
    down: nn.Parameter | None  # (r, in)
    scale: float


def relearn(
    target: Target,
    *,
    through: str,
    rows: int = 4,
    steps: Sequence[int] = (5, 10, 20),
    learning_rate: float = 5e-4,
    rank: int = 8,
    name: str = "relearn",
) -> Attacked:
    """Fine-tune on a few forget rows and ask the probes again; the share after the last step is the figure.

    AdamW without weight decay, mean loss over completion tokens, all rows in each step. The bare base is taught the
    same rows by fresh deltas of the same layers and ranks.

    Args:
        target: what is attacked.
        through: `adapter` (its own weights go on learning) or `lora` (the adapter stays as it is; a fresh LoRA on all
            linear layers but the head learns beside it).
        rows: forget rows trained on, drawn by the target's seed.
        steps: after which the probes are asked.
        learning_rate: of AdamW.
        rank: of the fresh LoRA.
        name: of the attack.

    `details`: the share by step (0: before), with the adapter and of the bare base; `untaught`: after the last step,
    the share of the probes whose leak words stand in no trained row, and their number; `made up`: share of probes
    that give a made-up answer after training on the same rows with that answer, from the same adapter. If that is
    as high as the figure, the answers were learned and not recovered.
    """
    chosen = random.Random(target.seed).sample(list(target.forget), min(rows, len(target.forget)))
    steps = sorted(set(steps))

    def deltas(forgetting: bool) -> dict[str, list[_Trained]]:
        if through == "lora":
            return _fresh(target, rank)
        return _of_adapter(target, fresh=not forgetting)

    def run(taught: Sequence[Row], probes: Sequence[Row], forgetting: bool, after: Sequence[int]) -> dict[int, Array]:
        stays = target.bundles if forgetting and through == "lora" else []
        with adapters_on(target, bundles=stays):
            return _curve(target, taught, probes, deltas(forgetting), after, learning_rate)

    found = run(chosen, target.probes, True, [0, *steps])
    base = run(chosen, target.probes, False, [0, *steps])
    false_rows, false_probes = _made_up(chosen, target.probes, target.seed)
    made_up = run(false_rows, false_probes, True, steps[-1:])
    said = " ".join(str(value) for row in chosen for value in _texts(row))
    untaught = np.array([not leaked(said, row["leak"]) for row in target.probes])
    last = steps[-1]
    details: dict[str, Any] = {
        f"step {step}": {"recovered": float(found[step].mean()), "base": float(base[step].mean())} for step in found
    }
    details["untaught"] = {
        "probes": int(untaught.sum()),
        "recovered": float(found[last][untaught].mean()) if untaught.any() else None,
        "base": float(base[last][untaught].mean()) if untaught.any() else None,
    }
    details["made up"] = {"recovered": float(made_up[last].mean())}
    where = "the adapter's own weights" if through == "adapter" else f"a fresh LoRA (r={rank}) beside the adapter"
    budget = (
        f"{len(chosen)} forget rows, {last} steps of all, AdamW at {learning_rate:g}, through {where}; then one "
        "greedy answer a probe"
    )
    return attacked(target, name, budget, found[last], base[last], details)


def _curve(
    target: Target,
    rows: Sequence[Row],
    probes: Sequence[Row],
    deltas: Mapping[str, Sequence[_Trained]],
    after: Sequence[int],
    learning_rate: float,
) -> dict[int, Array]:
    """Train the deltas on the rows and return the probes' leaks after each of these steps."""
    base = target.base
    examples = tokenize(rows, base.tokenizer, chat_template=target.chat_template, what="forget")
    batch = collate(examples, base.tokenizer.pad_token_id).to(base.device)
    labels = batch.ids[:, 1:][batch.targets[:, 1:]]
    head = base.model.get_output_embeddings()
    parameters = [p for parts in deltas.values() for d in parts for p in (d.up, d.down) if p is not None]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    found = {}
    with _beside(base.model, deltas):
        for step in range(max(after) + 1):
            if step:
                with torch.enable_grad():
                    loss = nn.functional.cross_entropy(picked_logits(base.model, head, batch).float(), labels)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                optimizer.step()
            if step in after:
                found[step] = leaks(target, probes=probes)
    return found


@contextmanager
def _beside(model: Any, deltas: Mapping[str, Sequence[_Trained]]) -> Iterator[None]:
    """Add deltas to the outputs of linear layers, by hooks, so that gradients reach the deltas alone."""

    def adder(parts: Sequence[_Trained]) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].float()
            for d in parts:
                thin = x if d.down is None else nn.functional.linear(x, d.down)
                output = output + (d.scale * nn.functional.linear(thin, d.up)).to(output.dtype)
            return output

        return add

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(adder(parts)) for name, parts in deltas.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_adapter(target: Target, fresh: bool) -> dict[str, list[_Trained]]:
    """Return the adapters' deltas for training; `fresh`: their layers and ranks, but without an effect yet."""
    generator = torch.Generator().manual_seed(target.seed)
    deltas: dict[str, list[_Trained]] = {}
    for bundle in target.bundles:
        bundle.check_fits(target.base.model, target.base.tokenizer)
        for name, delta in bundle.deltas.items():
            up = torch.zeros(delta.up.shape) if fresh else delta.up
            down = delta.down
            if down is not None and fresh:
                down = torch.randn(down.shape, generator=generator) / down.shape[1] ** 0.5
            deltas.setdefault(name, []).append(_trained(target, up, down, delta.scale))
    return deltas


def _fresh(target: Target, rank: int) -> dict[str, list[_Trained]]:
    """Return a LoRA without an effect yet on all linear layers but the head; its alpha is twice its rank."""
    generator = torch.Generator().manual_seed(target.seed)
    head = head_name(target.base.model)
    deltas = {}
    for name, module in linear_layers(target.base.model):
        if name != head:
            out, into = shape_of(module)
            down = torch.randn(rank, into, generator=generator) / into**0.5
            deltas[name] = [_trained(target, torch.zeros(out, rank), down, 2.0)]
    return deltas


def _trained(target: Target, up: Tensor, down: Tensor | None, scale: float) -> _Trained:
    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().float().clone().to(target.base.device))

    return _Trained(parameter(up), None if down is None else parameter(down), scale)


def _made_up(rows: Sequence[Row], probes: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows and the probes with an invented word in the place of each leak word."""
    rng = random.Random(seed)
    words = sorted({word.casefold() for row in probes for word in row["leak"]}, key=lambda word: (-len(word), word))
    invented = {word: "".join(rng.choices(_SYLLABLES, k=3)).capitalize() for word in words}
    pattern = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)

    def swapped(text: Any) -> str:
        return pattern.sub(lambda match: invented.get(match.group().casefold(), match.group()), str(text))

    taught = []
    for row in rows:
        fresh: Row = {key: swapped(row[key]) for key in ("prompt", "completion", "text") if key in row}
        if "messages" in row:
            fresh["messages"] = [{**message, "content": swapped(message["content"])} for message in row["messages"]]
        taught.append({**row, **fresh})
    return taught, [{**row, "leak": [invented[word.casefold()] for word in row["leak"]]} for row in probes]


def _texts(row: Row) -> list[str]:
    """Return all that a row says: what stands in its prompt is taught to the model as well."""
    if "messages" in row:
        return [str(message["content"]) for message in row["messages"]]
    return [str(row[key]) for key in ("prompt", "completion", "text") if key in row]
