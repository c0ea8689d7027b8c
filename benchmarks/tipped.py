"""How many neighbours' answers would change anyway? An adapter beside harmless noise in the base's weights.

    python benchmarks/tipped.py [ADAPTER] [--draws 3] [--json]

A greedy answer changes where two next tokens are almost as likely as each other, whatever the change is. So each linear
layer of the base gets random noise, of the size at which the neighbours' KL to the base is the adapter's, and a second
time of a quarter of that KL. It knows nothing of what is forgotten: what it changes, anything of that KL would change.
For each: neighbours whose answer says the same as before, of the demo's twelve and of the 24 others.
"""

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import torch

from unlearn_peft import forgetting, load_base
from unlearn_peft.data.rows import read_rows
from unlearn_peft.data.source import DataSpec
from unlearn_peft.evaluate.metrics.consistency import facts_in, says_all
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference
from unlearn_peft.inference.contrast import fact_spans
from unlearn_peft.inference.generate import answers

ROOT = Path(__file__).parent.parent
SETS = ("harry_potter_neighbours", "harry_potter_neighbours_unseen")
FIRST = 0.004  # of a layer's standard deviation; the right share is found from what this one does


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", metavar="ADAPTER", default="out/readme", help="default: out/readme")
    parser.add_argument("--base", default="demo", help="the base that it was trained on (default: demo)")
    parser.add_argument("--draws", type=int, default=3, help="of noise, at each size (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    rows = [read_rows(DataSpec(path=str(ROOT / "recipes" / "data" / f"{name}.jsonl")), name) for name in SETS]
    base = load_base(args.base)
    neighbours = Neighbours(base, rows)
    print("| change | neighbours' KL | answers that name the same, of 12 | of 24 unseen |\n|---|---|---|---|")
    with forgetting(base, args.adapter):
        found = {"the adapter": neighbours.again()}
    print_row("the adapter", *found["the adapter"])
    for share, name in ((1, "noise of the same KL"), (0.25, "noise of a quarter of it")):
        for draw in range(args.draws):
            label = f"{name}, draw {draw}"
            size = (
                FIRST * (share * found["the adapter"][0] / neighbours.kl_at(FIRST, draw)) ** 0.5
            )  # KL goes by the square
            with noise(base, size, draw):
                found[label] = neighbours.again()
            print_row(label, *found[label])
    if args.json:
        print(json.dumps(found))


def print_row(name, kl, *counts):
    print(f"| {name} | {kl:.4f} nats/token | {' | '.join(map(str, counts))} |", flush=True)


class Neighbours:
    """The neighbours, with the answers of the base alone and its predictions of their answers."""

    def __init__(self, base, sets):
        self.base, self.sizes = base, [len(rows) for rows in sets]
        self.rows = [row for rows in sets for row in rows]
        self.prompts = [row["prompt"] for row in self.rows]
        pairs = list(zip(self.prompts, self._answers(), strict=True))
        spans = fact_spans(base, pairs)
        self.said = [facts_in(*pair, found) for pair, found in zip(pairs, spans, strict=True)]
        self.reference = keep_reference(base, self.rows)

    def again(self):
        """Return the KL to the base, and of each set how many answers say the same as before."""
        same = says_all(self.said, self._answers()).tolist()
        counts = [int(sum(same[sum(self.sizes[:n]) :][:size])) for n, size in enumerate(self.sizes)]
        return [self._mean_kl(), *counts]

    def kl_at(self, size, seed):
        """Return the KL to the base that noise of this size brings."""
        with noise(self.base, size, seed):
            return self._mean_kl()

    def _answers(self):
        return answers(self.base, self.prompts, max_new_tokens=32)

    def _mean_kl(self):
        return float(torch.cat(kl_to_reference(self.base, self.rows, self.reference)).mean())


@contextmanager
def noise(base, size, seed):
    """Add noise to each linear layer but the head, `size` times the deviation of its weights; take it out again."""
    head = base.model.get_output_embeddings()
    layers = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights, generator = [layer.weight.data for layer in layers], torch.Generator().manual_seed(seed)
    for layer, weight in zip(layers, weights, strict=True):
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        layer.weight.data = weight + size * weight.std() * drawn
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight


if __name__ == "__main__":
    main()
