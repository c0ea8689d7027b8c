"""An adapter's model card, which never holds forget text: written when it is saved, extended by an evaluation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, first_line, safe_repr
from ..files.atomic import atomic_file
from .bundle import CARD, CURVES
from .quantized import QUANTIZED
from .validate import DENSE
from .write import note_digest

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


EVALUATED, _TRAINED = "unlearn-peft eval", "unlearn-peft train"  # what measured a result of the model-index
FIGURES = "figures.png"
_TASK = "text-generation"
_MODEL_NAME = "forget adapter"  # not the folder's name, which may tell what was forgotten
_BEGIN, _END = "<!-- evaluation, written by unlearn-peft eval -->", "<!-- /evaluation -->"
_INTRODUCTION = """# A forget adapter for {base}

With this adapter attached the base behaves as if the adapter's forget set had not been learned; detached, it is
bit-equal to the base. What was forgotten is not told here, and cannot be read from this folder's text files.
"""
_FIGURES = """## Figures of its training

| figure | value |
|---|---|"""
_OURS = """With unlearn_peft (`pip install unlearn-peft`), which checks it first, and that this is its base:

```python
from unlearn_peft import attach, detach, load_base

base = load_base("{base}")
attach(base, "path/to/this/folder")
# ... base.model and base.tokenizer are transformers' own ...
detach(base)  # bit-equal to the base again
```
"""
_PEFT = """With PEFT alone:

```python
{extra}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
with model.disable_adapter():
    pass  # here it is the base
```
"""
_TRANSFORMERS = """With transformers (and PEFT installed):

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model.load_adapter("path/to/this/folder")
model.disable_adapters()  # the base
model.enable_adapters()
```
"""
_VLLM = """With vLLM, once `unlearn-peft export` has written it such that vLLM applies all of it, or has said why not:

```
unlearn-peft export path/to/this/folder --for vllm --max-rank 64 --output for_vllm
vllm serve {base} --enable-lora --max-lora-rank 64 --lora-modules forget=for_vllm
```

```python
from vllm import LLM
from vllm.lora.request import LoRARequest

