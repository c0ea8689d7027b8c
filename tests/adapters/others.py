"""Adapters as PEFT's versions and other trainers write them, tiny: all of one LoRA, so that what loads does the same.

`ALL` is name -> a function that writes one into a folder. `row_of` attaches it and says what came out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, HEAD, EMBED = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"
RANK, SCALE, PREFIX = 4, 2.0, "base_model.model."
VOCABULARY = 371  # of the tests' tiny model
NEW_FIELDS: dict[str, dict[str, Any]] = {  # of LoraConfig, as its file has them by default; read from PyPI's wheels
    "0.10.0": {
        "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": "tiny", "revision": None,
        "task_type": "CAUSAL_LM", "inference_mode": True, "r": RANK, "target_modules": ["q_proj", "lm_head"],
        "lora_alpha": 8, "lora_dropout": 0.0, "fan_in_fan_out": False, "bias": "none", "use_rslora": False,
        "modules_to_save": None, "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None,
        "rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core",
        "loftq_config": {}, "use_dora": False, "layer_replication": None,
    },
    "0.11.1": {}, "0.12.0": {}, "0.13.2": {},
    "0.14.0": {"exclude_modules": None, "eva_config": None, "lora_bias": False},
    "0.15.2": {"trainable_token_indices": None, "corda_config": None},
    "0.16.0": {"use_qalora": False, "qalora_group_size": 16},
    "0.17.1": {"target_parameters": None},
    "0.18.1": {
        "peft_version": "0.18.1", "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
    },
    "0.19.1": {"lora_ga_config": None, "use_bdlora": None},
    "0.20.0": {"velora_config": None, "monteclora_config": None},
    "0.21.2": {"kasa_config": None},
}  # fmt: skip
LATEST = list(NEW_FIELDS)[-1]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|"
    r"gate_proj|up_proj|down_proj|proj|linear).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj)))"
)


def config(version: str = LATEST, **values: Any) -> dict[str, Any]:
    """Return the config that a version of PEFT writes."""
    versions = list(NEW_FIELDS)
    fields = {k: v for each in versions[: versions.index(version) + 1] for k, v in NEW_FIELDS[each].items()}
    return {**fields, **({"peft_version": version} if "peft_version" in fields else {}), **values}


def factors(dtype: torch.dtype = torch.float32, modules: tuple[str, ...] = (Q, HEAD)) -> dict[str, torch.Tensor]:
    """Return the LoRA, whose numbers are the same in every dtype."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        out = VOCABULARY if module == HEAD else 32
        for side, shape in (("A", (RANK, 32)), ("B", (out, RANK))):
            numbers = torch.randint(-8, 9, shape, generator=generator) / 64
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = numbers.to(dtype)
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], *beside: str) -> None:
    """Write an adapter, and files of other names beside it; a name that ends with / is a folder."""
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
    for name in beside:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"{}")


