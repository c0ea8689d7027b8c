"""Tiny random models of every causal-LM family of transformers."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

LARGEST = 30_000_000  # weights
SIZES: dict[str, Any] = dict(
    hidden_size=32, n_embd=32, d_model=32, dim=32, embed_dim=32, intermediate_size=64, ffn_dim=64, d_ff=64, n_inner=64,
    ffn_hidden_size=64, encoder_ffn_dim=64, decoder_ffn_dim=64, shared_intermediate_size=32, moe_intermediate_size=32,
    num_hidden_layers=4, n_layer=4, n_layers=4, num_layers=4, encoder_layers=4, decoder_layers=4,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, n_positions=256, max_sequence_length=256,
    max_seq_len=256, vocab_size_per_layer_input=400, hidden_size_per_layer_input=8, rotary_dim=4,
    word_embed_proj_dim=32,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, top_k=2,
    moe_topk=2, moe_k=2, n_group=1, topk_group=1, n_shared_experts=1, shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, sliding_window=64, initializer_range=0.1, intermediate_size_mlp=64, expert_ffn_size=32,
    mamba_d_state=8, mamba_dt_rank=4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, state_size=8,
    mamba_headdim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, chunk_size=16, mamba_chunk_size=16,
    lru_width=32, attention_window_size=64, embedding_size=32, embed_size=32, time_step_rank=4, kv_channels=8,
    index_n_heads=2, index_head_dim=8, index_topk=8, num_kv_shared_layers=0, altup_num_inputs=2, laurel_rank=4,
    pad_token_id=2, bos_token_id=1, eos_token_id=2, use_mamba_kernels=False, is_decoder=True,
)  # fmt: skip


MLA = {"num_key_value_heads": 4}  # as many key heads as query heads
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite glm_moe_dsa minicpm3 "
        "youtu".split(),
        MLA,
    ),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"n_groups": 1},
    "reformer": {"num_buckets": 4, "axial_pos_embds": False, "feed_forward_size": 64, "attention_head_size": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"layer_group_size": 2, **MLA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}  # fmt: skip


class TooLarge(Exception):
    """A model that a test would wait for."""


def tiny_config(family: str, vocabulary: int, **more: Any) -> Any:
    """Return a config of a family whose model has a few thousand weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {**SIZES, "vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    return _tiny(CONFIG_MAPPING[family], {**sizes, **MORE.get(family, {}), **more})


def _tiny(kind: Any, sizes: dict[str, Any]) -> Any:
    fields = {name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters}
    fields |= {"pad_token_id", "bos_token_id", "eos_token_id", *getattr(kind, "__annotations__", {})}
    chosen = {name: size for name, size in sizes.items() if name in fields or name in MORE.get(kind.model_type, {})}
    for name in ("text_config", "decoder"):
        inner = getattr(kind, "sub_configs", {}).get(name)
        if inner is not None and inner.__name__ != "AutoConfig":
            chosen[name] = _tiny(inner, sizes).to_dict()
    if "vision_config" in getattr(kind, "sub_configs", {}):
        chosen["vision_config"] = {
            k: sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        }
    return kind(**chosen)


def tiny_base(family: str, tokenizer: Any, **more: Any) -> Any:
    """Return a `Base` of a family with random weights, or raise whatever transformers raises for such a size.

    Raises:
        TooLarge: if the family's config does not shrink to fewer than 30 million weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from unlearn_peft.models.base import Base, freeze

    config = tiny_config(family, len(tokenizer), **more)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if weights > LARGEST:
        raise TooLarge(f"as small as its config becomes here, it has {weights / 1e6:.0f} million weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    freeze(model)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None], use_cache=False)
        model.generate(torch.arange(3, 15)[None], max_new_tokens=2, do_sample=False, pad_token_id=2)
    return Base(model, tokenizer, family)


def run(base: Any, kind: str, forget: list[Any], retain: list[Any], output: Any) -> tuple[str, str]:
    """Train, attach, generate, evaluate and detach; returns `ok`, `refused` or `fails`, and a note.

    All tokens are pushed: of some random models no word would be a fact, and there would be nothing to train.
    """
    import torch

    from unlearn_peft import attach, detach, unlearn
    from unlearn_peft.errors import UnlearnError
    from unlearn_peft.evaluate.evaluation import evaluate
    from unlearn_peft.inference.generate import answers

    ids = torch.tensor([base.tokenizer("Who wrote the blue book about stars?")["input_ids"]])

    def logits() -> Any:
        with torch.no_grad():
            return base.model(input_ids=ids, use_cache=False).logits

    before, forwards = logits(), patched(base.model)
    problem = note = ""
    try:
        unlearn(
            base, forget=forget, retain=retain, adapter=kind, steps=2, learning_rate=5e-3, eval_every=2, own_answers=0,
            objective={"forget_ceiling": 15, "forget_tokens": "all", "retain_budget": None}, anchor_batch=0,
            warmup_steps=0, forget_batch=3, retain_batch=4, save_dtype="float32", output=str(output), quiet=True,
        )  # fmt: skip
        attach(base, output)
        if torch.equal(logits(), before):
            problem = "attached, it changes nothing"
        answers(base, ["Who wrote the blue book?", "Name the author."], max_new_tokens=4)
        detach(base)
        result = evaluate(base, [output], {"forget": forget[:2], "retain": retain[:2]}, max_new_tokens=4)
        if result.left_behind:
            problem = f"left behind: {result.left_behind}"
    except UnlearnError as error:
        if not output.exists() and patched(base.model) == forwards and torch.equal(logits(), before):
            return "refused", str(error)
        problem = f"refused too late: {error}"
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "unlearn_peft/" in f.filename]
        last = frames[-1] if frames else None
        text = (str(error).strip().splitlines() or [""])[0][:150]
        problem = f"{type(error).__name__}: {text} at {last and last.filename.split('/')[-1]}:{last and last.lineno}"
    detach(base)
    if patched(base.model) != forwards:
        problem += "; a patched forward was left"
        for module in base.model.modules():
            module.__dict__.pop("forward", None)
    if not torch.equal(logits(), before):
        problem += "; the base's logits are not what they were"
    return ("fails", problem) if problem else ("ok", note)


def patched(model: Any) -> int:
    """Return how many modules have a forward pass or hooks that are not their class's."""
    return sum(("forward" in m.__dict__) + len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def names() -> list[str]:
    """Return all families of causal language models that transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tokenizer_of(folder: Any) -> Any:
    """Return the tokenizer of a tiny model that `make_tiny` wrote."""
    from unlearn_peft import load_base

    return load_base(str(folder)).tokenizer


def row_of(family: str, tokenizer: Any, folder: Any) -> tuple[str, str, str]:
    """Return a family's row of the table: what each kind of adapter does, and a note."""
    from conftest import FORGET, RETAIN

    try:
        base = tiny_base(family, tokenizer)
    except TooLarge as error:
        return "not run", "not run", str(error)
    except Exception as error:  # whatever a config or a model raises for such sizes
        return "not run", "not run", f"transformers does not build or run it at this size ({type(error).__name__})"
    found = {kind: run(base, kind, FORGET, RETAIN, folder / f"{family}-{kind}") for kind in ("lora", "head")}
    notes = dict.fromkeys(
        " ".join(note.replace("|", "/").replace(str(folder), "").split()) for _, note in found.values()
    )
    return found["lora"][0], found["head"][0], "; ".join(note for note in notes if note)