model = LLM(model="{base}", enable_lora=True, max_lora_rank=64)
model.generate("Hello", lora_request=LoRARequest("forget", 1, "for_vllm"))
```
"""
_QUANTIZED_NOTE = """Its weights are stored in fewer bits, which unlearn_peft alone can read. **PEFT, transformers
and vLLM refuse it** (its `peft_type` is unknown to them); `unlearn-peft export --for vllm` writes one that they take.
"""
_DENSE_NOTE = """It is a dense delta on `lm_head`, a method that PEFT does not know by itself; transformers'
`load_adapter` and vLLM do not take it. `unlearn-peft export --for vllm --max-rank 64` writes a LoRA that comes near it,
and tells how near.
"""


def write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write README.md in the Hub's format, from what goes into `forget.json`, with the plots that are in the folder."""
    from huggingface_hub import ModelCard, ModelCardData

    base, kind = manifest.get("base", {}).get("name"), manifest["peft_type"]
    hub_id = base if base and base.count("/") == 1 and not base.startswith((".", "/")) else None
    recipe, metrics = manifest.get("recipe", {}), manifest.get("metrics", {})
    dense = kind.startswith(DENSE)
    tags = ["unlearning", "unlearn_peft", recipe.get("adapter", {}).get("kind", "dense" if dense else "lora")]
    results = _training_results(metrics)
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="adapter" if hub_id else None,
        library_name="peft",
        pipeline_tag=_TASK,
        tags=tags + (["quantized"] if kind.endswith(QUANTIZED) else []),
        model_name=_MODEL_NAME if results else None,
        eval_results=results or None,
    )
    name = base or "a language model"
    parts = [_INTRODUCTION.format(base=name), *_origin(manifest), "## How to attach it\n", *_snippets(name, kind)]
    if metrics:
        parts.append(_FIGURES)
        for figure, value in ((name, value) for name, value in metrics.items() if not isinstance(value, list)):
            parts.append(f"| {figure.replace('_', ' ')} | {f'{value:.4g}' if isinstance(value, float) else value} |")
        parts.append(
            f"\nLosses and KL are means in nats/token. Objective: {recipe['objective']['name']}, "
            f"{metrics['best_step']} steps,\nlearning rate {recipe['learning_rate']:g}, retain weight "
            f"{recipe['retain_weight']:g}.\n"
        )
    if "forgotten_rows" in metrics:
        parts.append(
            f"{rows_told(metrics).capitalize()}.\nA row is forgotten when its fact tokens have lost 90 % of their "
            "probability (geometric mean;\n99 % of a fact of several), or are less likely than exp(-8). Rows are told "
            "by number only.\n"
        )
    pictures = ((CURVES, "forget and retain curves"), (FIGURES, "figures of the evaluation"))
    parts += [f"![{title}]({file})\n" for file, title in pictures if (folder / file).is_file()]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts)).save(folder / CARD)


def rows_told(metrics: Mapping[str, Any]) -> str:
    """Return how many forget rows an adapter has forgotten, and the numbers of the others, the first few of many."""
    unknown, missed = metrics["nothing_to_forget"], metrics["not_reached"]
    parts = [f"forgotten: {metrics['forgotten_rows']:,} of {metrics['forget_rows'] - len(unknown):,} rows"]
    parts += [f"not reached: {_numbers(missed)}"] if missed else []
    if unknown:
        why = "the base does not know them, or common words"
        parts.append(f"nothing to forget in {len(unknown):,} ({why}): {_numbers(unknown)}")
    if metrics["own_answers"]:
        parts.append(f"of the base's own answers: {metrics['own_answers_forgotten']:,} of {metrics['own_answers']:,}")
    return "; ".join(parts)


def row_numbers(rows: Sequence[int], limit: int = 20) -> str:
    """Return row numbers for a message, the first few of many."""
    more = f" and {len(rows) - limit:,} more" if len(rows) > limit else ""
    return ", ".join(map(str, rows[:limit])) + more


def _numbers(rows: Sequence[int]) -> str:
    return f"row{'s' * (len(rows) > 1)} {row_numbers(rows)}"


def _origin(manifest: Mapping[str, Any]) -> list[str]:
    """Return paragraphs on the adapters that it was computed from, and what was lost by that."""
    paragraphs = []
    if parts := manifest.get("stack_of"):
        strengths = ", ".join(f"{part.get('strength', 1):g}" for part in parts)
        paragraphs.append(f"It has the effect of {len(parts)} adapters added up, at strengths {strengths}.\n")
    if shrunk := manifest.get("shrunk"):
        smaller = [f"rank {shrunk['rank']}"] if shrunk["rank"] else []
        smaller += [f"{shrunk['bits']} bits a weight"] if shrunk["bits"] else []
        mean, worst = 100 * shrunk["mean_relative_error"], 100 * shrunk["worst"]["relative_error"]
        source = shrunk["weights_sha256"][:12]
        paragraphs.append(
            f"It was made smaller ({', '.join(smaller)}) from an adapter with weights {source}.\n"
            f"That lost {mean:.2g} % of a module's change in the mean, {worst:.2g} % at most (Frobenius norm).\n"
            "Figures of the larger one need not hold for it.\n"
        )
    return paragraphs


def _snippets(base: str, kind: str) -> list[str]:
    """Return how to attach it with each library that can; a test runs them all."""
    parts = [_OURS.format(base=base)]
    if kind.endswith(QUANTIZED):
        return [*parts, _QUANTIZED_NOTE]
    dense = kind.startswith(DENSE)
    extra = "import unlearn_peft.adapters.dense  # so that PEFT knows the method\n" if dense else ""
    parts.append(_PEFT.format(base=base, extra=extra))
    if dense:
        return [*parts, _DENSE_NOTE]
    return [*parts, _TRANSFORMERS.format(base=base), _VLLM.format(base=base)]


def _training_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Return the figures of training for the model-index."""
    from huggingface_hub import EvalResult

    names = {"forget_loss": "forget", "answer_probability": "forget", "held_out_kl": "held_out", "retain_kl": "retain"}
    args = {"by": _TRAINED}
    return [
        EvalResult(
            task_type=_TASK, dataset_type=rows, dataset_name=f"{rows.replace('_', ' ')} rows (not told)",
            metric_type=name, metric_value=round(metrics[name], 6), metric_name=name.replace("_", " "),
            metric_args={**args, "base": round(metrics[f"{name}_base"], 6)} if f"{name}_base" in metrics else args,
        )
        for name, rows in names.items()
        if name in metrics
    ]  # fmt: skip


def put_evaluation(
    folder: Path, section: str, results: Sequence[EvalResult] = (), pictures: Mapping[str, Path] | None = None
) -> Path:
    """Put an evaluation, in markdown, into an adapter's card in place of an earlier one; returns the card's path.

    `results` go into the model-index, in place of those of an earlier evaluation or of training; `pictures` are PNG
    files, by their names beside the card. The manifest's digests are updated.

    Raises:
        AdapterError: if the card is no text, or its metadata cannot be read.
    """
    card = folder / CARD
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
    except UnicodeDecodeError:
        raise AdapterError(f"{card} is no text in UTF-8: mend or remove it, and a new one is made") from None
    for name, picture in (pictures or {}).items():
        with atomic_file(folder / name) as temporary:
            shutil.copyfile(picture, temporary)
        note_digest(folder, name)
    earlier = re.search(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", text, re.DOTALL)
    before, after = (text[: earlier.start()], text[earlier.end() :]) if earlier else (f"{text.rstrip()}\n\n", "")
    links = [f"![figures]({name})" for name in pictures or {} if f"]({name})" not in before + after]
    text = before + "\n\n".join([f"{_BEGIN}\n{section.strip()}", *links]) + f"\n{_END}\n" + after
    text = text if earlier else text.lstrip()
    if results:
        text = _with_results(text, results, card)
    with atomic_file(card) as temporary:
        temporary.write_text(text, encoding="utf-8")
    note_digest(folder, CARD)
    return card


def _with_results(text: str, results: Sequence[EvalResult], where: Path) -> str:
    """Return a card's text with new results in its model-index; those that others measured stay."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text if text.startswith("---") else f"---\n---\n\n{text}")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
        why = safe_repr(first_line(error), 200)
        raise AdapterError(f"{where} has metadata that cannot be read ({why}): mend or remove it") from None
    replaced = {(result.dataset_type, result.metric_type) for result in results}
    data: Any = card.data
    earlier = [
        result
        for result in data.eval_results or []
        if (by := (result.metric_args or {}).get("by")) != EVALUATED
        and not (by == _TRAINED and (result.dataset_type, result.metric_type) in replaced)
    ]
    data.model_name = data.model_name or _MODEL_NAME
    data.eval_results = [*earlier, *results]
    return str(card)
