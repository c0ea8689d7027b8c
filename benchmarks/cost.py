"""What a recipe costs, from the command to the adapter and its comparison, by phase, in counts that no noise bends.

    python benchmarks/cost.py [recipes/harry_potter.yaml ...] [--set FIELD=VALUE ...] [--dtype D] [--json FILE]

For each phase a line: GFLOP by torch's flop counter, those of the base's weights alone (tokens through them, padding
and all; in a step also where a gradient goes back through them), the tokens that went through the layers and through
the head, seconds, and the process's peak memory so far. What is above the weights alone is attention, the adapter and
the rest. Only ratios of one run mean anything in seconds. The phases:

- asking: all that the base generates while rows are made;
- facts: which tokens carry them, and what else is read of the base for that;
- reference: each row once through the base;
- steps, evaluations, and the finish, which measures what is saved;
- save;
- compare: greedy answers and KL before, with and after, as `unlearn-peft compare` does.

Several recipes are trained at once, as by `unlearn-peft train A B`.
"""

import argparse
import json
import resource
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from unlearn_peft import load_base, load_recipe
from unlearn_peft.data.rows import read_rows
from unlearn_peft.evaluate.compare import compare
from unlearn_peft.inference import generate
from unlearn_peft.models.layers import decoder_layers, linear_layers
from unlearn_peft.training import adapter_trainer, run, trainer
from unlearn_peft.training.step import reference

ROOT = Path(__file__).parent.parent
PHASES = {
    "asking": (generate, "generate"), "reference": (reference.ReferenceCache, "prepare"),
    "steps": (trainer.Training, "one_step"), "evaluations": (adapter_trainer.AdapterTrainer, "evaluate"),
    "finish": (trainer, "finish"), "save": (run, "save_adapter"),
}  # fmt: skip
WHOLE = "compare"
HEAD = "| phase | GFLOP | by the base's weights | tokens: layers, head | seconds | peak GB |\n|---|---|---|---|---|---|"
PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", type=Path, default=[ROOT / "recipes" / "harry_potter.yaml"], metavar="RECIPE"
    )
    parser.add_argument("--set", action="append", default=[], help="override a field of all recipes; repeatable")
    parser.add_argument("--dtype", default="auto", help="of the base")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipes = [load_recipe(path, args.set, output=f"{folder}/{n}") for n, path in enumerate(args.recipes)]
        figures = {phase: vars(cost) for phase, cost in measured(recipes, args.dtype).items()}
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")


@dataclass(eq=False)
class Cost:
    """Of a phase, without the phases inside it."""

    gflop: float = 0.0
    weights_gflop: float = 0.0
    layer_tokens: float = 0.0
    head_tokens: float = 0.0
    seconds: float = 0.0
    peak_gb: float = 0.0


class Ruler(TorchFunctionMode):
    """Adds what is counted to the innermost phase under way."""

    def __init__(self):
        super().__init__()
        self.costs, self.open, self.shares = {}, [], {}
        self.counter, self.flops, self.since = FlopCounterMode(display=False), 0, time.monotonic()

    @contextmanager
    def phase(self, name):
        """Count what a block does as a phase."""
        self._settle()
        self.open.append(self.costs.setdefault(name, Cost()))
        try:
            yield
        finally:
            self._settle()
            self.open.pop()

    def inside(self, owner, attribute, name):
        """Return a context in which calls of a function are a phase; while comparing, they are part of that."""
        function = getattr(owner, attribute)

        def counted(*args, **kwargs):
            with nullcontext() if self.open[-1:] == [self.costs.get(WHOLE)] else self.phase(name):
                return function(*args, **kwargs)

        return patch.object(owner, attribute, counted)

    def watch(self, base):
        """Count what goes through a base's weights, wherever they are multiplied."""
        layers, head = decoder_layers(base.model), base.model.get_output_embeddings()
        linears = [m.weight for layer in layers for m in linear_layers(layer).values()]
        size = sum(weight.numel() for weight in linears)
        self.shares = {weight.data_ptr(): ("layer_tokens", weight.numel() / size) for weight in linears}
        self.shares[head.weight.data_ptr()] = ("head_tokens", 1.0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and self.open and (known := self.shares.get(args[1].data_ptr())):
            (which, share), (states, weight), cost = known, args[:2], self.open[-1]
            tokens = states.numel() // states.shape[-1]
            setattr(cost, which, getattr(cost, which) + tokens * share)
            back = states.requires_grad and torch.is_grad_enabled()
            cost.weights_gflop += 2 * (1 + back) * tokens * weight.numel() / 1e9
        return func(*args, **(kwargs or {}))

    def _settle(self):
        flops, now = self.counter.get_total_flops(), time.monotonic()
        if self.open:
            cost = self.open[-1]
            cost.gflop += (flops - self.flops) / 1e9
            cost.seconds += now - self.since
            cost.peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        self.flops, self.since = flops, now


def measured(recipes, dtype):
    """Train recipes and compare the first's adapter; returns what each phase cost."""
    ruler = Ruler()
    with ruler.counter, ruler, ExitStack() as stack:
        with ruler.phase("load"):
            base = load_base(recipes[0].base, dtype)
        ruler.watch(base)
        for name, (owner, attribute) in PHASES.items():
            stack.enter_context(ruler.inside(owner, attribute, name))
        with ruler.phase("facts"):
            adapters = run.unlearn_many(recipes, base, quiet=True)
        first = recipes[0]
        if first.probes:
            sets = {name: read_rows(getattr(first, name), name) for name in ("probes", "neighbours")}
            with ruler.phase(WHOLE):
                compare(base, [adapters[0].path], sets["probes"], sets["neighbours"])
    return ruler.costs


def table(figures):
    """Format the figures of all phases, and their sum."""
    lines = [HEAD]
    whole = {key: sum(cost[key] for cost in figures.values()) for key in vars(Cost())}
    whole["peak_gb"] = max(cost["peak_gb"] for cost in figures.values())
    for name, cost in {**figures, "all": whole}.items():
        lines.append(
            f"| {name} | {cost['gflop']:,.0f} | {cost['weights_gflop']:,.0f} | {cost['layer_tokens']:,.0f}, "
            f"{cost['head_tokens']:,.0f} | {cost['seconds']:.1f} | {cost['peak_gb']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
