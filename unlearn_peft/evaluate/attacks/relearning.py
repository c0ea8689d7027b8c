"""Relearning attacks: a few training steps on a few forget rows, then the probes are asked again.

Training on the answers teaches them anew, so two figures tell recovery from learning: probes whose answer is in no
trained row (Deeb and Roger 2024, arXiv:2410.08827), and a made-up answer that is taught in place of the right one.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...adapters.bundle import Delta
from ...data.batch import collate
from ...data.rows import texts_of
from ...data.source import Row
from ...data.tokenize import tokenize
from ...data.words import normalize, places, said
from ...errors import DataError
from ...inference.generate import leaked
from ...models.forward import picked_logits
from ...models.layers import head_name, linear_layers
from ...models.restore import left_as_found
from ..score import Array
from .harness import Attacked, Target, adapters_on, attacked, averages, leaks, other_pairs
from .weights import shape_of

_SYLLABLES = ("vor", "lim", "tas", "ger", "pol", "nuk", "dre", "zab", "mif", "sor", "kel", "hub")


def relearn(
    target: Target,
    *,
    through: str,
    rows: int = 4,
    steps: Sequence[int] = (5, 10, 20),
    learning_rate: float = 5e-4,
    rank: int = 8,
    benign: bool = False,
    name: str = "relearn",
) -> Attacked:
    """Fine-tune on a few forget rows and ask the probes again; the share after the last step is the result.

    `benign`: on rows that say nothing of the forgotten, neighbours first, so that what comes back was only hidden
    (benign relearning: Hu et al. 2024, arXiv:2406.13356).

    AdamW without weight decay, mean loss over completion tokens, all rows in each step. The rows are drawn with the
    target's seed. `through` the `adapter`, its own weights are trained further; through a `lora`, it stays as it is and
    a fresh LoRA of this rank is trained on all linear layers but the head. The bare base is trained on the same rows,
    through a fresh LoRA of the same layers and ranks.

    `details`: the share by step (0: before training), with the adapter and of the bare base; `untaught`: after the
    last step, the share of the probes whose leak words are in no trained row, and their number; `made up`: the share
    of probes that give a made-up answer after training the same adapter on rows with that answer. If that is as high
    as the result, the answers were learned and not recovered.
    """
    others = [{"prompt": question, "completion": answer} for question, answer in other_pairs(target)[:rows]]
    if benign and not others:
        raise DataError(f"{name} has nothing to train on: expected neighbours that name no leak word, all of them do")
    chosen = others if benign else random.Random(target.seed).sample(list(target.forget), min(rows, len(target.forget)))
    steps = sorted(set(steps))

    def curve(
        rows: Sequence[Row], probes: Sequence[Row], with_adapter: bool, ask_at: Sequence[int]
    ) -> dict[int, Array]:
        lora = through == "lora"
        deltas = _fresh_lora(target, rank) if lora else _adapter_deltas(target, fresh=not with_adapter)
        with adapters_on(target, bundles=target.bundles if lora and with_adapter else []):
            return _train_and_ask(target, rows, probes, deltas, ask_at, learning_rate)

    recovered = curve(chosen, target.probes, True, [0, *steps])
    base = curve(chosen, target.probes, False, [0, *steps])
    taught = " ".join(text for row in chosen for text in texts_of(row))
    untaught = np.array([not leaked(taught, row["leak"]) for row in target.probes])
    last = steps[-1]
    details: dict[str, Any] = {f"step {step}": averages(recovered[step], base[step]) for step in recovered}
    details["untaught"] = {"probes": int(untaught.sum()), **averages(recovered[last], base[last], untaught)}
    if not benign:
        made_up = curve(*_with_made_up_answers(chosen, target.probes, target.seed), True, steps[-1:])
        details["made up"] = {"recovered": float(made_up[last].mean())}
    where = "the adapter's own weights" if through == "adapter" else f"a fresh LoRA (r={rank}) beside the adapter"
    budget = (
        f"{len(chosen)} {'other' if benign else 'forget'} rows, {last} steps of all, AdamW at {learning_rate:g}, "
        f"through {where}; then one greedy answer a probe"
    )
    return attacked(target, name, budget, recovered[last], base[last], details)


def _train_and_ask(
    target: Target,
    rows: Sequence[Row],
    probes: Sequence[Row],
    deltas: Mapping[str, Sequence[Delta]],
    ask_at: Sequence[int],
    learning_rate: float,
) -> dict[int, Array]:
    """Train the deltas on the rows; return the leaks of the probes after each number of steps in `ask_at`."""
    base = target.base
    examples = tokenize(
        rows, base.tokenizer, max_length=base.window(512), chat_template=target.chat_template, what="forget"
    )
    batch = collate(examples, base.pad_id).to(base.device)
    labels = batch.ids[:, 1:][batch.targets[:, 1:]]
    parameters = [p for parts in deltas.values() for d in parts for p in (d.up, d.down) if p is not None]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    curve = {}
    with _lora_layers(base.model, deltas):
        head = base.model.get_output_embeddings()
        for step in range(max(ask_at) + 1):
            if step:
                with torch.enable_grad():
                    loss = nn.functional.cross_entropy(picked_logits(base.model, head, batch).float(), labels)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                optimizer.step()
            if step in ask_at:
                curve[step] = leaks(target, probes=probes)
    return curve


@contextmanager
def _lora_layers(model: Any, deltas: Mapping[str, Sequence[Delta]]) -> Iterator[None]:
    """Wrap the modules in PEFT's LoRA layers, whose weights are these deltas, inside a `with` block.

    A dense delta is a LoRA of full rank whose A is the identity and is not trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    with left_as_found(model):
        for n in range(max(map(len, deltas.values()))):
            nth = {re.escape(name): parts[n] for name, parts in deltas.items() if len(parts) > n}
            ranks = {name: delta.rank or delta.shape[1] for name, delta in nth.items()}
            config = LoraConfig(target_modules="|".join(ranks), rank_pattern=ranks)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that GPT-2's layers are transposed, and that it is called twice
                inject_adapter_in_model(config, model, f"delta{n}", low_cpu_mem_usage=True)
        for name, parts in deltas.items():
            layer = model.get_submodule(name)
            layer.set_adapter([f"delta{n}" for n in range(len(parts))])
            for n, delta in enumerate(parts):
                down = delta.down
                if down is None:
                    down = nn.Parameter(torch.eye(delta.shape[1], device=delta.up.device), requires_grad=False)
                layer.lora_A[f"delta{n}"].weight = down
                layer.lora_B[f"delta{n}"].weight = delta.up
                layer.scaling[f"delta{n}"] = delta.scale
        yield


