"""Checks of `adapter_config.json` and `forget.json`: JSON objects come in, lists of problems go out.

A setting passes only if this package computes it as PEFT does. Which modules are adapted, the tensors' names decide:
patterns are not run here, and pass. A class that other programs would import from the same folder is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AdapterError, safe_repr
from ..files.weights import LARGEST
from .quantized import QUANTIZED

LORA, DENSE = "LORA", "DENSE_HEAD"
KINDS = (LORA, DENSE, LORA + QUANTIZED, DENSE + QUANTIZED)
SCHEMA_VERSION = 1  # of forget.json: raised when older readers would misread it. Earlier versions are still read
_MAX_RANK = 1 << 20
_UNSUPPORTED = {  # with the default, the only accepted value: others change the adapter in ways that only PEFT knows
    "use_dora": False, "bias": "none", "lora_bias": False,
    "trainable_token_indices": None, "alora_invocation_tokens": None, "layer_replication": None,
    "target_parameters": None, "use_qalora": False, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    "monteclora_config": None, "megatron_config": None, "ensure_weight_tying": False,
}  # fmt: skip
_IGNORED = {  # used in training only, or checked below
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
    "fan_in_fan_out", "modules_to_save",
}  # fmt: skip
_MANIFEST_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("base", "files", "metrics", "recipe", "history", "versions", "data_digests"), dict),
    **dict.fromkeys(("base.fingerprint", "data_digests.hmac_sha256"), dict),
    **dict.fromkeys(("stack_of", "history.steps", "history.evaluations"), list),
}
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights, too
_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_PART = r"(?:[A-Za-z0-9_]|\\?-)+"
_NAME = re.compile(rf"\^?{_PART}(\\?\.{_PART})*\$?")  # ^: in PEFT, the whole name must match; \: as re.escape writes it


def check_strengths(strengths: float | Sequence[float], count: int) -> list[float]:
    """Return one strength for each of `count` adapters, from one for all or one each.

    Raises:
        AdapterError: there are too few or too many, or one is not finite.
    """
    each = list(strengths) if isinstance(strengths, Sequence) else [strengths] * count
    if len(each) != count:
        number = f"{len(each)} strength" + "s" * (len(each) != 1)
        raise AdapterError(f"{number} for {count} adapter{'s' * (count != 1)}: expected one each, in the same order")
    if wild := [strength for strength in each if not math.isfinite(strength)]:
        raise AdapterError(f"a strength is {wild[0]}: expected a finite number, 1 is as trained")
    return [float(strength) for strength in each]


def check_config(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an `adapter_config.json`."""
    kind = config.get("peft_type")
    if kind not in KINDS:
        return [f"peft_type is {safe_repr(kind)}, expected {LORA} or {DENSE}"]
    problems = []
    for field, default in _UNSUPPORTED.items():
        value = config.get(field, default)
        if not (value is None or value == [] or value == {} or (value == default and type(value) is type(default))):
            problems.append(f"'{field}' is {safe_repr(value)}, expected {default!r}: use it through PEFT alone")
    for field in config.keys() - _UNSUPPORTED.keys() - _IGNORED:
        if value := config[field]:
            problems.append(f"{safe_repr(field)} is unknown and may change the adapter's effect: {safe_repr(value)}")
    for field in ("base_model_name_or_path", "revision"):
        if not _is_text(config.get(field)):
            problems.append(f"'{field}' is {safe_repr(config[field])}, expected a name")
    if config.get("task_type") not in _TASKS:
        problems.append(f"'task_type' is {safe_repr(config['task_type'])}, expected CAUSAL_LM")
    problems += _check_code(config)
    for field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        problems += _check_names(field, config.get(field))
    layers = config.get("layers_to_transform")
    if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers])):
        problems.append(f"'layers_to_transform' is {safe_repr(layers)}, expected whole numbers")
    return problems + (_check_lora(config) if kind.startswith(LORA) else [])