def lora(*beside: str, version: str = LATEST, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    """Return a writer of the LoRA with these settings."""
    return lambda folder, _: write(folder, factors(dtype), config(version, **values), *beside)


def renamed(change: Any) -> Any:
    """Return a writer of the LoRA with other names."""
    return lambda folder, _: write(folder, {change(k): v for k, v in factors().items()}, config())


def mixed(folder: Path, _: Any) -> None:
    """Each tensor has another dtype."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    write(folder, {k: v.to(d) for (k, v), d in zip(factors().items(), dtypes, strict=True)}, config())


def beside(names: dict[str, str], change: Any = lambda t: t, **values: Any) -> Any:
    """Return a writer of the LoRA with copies of the base's weights: their names in the file and in the base."""

    def writer(folder: Path, model: Any) -> None:
        base = model.state_dict()
        copies = {PREFIX + key: change(base[name]) for key, name in names.items()}
        write(folder, {**factors(), **copies}, config(**values))

    return writer


def plus(extra: dict[str, tuple[int, ...]], **values: Any) -> Any:
    """Return a writer of the LoRA with further tensors of these shapes."""
    return lambda folder, _: write(
        folder, {**factors(), **{PREFIX + k: torch.ones(shape) for k, shape in extra.items()}}, config(**values)
    )


def mlx(folder: Path, _: Any) -> None:
    """As mlx-lm writes it."""
    names = {
        k.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b"): v for k, v in factors().items()
    }
    save_file({k.removeprefix(PREFIX): v.T.contiguous() for k, v in names.items()}, folder / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": RANK, "scale": SCALE}}
    (folder / CONFIG).write_text(json.dumps({**settings, "model": "tiny", "optimizer": "adam"}))


def mlx_renamed(folder: Path, model: Any) -> None:
    """As mlx-lm writes it, under PEFT's file names."""
    mlx(folder, model)
    (folder / "adapters.safetensors").rename(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config()))


def sharded(folder: Path, _: Any) -> None:
    """In two files and an index."""
    for n, module in enumerate((Q, HEAD), 1):
        save_file(factors(modules=(module,)), folder / f"adapter_model-0000{n}-of-00002.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text("{}")
    (folder / CONFIG).write_text(json.dumps(config()))


def pickled(folder: Path, _: Any) -> None:
    """As PEFT wrote it before it knew safetensors."""
    torch.save(factors(), folder / "adapter_model.bin")
    (folder / CONFIG).write_text(json.dumps(config("0.10.0")))


def only_checkpoints(folder: Path, _: Any) -> None:
    """A trainer's output whose adapters are all in folders of it."""
    (folder / "checkpoint-20").mkdir()
    write(folder / "checkpoint-20", factors(), config())


TOKENIZER = ("README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
CHECKPOINT = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
OF_GEMMA = {"base_model_class": "Gemma3ForCausalLM", "parent_library": "transformers.models.gemma3.modeling_gemma3"}
TIED = {"lm_head.base_layer.weight": "lm_head.weight"}
BOTH = {"lm_head.weight": "lm_head.weight", f"{EMBED}.weight": f"{EMBED}.weight"}
ALL: dict[str, Any] = {
    **{f"PEFT {version}" + " (newest known)" * (version == LATEST): lora(version=version) for version in NEW_FIELDS},
    "Unsloth: a pattern in target_modules, unsloth_fixed": lora(
        *TOKENIZER, target_modules=UNSLOTH, auto_mapping={**OF_GEMMA, "unsloth_fixed": True},
    ),
    "TRL, transformers: a checkpoint with its optimizer": lora(*TOKENIZER, *CHECKPOINT, "checkpoint-10/"),
    "TRL, transformers: only checkpoint folders": only_checkpoints,
    "axolotl: config.json and a merged model's folder": lora(*TOKENIZER, "config.json", "debug.log", "merged/"),
    "LLaMA-Factory: figures and logs": lora(*TOKENIZER, "all_results.json", "trainer_log.jsonl", "training_loss.png"),
    "ms-swift: args.json and additional_config.json": lora("args.json", "additional_config.json"),
    "mlx-lm": mlx,
    "mlx-lm's names in PEFT's file": mlx_renamed,
    "names: with the adapter's name (.default.)": renamed(lambda k: k.replace(".weight", ".default.weight")),
    "names: without base_model.model.": renamed(lambda k: k.removeprefix(PREFIX)),
    "names: with base_model.model. twice": renamed(lambda k: PREFIX + k),
    "names: of torch.compile (_orig_mod.)": renamed(lambda k: k.replace(PREFIX, PREFIX + "_orig_mod.")),
    "names: of torch.compile around PEFT": renamed(lambda k: "_orig_mod." + k),
    "names: of FSDP": renamed(lambda k: k.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
    "names: of checkpointed layers": renamed(lambda k: k.replace("layers.0", "layers.0._checkpoint_wrapped_module")),
    "names: of DDP (module.)": renamed(lambda k: "module." + k),
    "sharded": sharded,
    "adapter_model.bin": pickled,
    "adapter_model.bin beside safetensors": lora("adapter_model.bin"),
    "float16": lora(dtype=torch.float16),
    "bfloat16": lora(dtype=torch.bfloat16),
    "float64": lora(dtype=torch.float64),
    "mixed dtypes": mixed,
    "target_modules: a pattern that would run for ever": lora(target_modules="(a+)+$"),
    "target_modules: all-linear": lora(target_modules="all-linear"),
    "exclude_modules, layers_to_transform, layers_pattern": lora(
        exclude_modules=r".*vision.*", layers_to_transform=[0], layers_pattern="layers",
    ),
    "rank_pattern and alpha_pattern: names": lora(
        r=16, lora_alpha=3, rank_pattern={Q: RANK, "^lm_head": RANK}, alpha_pattern={"q_proj": 8, "lm_head$": 8},
    ),
    "rank_pattern and alpha_pattern: escaped names": lora(
        r=16, lora_alpha=3, rank_pattern={re.escape(Q): RANK, "lm_head": RANK},
        alpha_pattern={re.escape(Q): 8, "lm_head": 8},
    ),
    "rank_pattern: regular expressions": lora(r=16, rank_pattern={".*(q|v)_proj": RANK, "lm_.*": RANK}),
    "alpha_pattern: regular expressions": lora(alpha_pattern={".*(q|v)_proj": 8}),
    "rank-stabilised (use_rslora)": lora(use_rslora=True, lora_alpha=4),
    **{f"init_lora_weights: {init}": lora(init_lora_weights=init) for init in (
        "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")},
    "DoRA": plus({f"{Q}.lora_magnitude_vector": (32,)}, use_dora=True),
    "DoRA's magnitudes, use_dora false": plus({f"{Q}.lora_magnitude_vector": (32,)}),
    "lora_bias": plus({f"{Q}.lora_B.bias": (32,)}, lora_bias=True),
    "bias: all": plus({f"{Q}.base_layer.bias": (32,)}, bias="all"),
    "LoRA on embeddings": plus({f"{EMBED}.lora_embedding_A": (4, VOCABULARY), f"{EMBED}.lora_embedding_B": (32, 4)}),
    "LoRA on experts (target_parameters)": lora(target_parameters=["mlp.experts.gate_up_proj"]),
    "lm_head, as PEFT saves it by default": beside(TIED),
    "lm_head, as PEFT saves it by default, in bfloat16": beside(TIED, lambda t: t.bfloat16()),
    "lm_head, with another head's weight": beside(TIED, lambda t: t * 1.001),
    "embeddings saved with the LoRA (save_embedding_layers)": beside(BOTH),
    "embeddings resized before training": beside(BOTH, lambda t: torch.cat([t, t[:3]])),
    "modules_to_save: as the base has it": beside(
        {f"{EMBED}.weight": f"{EMBED}.weight", "model.norm.weight": "model.norm.weight"},
        modules_to_save=["embed_tokens", "norm"],
    ),
    "modules_to_save: trained": beside(
        {f"{EMBED}.modules_to_save.default.weight": f"{EMBED}.weight"}, lambda t: t + 0.01,
        modules_to_save=["embed_tokens"],
    ),
    "modules_to_save: a head for classes": plus({"score.weight": (2, 32)}, modules_to_save=["score"]),
    **{f"{field}: {value!r}": lora(**{field: value}) for field, value in {
        "layer_replication": [[0, 2]], "trainable_token_indices": [1], "alora_invocation_tokens": [1],
        "use_qalora": True, "arrow_config": {"top_k": 3}, "kasa_config": {"k": 1}, "use_bdlora": {"nblocks": 2},
        "ensure_weight_tying": True, "megatron_config": {"a": 1}, "monteclora_config": {"num_samples": 2},
        "a_field_of_tomorrow": 0.5, "another_one": None,
    }.items()},
    **{f"peft_type: {kind}": lora(peft_type=kind) for kind in ("ADALORA", "IA3", "VERA", "PROMPT_TUNING")},
}  # fmt: skip


def row_of(name: str, base: Any, folder: Path) -> tuple[str, str]:
    """Write an adapter and attach it; returns `ok`, `refused` or `fails`, and a note."""
    from conftest import logits

    from unlearn_peft import attach, detach, read_bundle
    from unlearn_peft.errors import AdapterError

    path, plain = folder / re.sub(r"\W+", "-", name), folder / "plain"
    for place, writer in ((plain, lora()), (path, ALL[name])):
        if not place.exists():
            place.mkdir()
            writer(place, base.model)
    before = logits(base)
    attach(base, plain)
    expected = logits(base)
    detach(base)
    try:
        attach(base, path)
        same = torch.equal(logits(base), expected) and not torch.equal(expected, before)
        cells = ("ok", "") if same else ("fails", "attached, it does not what the LoRA does")
        detach(base)
        if (bundle := read_bundle(path)).base_weights:
            cells = cells[0], cells[1] or f"{bundle.carried}, equal to the base's, left out"
    except AdapterError as error:
        cells = ("refused", _sentence(str(error), path))
    return cells if torch.equal(logits(base), before) else ("fails", "the base's logits are not what they were")


def _sentence(text: str, path: Path) -> str:
    text = text.replace(f"the adapter {path} is refused: ", "").replace(str(path), path.name)
    return " ".join(text.replace("|", "\\|").split())