def _adapter_deltas(target: Target, fresh: bool) -> dict[str, list[Delta]]:
    """Return the adapters' deltas as parameters; if `fresh`, untrained ones of the same layers and ranks."""
    generator = torch.Generator().manual_seed(target.seed)
    deltas: dict[str, list[Delta]] = {}
    for bundle in target.bundles:
        bundle.check_fits(target.base.model, target.base.tokenizer)
        for name, delta in bundle.deltas.items():
            up, down = delta.up, delta.down
            if fresh:
                up, down = torch.zeros(up.shape), None if down is None else _random(down.shape, generator)
            deltas.setdefault(name, []).append(_as_parameters(target, up, down, delta.scale))
    return deltas


def _fresh_lora(target: Target, rank: int) -> dict[str, list[Delta]]:
    """Return an untrained LoRA on all linear layers but the head; its alpha is twice its rank."""
    generator = torch.Generator().manual_seed(target.seed)
    head = head_name(target.base.model)
    deltas = {}
    for name, module in linear_layers(target.base.model).items():
        if name != head:
            out_size, in_size = shape_of(module)
            down = _random((rank, in_size), generator)
            deltas[name] = [_as_parameters(target, torch.zeros(out_size, rank), down, 2.0)]
    return deltas


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    root: float = shape[1] ** 0.5
    return torch.randn(shape, generator=generator) / root


def _as_parameters(target: Target, up: Tensor, down: Tensor | None, scale: float) -> Delta:
    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().float().clone().to(target.base.device))

    return Delta(parameter(up), None if down is None else parameter(down), scale)


def _with_made_up_answers(rows: Sequence[Row], probes: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows and the probes with an invented word in the place of each leak word."""
    rng = random.Random(seed)
    words = sorted({normalize(word) for row in probes for word in row["leak"]}, key=lambda word: (-len(word), word))
    invented = {word: "".join(rng.choices(_SYLLABLES, k=3)).capitalize() for word in words}

    def replaced(text: Any) -> str:
        parts, at, text = [], 0, str(text)
        for start, end in places(text, words):
            parts += [text[at:start], invented[said(text[start:end], words)[0]]]
            at = end
        return "".join([*parts, text[at:]])

    made_up = []
    for row in rows:
        changed: Row = {key: replaced(row[key]) for key in ("prompt", "completion", "text") if key in row}
        if "messages" in row:
            changed["messages"] = [{**turn, "content": replaced(turn["content"])} for turn in row["messages"]]
        made_up.append({**row, **changed})
    return made_up, [{**row, "leak": [invented[normalize(word)] for word in row["leak"]]} for row in probes]
