"""Attacks on forgetting: each says what it costs, and what share of the probes' answers it brings back.

An attack is a function from a `Target` (and its own settings) to `Attacked`; a new one is a line in `ATTACKS`, or is
named by the path to its function.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ...errors import AdapterError, UnlearnError, did_you_mean
from ...inference.attach import attached
from ...recipe.plugins import load_function
from .harness import Attack, Attacked, Target
from .passages import passage
from .probing import adapter_diff, logit_lens
from .prompting import few_shot, framing, jailbreak, multilingual, paraphrase, prefix, sampling
from .relearning import relearn
from .weights import interference, quantise, scaling

ATTACKS: dict[str, Attack] = {
    "framing": framing,
    "paraphrase": paraphrase,
    "prefix": prefix,
    "few_shot": few_shot,
    "multilingual": multilingual,
    "jailbreak": jailbreak,
    "sampling": sampling,
    "passage": passage,
    "scaling": scaling,
    "quantise_8_bits": partial(quantise, bits=8, name="quantise_8_bits"),
    "quantise_4_bits": partial(quantise, bits=4, name="quantise_4_bits"),
    "interference": interference,
    "logit_lens": logit_lens,
    "adapter_diff": adapter_diff,
    "relearn_adapter": partial(relearn, through="adapter", name="relearn_adapter"),
    "relearn_lora": partial(relearn, through="lora", name="relearn_lora"),
    "relearn_benign": partial(relearn, through="lora", benign=True, name="relearn_benign"),
}


def find_attacks(names: str | Sequence[str]) -> dict[str, Attack]:
    """Return the attacks of these names: keys of `ATTACKS`, `all` of them, or paths to functions of your own.

    Raises:
        UnlearnError: if a name is unknown, or a path leads to no function.
    """
    names = [names] if isinstance(names, str) else names
    chosen = list(dict.fromkeys(key for name in names for key in (ATTACKS if name == "all" else [name])))
    if unknown := [name for name in chosen if name not in ATTACKS and ":" not in name]:
        listed = ", ".join(f"'{name}'{did_you_mean(name, ATTACKS)}" for name in unknown)
        raise UnlearnError(
            f"unknown attacks: {listed}; known: {', '.join(ATTACKS)}, or your own as 'module:function' or "
            "'file.py:function'"
        )
    return {name: ATTACKS[name] if name in ATTACKS else load_function(name, "attack") for name in chosen}


def run_attacks(target: Target, names: str | Sequence[str] = "all", *, quiet: bool = False) -> list[Attacked]:
    """Run attacks one after another, each with its default settings; `names` as `find_attacks` takes them.

    Raises:
        UnlearnError: if a name is unknown, then nothing is run; or if an attack of your own returns no `Attacked`.
        AdapterError: if something is attached to the base, before the first attack or after one of your own.
    """
    from tqdm import tqdm

    chosen = find_attacks(names)
    if attached(target.base):
        raise AdapterError("adapters are attached already: detach them, an attack puts its own on and off")
    results = []
    with tqdm(chosen.items(), unit="attack", desc="attacking", disable=quiet) as progress:
        for name, attack in progress:
            progress.set_postfix_str(name)
            result = attack(target)
            if name not in ATTACKS and not isinstance(result, Attacked):
                raise UnlearnError(f"the attack '{name}' returned {type(result).__name__}, expected an Attacked")
            if left_on := attached(target.base):
                raise AdapterError(
                    f"the attack '{name}' left attached: {', '.join(left_on)}. Use `adapters_on` and `adapters_off`"
                )
            results.append(result)
    return results


__all__ = ["ATTACKS", "Attack", "Attacked", "Target", "find_attacks", "run_attacks"]