def check_manifest(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a `forget.json`."""
    version = manifest.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        return [f"forget.json has schema version {safe_repr(version)}, expected {SCHEMA_VERSION}: update unlearn_peft"]
    problems = []
    for place, kind in _MANIFEST_FIELDS.items():
        table, _, key = place.rpartition(".")
        value = _inner(manifest.get(table, {}) if table else manifest, key, kind())
        if not isinstance(value, kind):
            expected = "a list" if kind is list else "a table"
            problems.append(f"forget.json: '{place}' is {safe_repr(value)}, expected {expected}")
        elif place in ("files", "base.fingerprint") and not all(map(_is_digest, value.values())):
            problems.append(f"forget.json: '{place}' holds something else than digests")
    base = manifest.get("base", {})
    if not _is_text(_inner(base, "name", None)):
        problems.append(f"forget.json: 'base.name' is {safe_repr(base['name'])}, expected a name")
    return problems


def of_module(pattern: Any, module: str, default: Any) -> Any:
    """Return a module's value in PEFT's `rank_pattern` or `alpha_pattern`; None if a regular expression may give it."""
    for key, value in (pattern or {}).items():
        if not is_name(key):
            return None
        name = key.replace("\\", "").removesuffix("$")
        if module == name.removeprefix("^") or module.endswith("." + name):
            return value
    return default


def _check_lora(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for field, pattern_field, check, expected in (
        ("r", "rank_pattern", _is_rank, "a whole number of at least 1"),
        ("lora_alpha", "alpha_pattern", _is_alpha, "a number"),
    ):
        what = "rank r" if field == "r" else field
        value = config.get(field, 8)
        if not check(value):
            problems.append(f"{what} is {safe_repr(value) if isinstance(value, str) else value}, expected {expected}")
        pattern = config.get(pattern_field)
        if pattern is not None and not isinstance(pattern, dict):
            problems.append(f"'{pattern_field}' is {safe_repr(pattern)}, expected a table of names")
            continue
        for name, value in (pattern or {}).items():
            if field == "lora_alpha" and not is_name(name):  # ranks are the tensors' own
                problems.append(f"'{pattern_field}' has the key {safe_repr(name)}, expected a module's name")
            if not check(value):
                problems.append(f"'{pattern_field}' gives {safe_repr(name)} {safe_repr(value)}, expected {expected}")
    for field in ("use_rslora", "fan_in_fan_out"):  # the latter says how GPT-2's layers store their own weight
        if not isinstance(config.get(field, False), (bool, type(None))):
            problems.append(f"'{field}' is {safe_repr(config[field])}, expected true or false")
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITIALIZATIONS):
        problems.append(f"'init_lora_weights' is {safe_repr(init)}, which changes the base: use it through PEFT alone")
    return problems


def _check_code(config: Mapping[str, Any]) -> list[str]:
    """Return which fields would make PEFT import code: a class that is not of transformers, another Megatron."""
    problems, mapping = [], config.get("auto_mapping")
    library, name = _inner(mapping, "parent_library", None), _inner(mapping, "base_model_class", None)
    named = isinstance(library, str) and isinstance(name, str)
    of_transformers = named and re.fullmatch(r"transformers(\.[A-Za-z0-9_]+)*", library) and name.isidentifier()
    empty = isinstance(mapping, dict) and library is None and name is None
    if mapping is not None and not of_transformers and not empty:
        problems.append(f"'auto_mapping' is {safe_repr(mapping)}, expected one of transformers: it would be imported")
    if config.get("megatron_core", "megatron.core") not in ("megatron.core", None):
        problems.append(f"'megatron_core' is {safe_repr(config['megatron_core'])}: it would be imported")
    return problems


def _check_names(field: str, value: Any) -> list[str]:
    """Check names, or a regular expression. Both may be anything: this package uses neither."""
    texts = value if isinstance(value, list) else [value]
    fits = value is None or all(isinstance(text, str) for text in texts)
    return [] if fits else [f"'{field}' is {safe_repr(value)}, expected names of modules"]


def is_name(text: str) -> bool:
    """Return whether a key of a pattern is a module's name, and no other regular expression."""
    return len(text) <= 500 and _NAME.fullmatch(text) is not None


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST * _MAX_RANK and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 4096 and value.isprintable())


def _is_digest(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _inner(table: Any, key: str, default: Any) -> Any:
    return table.get(key, default) if isinstance(table, dict) else default
