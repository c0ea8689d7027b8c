"""Where should the delta sit, what should facts be pushed to, and from where should training start? On the same rows.

    python benchmarks/ways.py [--half choose|confirm] [--only NAME ...] [--ways NAME ...] [--base GGUF] [--dtype D]
                              [--kept] [--picture FILE]

The base is asked once for each subject of tests/fixtures/subjects; each way trains on the same examples, is attached
with several strengths, and measured: of the probes that the base answers, those that still leak, greedily; the share of
sampled answers that leak (4 a probe, temperature 1); the mean KL to the base on the neighbours and on what the base
itself answers to their questions (nats/token, both never trained on). What was asked and each way's figures are kept in
--output: run the same command again and it goes on. Prints each subject's lines, then a table of all together, and
draws --picture (extra report). The ways are those of WAYS, where `ga_kl` is the demo's recipe with `retain: auto`; some
7 core minutes for each and each subject, as long again for what is asked.
"""

import argparse
import json
import pickle
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from closed_form import edit, start_from
from jobs import keep
from stand_in_targets import pushed_to_stand_ins
from subjects import leaks, recipe_for, subjects
from variants import file_name

from unlearn_peft import forgetting, load_base
from unlearn_peft.data.tokenize import tokenize
from unlearn_peft.evaluate.token_scores import keep_reference, kl_to_reference
from unlearn_peft.files.atomic import atomic_file
from unlearn_peft.inference.generate import answers, leaked, sampled
from unlearn_peft.models.base import freeze
from unlearn_peft.models.layers import decoder_layers
from unlearn_peft.models.restore import left_as_found
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training.adapter_config import linear_within
from unlearn_peft.training.checkpoints import to_cpu
from unlearn_peft.training.examples import build
from unlearn_peft.training.finish import measure_rows
from unlearn_peft.training.save import save_adapter
from unlearn_peft.training.trainer import Job, Trained, Training

ROOT = Path(__file__).parent.parent
STRENGTHS = (0.7, 0.85, 1.0)
SAMPLES, TOKENS = 4, 40


@dataclass(frozen=True)
class Way:
    """A recipe's fields, and what is no field of one."""

    first: float = 0.5  # of the depth: the delta is on the layers from here
    last: float = 1.0
    names: tuple[str, ...] = ()  # of modules; none: all linear ones
    fields: dict = field(default_factory=dict)
    target: str = ""  # the stand-ins' prediction: alone, or beside the ascent
    start: bool = False  # from the closed form; where there are no steps it is left so


MLP, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
FEW = {"steps": 20, "warmup_steps": 2}
WAYS = {
    "ga_kl": Way(),
    "ga_kl, 20 steps": Way(fields=FEW),
    "middle layers": Way(0.27, 0.7),
    "mlp of the middle layers": Way(0.27, 0.7, MLP),
    "down_proj of the middle layers": Way(0.27, 0.7, ("down_proj",), {"learning_rate": 2e-3}),
    "mlp of the upper half": Way(names=MLP),
    "attention of the upper half": Way(names=ATTENTION),
    "undial": Way(fields={"objective": {"name": "undial", "forget_tokens": "specific", "retain_budget": None}}),
    "stand-ins' prediction": Way(target="alone"),
    "ga_kl and stand-ins' prediction": Way(target="beside"),
    "closed form": Way(0.13, 0.37, ("down_proj",), {"steps": 1}, start=True),
    "closed form, then 20 steps": Way(0.13, 0.37, ("down_proj",), {**FEW, "learning_rate": 4e-4}, start=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=["choose", "confirm"], help="all subjects by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="subjects by name")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="NAME", default=list(WAYS),
                        help=f"of {'; '.join(WAYS)}; all by default")  # fmt: skip
    parser.add_argument("--base", default="demo", help="as load_base takes it; demo by default")
    parser.add_argument("--dtype", default="auto", help="of the base; bfloat16 is faster where the CPU has it")
    parser.add_argument("--kept", action="store_true", help="load no model: table and picture of what is kept already")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "ways")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "ways.png")
    args = parser.parse_args()
    chosen = subjects(args.half, args.only)
    folder = args.output / file_name(f"{Path(args.base).stem} {args.dtype}")
    base = None if args.kept else load_base(args.base, args.dtype)
    found = {}
    for name, subject in chosen.items():
        for way in args.ways:
            place = folder / name / f"{file_name(way)}.json"
            if base is not None and not place.is_file():
                keep(place, points(base, subject, WAYS[way], asked(base, subject, folder / name)))
            if place.is_file():
                found[name, way] = json.loads(place.read_text())
                print(f"{name}:", *(line(way, point) for point in found[name, way]), sep="\n  ", flush=True)
    whole = {way: together([found[name, way] for name in chosen])
             for way in args.ways if all((name, way) in found for name in chosen)}  # fmt: skip
    if whole:
        print("| way | strength | answered probes that leak | samples that leak | KL: neighbours, own answers | "
              "core seconds |")  # fmt: skip
        print("|---" * 6 + "|")
        for way, summed in whole.items():
            print("\n".join(line(way, point) for point in summed))
        draw(args.picture, whole, len(chosen))


