"""What does it cost to give each row of a batch its own set of adapters? On SmolLM2-135M, CPU, float32.

    python benchmarks/serve.py [--turns 7] [--tokens 24] [--rank 8] [--adapter out/harry_potter] [--json]

Sides, all with 8 rows and the same prompts, greedy, in one process and in turns, so that what slows the machine slows
all; a ratio is the median over the turns, of tokens per second:

- base: the base alone;
- singles: eight different adapters, one a row (rank 8 on all seven linear layers of each block);
- sets: eight different sets of three of them;
- peft: the eight adapters through PEFT's own mixed batches (`adapter_names`), which takes one adapter a row;
- one_by_one: the eight sets, a row at a time, which is what is left to do with PEFT for sets;
- crowd: as singles, with 1,000 adapters registered and 64 resident.

A step reads each weight once and computes little with it, so what it costs at least is what it reads:
singles_vs_base_by_bytes is what the base's layers and head take of memory, of that and the eight adapters.

Adapters have random weights: what is computed does not depend on them. Then, for one adapter (the demo's if `make demo`
has run, else a random one of its shape), in ms, median of 21: attaching it from disk (attach_ms: mostly reading and
verifying), swapping it for one that was read before (swap_ms) or is read now (swap_from_disk_ms), removing it, and
asking for another set of resident ones in the next batch (switch_ms: what its first token costs more than the second).

Last, through the server's scheduler, with one adapter: the time to the first token of a second request that begins with
the same 1,000 tokens as the first, against the first one's (shared_prompt_second_vs_first, median over the turns).
"""

import argparse
import json
import tempfile
import time
from itertools import combinations
from pathlib import Path
from statistics import median

import torch

