"""A passage of 2,500 tokens that the base knows by heart: how much of it is left when it is forgotten?

    python benchmarks/passage.py [--base demo] [--teach-steps 60] [--set steps=10] [--json FILE]

The base is first taught benchmarks/data/passage.txt (written for this; all of its weights are trained, in windows of
512 tokens, and of 128), then it is forgotten, in bfloat16, as a `text` row with the package's defaults. Printed for the
base as it came, taught, with the adapter, and after its removal: continuations of 50 tokens from 10 places that are
right, figures over the whole passage, and the KL to the taught base on neutral text.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from unlearn_peft import attach, detach, load_base, load_recipe, unlearn
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.evaluate.metrics.memorization import exact_memorization, extraction_strength
from unlearn_peft.evaluate.metrics.verbatim import verbatim
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference, row_tokens
from unlearn_peft.models.base import freeze

PASSAGE = Path(__file__).parent / "data" / "passage.txt"
NEUTRAL = (
    "Bread is made of flour, water, salt and yeast. The dough is kneaded, left to rise and baked in a hot oven.",
    "Rain falls when the air can no longer hold the water in it. Most of it runs off in rivers and back to the sea.",
    "The train was late, so we waited in the small room by the platform and read the old notices on the wall.",
    "A good chair supports the back, lets the feet rest flat on the floor and does not press on the thighs.",
    "In spring the farmers mend their fences, clean the ditches and sow the fields that were ploughed before winter.",
    "She opened the letter, read it twice, and put it back into its envelope without saying what it was about.",
    "Iron is strong but it rusts. Steel is iron with a little carbon in it, and with chromium it hardly rusts at all.",
    "The museum is open from ten to five. Children pay half, and the guided tour begins at the foot of the stairs.",
    "When a ship nears a harbour, a pilot who knows the shallow places comes on board to bring it safely in.",
    "He had kept a diary since he was a boy, though on most days there was nothing in it except the weather.",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--teach-steps", type=int, default=60, help="at most; it ends when 99.5 %% of tokens are right")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of teaching")
    parser.add_argument("--words", type=int, help="use the first words of the passage only")
    parser.add_argument("--set", action="append", default=[], help="override a field of the recipe; repeatable")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    base = load_base(args.base, dtype="float32")
    rows = [{"text": " ".join(PASSAGE.read_text().split(" ")[: args.words]).strip()}]
    tokens = len(base.tokenizer(rows[0]["text"])["input_ids"])
    neutral = [{"text": text} for text in NEUTRAL]
    figures = {"base": measure(base, rows)}
    began = time.monotonic()
    steps = teach(base, rows, args.teach_steps, args.rate)
    print(f"\n{tokens} tokens, taught in {steps} steps, {time.monotonic() - began:.0f} s\n", flush=True)
    for parameter in base.model.parameters():  # for speed; what is measured from here on is this model
        parameter.data = parameter.data.to(torch.bfloat16)
    reference = keep_reference(base, neutral)
    figures["taught"] = measure(base, rows, neutral, reference)
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "recipe.yaml").write_text(json.dumps({"forget": rows, "retain": "auto"}))
        recipe = load_recipe(file, args.set, output=f"{folder}/adapter")
        began = time.monotonic()
        adapter = unlearn(base, recipe=recipe, quiet=True)
        seconds = time.monotonic() - began
        attach(base, adapter.path)
        figures["with"] = measure(base, rows, neutral, reference)
        detach(base)
        figures["after"] = measure(base, rows, neutral, reference)
    print("| | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
    for name in figures["taught"]:
        print(f"| {name} | " + " | ".join(str(figures[state].get(name, "")) for state in figures) + " |")
    print(f"\nforgotten in {seconds:.0f} s; removal exact: {figures['after'] == figures['taught']}")
    if args.json:
        args.json.write_text(json.dumps({"tokens": tokens, "seconds": seconds, "set": args.set, "figures": figures}))


def teach(base, rows, steps, rate):
    """Train all weights until nearly each token is the first choice; return the number of steps."""
    examples = tokenize(rows, base.tokenizer, max_length=512)
    starts = tokenize(rows, base.tokenizer, max_length=128)  # as it is asked: little context
    parameters = list(base.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    step = 0
    for step in range(1, steps + 1):  # noqa: B007
        right, total = 0, 0
        for example in [*examples, *starts]:
            ids = torch.tensor([example.ids], device=base.device)
            targets = torch.tensor(example.is_target[1:], device=base.device)
            with torch.autocast(base.device.type, torch.bfloat16):
                logits = base.model(ids).logits[0, :-1][targets]
            labels = ids[0, 1:][targets]
            (cross_entropy(logits.float(), labels) / (len(examples) + len(starts))).backward()
            right, total = right + int((logits.argmax(-1) == labels).sum()), total + len(labels)
        if step % 5 == 0 or right == total:
            print(f"step {step}: {right} of {total} tokens right", flush=True)
        if right >= 0.995 * total:
            break
        optimizer.step()
        optimizer.zero_grad()
    del optimizer
    freeze(base.model)
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    return step


def measure(base, rows, neutral=None, reference=None):
    said = verbatim(base, rows)
    found = row_tokens(base, rows)
    figures = {
        "continuations exact": f"{int(said.exact.sum())} of {len(said.exact)}",
        "continuations near": f"{int(said.near.sum())} of {len(said.near)}",
        "longest run, tokens of 50": int(said.runs.max()),
        "mean run, tokens": round(float(said.runs.mean()), 1),
        "exact memorization, whole passage": round(float(exact_memorization(found)[0]), 3),
        "extraction strength, whole passage": round(float(extraction_strength(found)[0]), 3),
        "loss, nats/token, whole passage": round(found[0].loss, 3),
    }
    if reference:
        values = torch.cat(kl_to_reference(base, neutral, reference))
        figures["KL on neutral text, nats/token"] = round(float(values.mean()), 4)
    return figures


if __name__ == "__main__":
    main()