def asked(base, subject, folder):
    """Return what the base says of a subject, kept in a file: examples, rows, answers to probes and neighbours."""
    place = folder / "asked.pickle"
    if place.is_file():
        return pickle.loads(place.read_bytes())
    with tempfile.TemporaryDirectory() as temporary:
        recipe = recipe_for(temporary, subject, [], False)
        rows = build.read_sets(recipe)
    known = build.find_known(rows, base, recipe)
    made = build.make_retain(rows, base, recipe, known)
    rows["retain"] = made.rows
    own = []

    def kept(*args, **how):
        own.extend(generated := make(*args, **how))
        return generated

    make, build.self_generated_answers = build.self_generated_answers, kept
    try:
        sets = build.build_examples(rows, base, recipe, known)
    finally:
        build.self_generated_answers = make
    prompts = [row["prompt"] for row in subject["probes"]]
    beside = [row["prompt"] for row in subject["neighbours"]]
    found = {
        "sets": sets, "known": known, "rows": [*rows["forget"], *own], "near": made.rows[made.broad :],
        "greedy": answers(base, prompts, max_new_tokens=TOKENS),
        "beside": answers(base, beside, max_new_tokens=TOKENS),
    }  # fmt: skip
    with atomic_file(place) as temporary:
        temporary.write_bytes(pickle.dumps(found))
    return found