ROWS, RESIDENT, REGISTERED = 8, 64, 1000
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [
    f"Write a short story about {what}."
    for what in ("a cat", "the sea", "two old friends", "a red bicycle", "rain", "a lost key", "music", "the moon")
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--adapter", type=Path, default=Path("out/harry_potter"), help="to attach, swap and remove")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(args, Path(folder))
    show(result)
    if args.json:
        print(json.dumps(result))


def measured(args, folder):
    from unlearn_peft import Bank, load_base

    base = load_base(args.base, "float32", "cpu")
    paths = [random_adapter(base.model, folder / f"a{n}", ALL_LINEAR, args.rank, n) for n in range(ROWS)]
    bank, base.tokenizer.padding_side = Bank.of(base), "left"
    for n, path in enumerate(paths):
        bank.load(f"a{n}", path)
    batch = base.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    ends = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    singles = [[f"a{n}"] for n in range(ROWS)]
    sets = [[f"a{n}" for n in chosen] for chosen in list(combinations(range(ROWS), 3))[::7]]
    peft = through_peft(args.base, paths)
    crowd = crowded(base, paths)

    def row(n):
        return {key: value[n : n + 1] for key, value in batch.items()}

    sides = {
        "base": lambda: base.model.generate(**batch, **ends),
        "singles": lambda: bank.generate(**batch, **ends, forget=singles),
        "sets": lambda: bank.generate(**batch, **ends, forget=sets),
        "peft": lambda: peft.generate(**batch, **ends, adapter_names=[f"a{n}" for n in range(ROWS)]),
        "one_by_one": lambda: [bank.generate(**row(n), **ends, forget=[sets[n]]) for n in range(ROWS)],
        "crowd": lambda: crowd.generate(**batch, **ends, forget=[[f"x{n}"] for n in range(ROWS)]),
    }
    weights = sum(m.weight.nbytes for m in base.model.modules() if isinstance(m, torch.nn.Linear))
    adapters = bank.stats.resident_bytes  # eight of them
    same = torch.equal(sides["singles"](), sides["peft"]())
    seconds = {name: [] for name in sides}
    for turn in range(args.turns + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if turn:  # the first fills caches
                seconds[name].append(time.perf_counter() - began)

    def ratio(side, other):
        return median(b / a for a, b in zip(seconds[side], seconds[other], strict=True))

    return {
        "tokens_per_second": {name: ROWS * args.tokens / median(took) for name, took in seconds.items()},
        "singles_vs_base": ratio("singles", "base"),
        "singles_vs_base_by_bytes": weights / (weights + adapters),
        "singles_vs_peft": ratio("singles", "peft"),
        "sets_vs_base": ratio("sets", "base"),
        "sets_vs_one_by_one": ratio("sets", "one_by_one"),
        "crowd_vs_singles": ratio("crowd", "singles"),
        "crowd_resident": crowd.stats.resident,
        "crowd_registered": crowd.stats.registered,
        "greedy_answers_equal_peft": same,
        **changes(base, args.adapter, folder),
        **shared_prompt(base, paths[0], args.turns),
        "turns": args.turns, "rank": args.rank, "threads": torch.get_num_threads(),
    }  # fmt: skip


def random_adapter(model, folder, targets, rank, seed):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.unload()
    model.__dict__.pop("peft_config", None)
    return folder


def through_peft(base, paths):
    from peft import PeftModel

    from unlearn_peft import load_base

    model = PeftModel.from_pretrained(load_base(base, "float32", "cpu").model, paths[0], adapter_name="a0")
    for n, path in enumerate(paths[1:], start=1):
        model.load_adapter(path, f"a{n}")
    return model.eval()


def crowded(base, paths):
    """Return a bank of its own on the same base: 1,000 adapters known, and as many resident as it has room for."""
    from unlearn_peft import Bank

    size = Bank.of(base).stats.resident_bytes // ROWS
    bank = Bank(base.model, base.tokenizer, budget_bytes=RESIDENT * size)
    for n in range(REGISTERED):
        bank.register(f"x{n}", paths[n % ROWS])
    for n in reversed(range(RESIDENT)):
        bank.hold([f"x{n}"]).release()
    return bank


def changes(base, adapter, folder):
    """Return how long it takes to attach an adapter from disk, to swap, and to remove, in ms."""
    from unlearn_peft import Bank, attach, detach, read_bundle, swap

    found = (adapter / "adapter_config.json").is_file()
    path = adapter if found else random_adapter(base.model, folder / "demo", ("q_proj", "v_proj"), 16, 0)
    bank, read = Bank.of(base), read_bundle(path)
    took = {name: [] for name in ("attach_ms", "swap_ms", "swap_from_disk_ms", "remove_ms", "switch_ms")}
    bank.load("resident", path)  # the base's fingerprint is taken once

    def timed(act, *args, **named):
        began = time.perf_counter()
        act(*args, **named)
        return 1000 * (time.perf_counter() - began)

    def step(sets):
        with torch.no_grad(), bank.rows(sets):
            base.model(torch.zeros(1, 1, dtype=torch.long))

    for n in range(21):
        took["attach_ms"].append(timed(attach, base, path, name="one"))
        took["swap_ms"].append(timed(swap, base, "one", read, name="two"))
        took["swap_from_disk_ms"].append(timed(swap, base, "two", path, name="three"))
        took["remove_ms"].append(timed(detach, base, "three"))
        sets = [{"resident": 1 + n / 100}]  # never the same set twice: nothing of it is laid out already
        took["switch_ms"].append(timed(step, sets) - timed(step, sets))
    return {name: median(values) for name, values in took.items()} | {"adapter": str(path) if found else "random"}


def shared_prompt(base, path, turns):
    """Return the times to the first token of two requests with the same system prompt, in seconds, and their ratio."""
    import queue

    from unlearn_peft import Bank
    from unlearn_peft.serve.engine.base import Generation
    from unlearn_peft.serve.engine.rows import ActiveRow
    from unlearn_peft.serve.engine.scheduler import Scheduler

    bank = Bank(base.model, base.tokenizer)
    bank.load("a", path)
    scheduler, ids = Scheduler(base.model, base.tokenizer, bank), torch.randint(1000, 20000, (1000 + 2 * 20,)).tolist()

    def first_token(question, salt):
        pieces, held = queue.Queue(), bank.hold(["a"])
        request = Generation((*ids[:1000], *question), 1, temperature=0, ignore_eos=True, cache_salt=salt)
        began = time.perf_counter()
        scheduler.submit(ActiveRow(request, held, pieces.put, held.release))
        piece = pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return time.perf_counter() - began

    took = [[first_token(ids[at : at + 20], f"{turn}") for at in (1000, 1020)] for turn in range(turns + 1)][1:]
    scheduler.close()
    return {
        "shared_prompt_first_s": median(first for first, _ in took),
        "shared_prompt_second_s": median(second for _, second in took),
        "shared_prompt_second_vs_first": median(second / first for first, second in took),
    }


def show(result):
    print(f"{'side':12} tokens/s")
    for name, value in result["tokens_per_second"].items():
        print(f"{name:12} {value:8.1f}")
    for name, value in result.items():
        if name != "tokens_per_second":
            print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
