"""Attacks on forgetting: each says what it costs and what share of the probes' answers it brings back.

An attack is a function from a `Target` (and its own settings) to `Attacked`; a new one is a function and a line in
`ATTACKS`, or is named by the path to its function. Beside each share stands that of the bare base under the same
attack: where the base itself does not give the answer, the attack shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ...errors import AdapterError, UnlearnError, did_you_mean
from ...inference.attach import attached
from ...recipe.plugins import load_function
from .harness import Attack, Attacked, Target
from .probing import adapter_diff, logit_lens
from .prompting import few_shot, jailbreak, multilingual, paraphrase, prefix, sampling
from .relearning import relearn
from .weights import interference, quantise, scaling

ATTACKS: dict[str, Attack] = {
    "paraphrase": paraphrase,
    "prefix": prefix,
    "few_shot": few_shot,
    "multilingual": multilingual,
    "jailbreak": jailbreak,
    "sampling": sampling,
    "scaling": scaling,
    "quantise_8_bits": partial(quantise, bits=8, name="quantise_8_bits"),
    "quantise_4_bits": partial(quantise, bits=4, name="quantise_4_bits"),
    "interference": interference,
    "logit_lens": logit_lens,
    "adapter_diff": adapter_diff,
    "relearn_adapter": partial(relearn, through="adapter", name="relearn_adapter"),
    "relearn_lora": partial(relearn, through="lora", name="relearn_lora"),
}


def find_attacks(names: str | Sequence[str]) -> dict[str, Attack]:
    """Return the attacks that these names mean; `all` means all of the package's own.

    Raises:
        UnlearnError: if a name is unknown, or a path leads to no function.
    """
    given = [names] if isinstance(names, str) else list(names)
    chosen = list(dict.fromkeys(one for name in given for one in (ATTACKS if name == "all" else [name])))
    unknown = [name for name in chosen if name not in ATTACKS and ":" not in name]
    if unknown:
        told = ", ".join(f"'{name}'{did_you_mean(name, ATTACKS)}" for name in unknown)
        raise UnlearnError(
            f"unknown attacks: {told}; known: {', '.join(ATTACKS)}, or your own as 'module:function' or "
            "'file.py:function'"
        )
    return {name: ATTACKS[name] if name in ATTACKS else load_function(name, "attack") for name in chosen}


def run_attacks(target: Target, names: str | Sequence[str] = "all", *, quiet: bool = False) -> list[Attacked]:
    """Run attacks one after another, each with its default budget; the base is afterwards as it was before.

    Args:
        target: what is attacked.
        names: keys of `ATTACKS`, `all`, or paths to functions of your own.
        quiet: no progress bar.

    Raises:
        UnlearnError: if a name is unknown, then nothing is run; or if an attack of your own returns something else.
        AdapterError: if something is attached to the base, before the first attack or after one of your own.
    """
    from tqdm import tqdm

    chosen = find_attacks(names)
    if attached(target.base):
        raise AdapterError("adapters are attached already: detach them, an attack puts its own on and off")
    found = []
    with tqdm(chosen.items(), unit="attack", desc="attacking", disable=quiet) as progress:
        for name, attack in progress:
            progress.set_postfix_str(name)
            result = attack(target)
            if name not in ATTACKS and not isinstance(result, Attacked):
                raise UnlearnError(f"the attack '{name}' returned {type(result).__name__}, expected an Attacked")
            if held := attached(target.base):
                raise AdapterError(
                    f"the attack '{name}' left attached: {', '.join(held)}. Use `adapters_on` and `adapters_off`"
                )
            found.append(result)
    return found


__all__ = ["ATTACKS", "Attack", "Attacked", "Target", "find_attacks", "run_attacks"]