def points(base, subject, way, said):
    """Train once, and measure with each strength."""
    layers = decoder_layers(base.model)
    count = len(layers)
    numbers = list(range(round(way.first * count), round(way.last * count)))
    adapter = {"layers_to_transform": numbers, **({"target_modules": list(way.names)} if way.names else {})}
    deltas, began = {}, time.process_time()
    if way.start:
        near = tokenize(said["near"], base.tokenizer, what="retain")
        held = [*said["sets"].retain, *said["sets"].anchors]
        deltas = edit(base, said["rows"], said["known"], held, near, numbers, rank=8)
        if way.fields["steps"] > 1:  # of the upper half, the edit stays as it is
            upper = list(range(count // 2, count))
            names = {name.rpartition(".")[2] for name in linear_within(base.model, layers[count // 2 :])}
            adapter = {"layers": "all", "target_modules": pattern(numbers, upper, names)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        recipe = recipe_for(folder, subject, ["eval_every=1000"], False)
        recipe = make_recipe({**recipe.model_dump(exclude_unset=True), "adapter": adapter, **way.fields})
        if way.target:
            rows, known = said["rows"], said["known"]
            stack.enter_context(pushed_to_stand_ins(base, rows, known, alone=way.target == "alone"))
        path = Path(folder) / "adapter"
        train_from(base, recipe, said["sets"], deltas, path, way.fields.get("steps") == 1)
        seconds = time.process_time() - began
        neighbours = subject["neighbours"]
        own = [{"prompt": row["prompt"], "completion": text}
               for row, text in zip(neighbours, said["beside"], strict=True) if text.strip()]  # fmt: skip
        references = [(rows, keep_reference(base, rows)) for rows in (neighbours, own)]
        found = []
        for strength in STRENGTHS:
            with forgetting(base, path, strength=strength):
                found.append({"strength": strength, "core_seconds": seconds, **look(base, subject, said, references)})
    return found


def train_from(base, recipe, sets, deltas, path, at_once):
    """Train from the edits, or save them as they are; the base is left as it was."""
    with left_as_found(base.model):
        freeze(base.model)
        training = Training(base, [Job(recipe, sets)])
        try:
            trainer = training.trainers[0]
            start_from(trainer, deltas, recipe.adapter.lora_alpha / recipe.adapter.r)
            training.start()
            trainer.best = to_cpu(trainer.parameters)

            def finished(trained):
                save_adapter(path, trained, base, recipe, {}, b"")

            if at_once:
                measure_rows(trainer, training.runner)
                finished(Trained(0, training.model, "default", trainer.progress, 0.0, True, *trainer.sizes))
            else:
                training.loop(finished, [])
        finally:
            training.close()


def pattern(edited, upper, names):
    """Return what finds the edited layers' linear layer and all linear layers of the upper half."""
    some, others = ("|".join(map(str, numbers)) for numbers in (edited, upper))
    return rf".*\.layers\.(({some})\.mlp\.down_proj|({others})\..*\.({'|'.join(sorted(names))}))"


def look(base, subject, said, references):
    """Return the figures of the model as it is."""
    probes, prompts = subject["probes"], [row["prompt"] for row in subject["probes"]]
    how = {"max_new_tokens": TOKENS}
    answered = [n for n, row in enumerate(probes) if leaked(said["greedy"][n], row["leak"])]
    greedy = answers(base, prompts, **how)
    harm, on_own = (float(torch.cat(kl_to_reference(base, rows, kept)).mean()) for rows, kept in references)
    return {
        "answered": len(answered), "leaking": sum(bool(leaked(greedy[n], probes[n]["leak"])) for n in answered),
        "sampled": leaks(sampled(base, prompts, count=SAMPLES, **how), probes), "n_sampled": len(probes) * SAMPLES,
        "neighbour_kl": harm, "own_answers_kl": on_own,
    }  # fmt: skip


def together(subjects_points):
    """Sum up subjects, strength by strength; KL is the mean of theirs."""

    def summed(key, values):
        return sum(values) / len(values) if key.endswith("_kl") or key == "strength" else sum(values)

    return [
        {key: summed(key, [point[key] for point in same]) for key in same[0]}
        for same in zip(*subjects_points, strict=True)
    ]  # fmt: skip


def line(way, point):
    """Format one row of the table."""
    return (
        f"| {way} | {point['strength']:g} | {point['leaking']} of {point['answered']} | "
        f"{100 * point['sampled'] / point['n_sampled']:.1f} % of {point['n_sampled']} | "
        f"{point['neighbour_kl']:.4f}, {point['own_answers_kl']:.4f} | {point['core_seconds']:.0f} |"
    )


def draw(path, lines, count):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for n, (way, found) in enumerate(lines.items()):
        x = [point["neighbour_kl"] for point in found]
        y = [100 * point["sampled"] / point["n_sampled"] for point in found]
        axes.plot(x, y, "o-", color=colours(n % 20), lw=1.4, ms=5, label=way)
    axes.axvline(0.01, color="grey", ls=":", lw=1)
    axes.axhline(3, color="grey", ls=":", lw=1)
    axes.set(xscale="log", xlabel="harm: neighbours' KL to the base, nats/token", ylabel="sampled answers that leak, %")
    axes.set_title(f"{count} subjects; down and left is better. A line: strengths {', '.join(map(str, STRENGTHS))}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    main()
