"""Attacks on forgetting: each says what it costs and what share of the probes' answers it brings back.

An attack is a function from a `Target` (and its own settings) to `Attacked`; a new one is a function and a line in
`ATTACKS`. Beside each share stands that of the bare base under the same attack: where the base itself does not give
the answer, the attack shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from ...attaching import attached
from ...errors import AdapterError, UnlearnError, did_you_mean
from .asking import few_shot, jailbreak, multilingual, paraphrase, prefix, sampling
from .reading import adapter_diff, logit_lens
from .relearning import relearn
from .target import Attack, Attacked, Target
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


def check_names(names: str | Sequence[str]) -> list[str]:
    """Return the attacks that these names mean; `all` means all.

    Raises:
        UnlearnError: if a name is unknown.
    """
    chosen = list(ATTACKS) if names == "all" else [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in ATTACKS]
    if unknown:
        told = ", ".join(f"'{name}'{did_you_mean(name, ATTACKS)}" for name in unknown)
        raise UnlearnError(f"unknown attacks: {told}; known: {', '.join(ATTACKS)}")
    return chosen


def run_attacks(
    target: Target, names: Literal["all"] | Sequence[str] = "all", *, quiet: bool = False
) -> list[Attacked]:
    """Run attacks one after another, each with its default budget; the base is afterwards as it was before.

    Args:
        target: what is attacked.
        names: keys of `ATTACKS`, or `all`.
        quiet: no progress bar.

    Raises:
        UnlearnError: if a name is unknown; then nothing is run.
        AdapterError: if something is attached to the base.
    """
    from tqdm import tqdm

    chosen = check_names(names)
    if attached(target.base):
        raise AdapterError("adapters are attached already: detach them, an attack puts its own on and off")
    found = []
    with tqdm(chosen, unit="attack", desc="attacking", disable=quiet) as progress:
        for name in progress:
            progress.set_postfix_str(name)
            found.append(ATTACKS[name](target))
    return found


__all__ = ["ATTACKS", "Attack", "Attacked", "Target", "check_names", "run_attacks"]
