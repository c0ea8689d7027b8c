"""The ways of training that benchmarks/train.py compares, each a function: a base and the rows' kind -> `step`.

`step()` does one optimiser step of gradient ascent on 4 forget rows and KL to the base on 4 retain rows, and returns
the forget loss and the retain KL (nats/token) as they were before it. All sides get the same rows in the same order.

The others' losses look at the same targets as ours; their models compute all logits, as their code does.
"""

import copy
import itertools
import json
import resource
import sys
import time
import warnings
from functools import partial

import torch
from torch.nn import functional as F
from train_rows import counts, data_sets

from unlearn_peft import load_base
from unlearn_peft.data.batch import collate
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.examples.build import Sets
from unlearn_peft.training.schedule import Schedule
from unlearn_peft.training.trainer import Job, Training

BATCH = 4  # forget rows of a step, and as many retain rows
RANK, SEED = 8, 0
QV = ["q_proj", "v_proj"]  # what plain PEFT adapts by default
RATE = 1e-5  # learning rate: small, so that plain ascent stays a number; it costs the same
PLAIN = {"name": "ga_kl", "forget_tokens": "all", "forget_ceiling": None, "retain_budget": None, "stop_when": None}


def original(base, rows, batch=BATCH):
    """The original experiment: two models, and a dense head of its own on the one that is trained. SGD."""
    reference = copy.deepcopy(base.model)
    head = base.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return plain_steps(base, rows, batch, base.model, reference, torch.optim.SGD([head.weight], lr=RATE))


def full(base, rows, batch=BATCH):
    """As open-unlearning does: all parameters are trained, a frozen copy is the reference. AdamW."""
    reference = copy.deepcopy(base.model)
    base.model.requires_grad_(True).train()
    return plain_steps(base, rows, batch, base.model, reference, torch.optim.AdamW(base.model.parameters(), lr=RATE))


def plain_peft(targets, base, rows):
    """PEFT alone: a LoRA on `targets`; the reference is the same model with its adapter off. AdamW."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied head
        model = get_peft_model(base.model, config)

    def reference(**batch):
        with model.disable_adapter():
            return model(**batch)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain_steps(base, rows, BATCH, model, reference, torch.optim.AdamW(trained, lr=RATE))


def ours(kind, adapters, base, rows):
    """Our own way: one adapter or several in one run, each with forget and retain rows of its own."""
    recipe = recipe_of(kind, base.model.config)
    return run_steps(base, [(recipe, sets) for sets in data_sets(base.tokenizer, rows, count=adapters)])


SIDES = {
    "original": original,
    "full": full,
    "peft_head": partial(plain_peft, ["lm_head"]),
    "peft_lora": partial(plain_peft, QV),
    "head": partial(ours, "head", 1),
    "top8": partial(ours, "top8", 1),
    "lora": partial(ours, "lora", 1),
    "eight_head": partial(ours, "head", 8),
    "eight_top8": partial(ours, "top8", 8),
}


def recipe_of(kind, config, r=RANK, batch=BATCH):
    """Return the recipe of one of our sides; `top8` is eight layers, or half of a model with fewer than 16."""
    count = config.num_hidden_layers
    top = list(range(count - min(8, count // 2), count))
    adapter = {
        "head": {"kind": "head", "r": r},
        "top8": {"kind": "lora", "r": r, "target_modules": QV, "layers_to_transform": top},
        "lora": {"kind": "lora", "r": r, "target_modules": QV},
    }[kind]
    return make_recipe({
        "adapter": adapter, "objective": PLAIN, "forget": ["(given as tokens)"], "retain": ["(likewise)"],
        "forget_batch": batch, "retain_batch": batch, "anchor_batch": 0, "own_answers": 0, "retain_weight": 1.0,
        "learning_rate": RATE, "warmup_steps": 0, "schedule": "constant", "steps": 1000, "seed": SEED,
    })  # fmt: skip


def run_steps(base, pairs):
    """Return the `step` of our own run of one adapter or of several at once; `pairs` are their recipes and data sets.

    It returns None for loss and KL of several: their rows are others than a single adapter's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied head
        training = Training(base, [Job(recipe, sets) for recipe, sets in pairs])
    training.start()

    def step():
        figures = list(training.one_step().values())
        return (figures[0]["forget_loss"], figures[0]["retain_kl"]) if len(pairs) == 1 else (None, None)

    return step


def plain_steps(base, rows, batch, model, reference, optimizer):
    """Return a `step` as others write it: ordinary forward passes of padded rows, all logits, a loss of means.

    `rows` are a kind of rows, or the data sets themselves; `batch` of them are forget rows of a step, as many retain.
    """
    sets = rows if isinstance(rows, Sets) else data_sets(base.tokenizer, rows)[0]
    pad, count = base.tokenizer.pad_token_id, len(sets.forget)
    forget_order, retain_order = (Schedule(count, batch, seed) for seed in (SEED, SEED + 1))  # as our own runs
    numbers = itertools.count()

    def logits(model, batch):  # (N, V), those that predict a target
        out = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
        return out.logits[:, :-1][batch.targets[:, 1:]]

    def step():
        number = next(numbers)
        forget = collate([sets.forget[n] for n in forget_order.at(number)], pad).to(base.device)
        retain = collate([sets.retain[n] for n in retain_order.at(number)], pad).to(base.device)
        loss = F.cross_entropy(logits(model, forget), forget.ids[:, 1:][forget.targets[:, 1:]])
        with torch.no_grad():
            expected = F.log_softmax(logits(reference, retain), dim=-1)
        current = F.log_softmax(logits(model, retain), dim=-1)
        kl = F.kl_div(expected, current, log_target=True, reduction="batchmean")  # KL(current || reference)
        (kl - loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), kl.item()

    return step


def serve(side, rows, base):
    """Do a step for each line on stdin; answer each with a line of JSON on stdout, and the last with the peak memory.

    The first line, before any step, says what a step works on.
    """
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints

    def say(**what):
        print(json.dumps(what), file=out, flush=True)

    from transformers import LlamaForCausalLM  # noqa: F401, the library itself comes in with its first model

    libraries = peak_bytes()
    live = load_base(base, dtype="float32", device="cpu")
    step = SIDES[side](live, rows)
    say(**counts(data_sets(live.tokenizer, rows)[0], BATCH), threads=torch.get_num_threads())
    loaded = peak_bytes()
    for _ in sys.stdin:
        began = time.perf_counter()
        loss, kl = step()
        say(seconds=time.perf_counter() - began, forget_loss=loss, retain_kl=kl)
    say(side=side, peak_bytes=peak_bytes(), loaded_bytes=loaded, libraries_bytes=libraries)


def peak_bytes():
    """Return this process's peak resident memory so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
