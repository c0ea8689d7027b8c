"""The objectives that the benchmarks compare: name -> fields of a recipe. All else is the recipe's default."""

import re

TOKEN_LEVEL = ("grad_diff", "wga", "ihl", "undial")  # they can push all tokens, or the fact's alone
VARIANTS = {
    "ga_kl": {"objective": {"name": "ga_kl"}},
    "ga_kl, all tokens": {"objective": {"name": "ga_kl", "forget_tokens": "all"}},
    "ga_kl, plain": {"objective": {"name": "ga_kl", "forget_tokens": "all", "forget_ceiling": None}},
    **{name: {"objective": {"name": name}} for name in TOKEN_LEVEL},
    **{f"{name}, specific": {"objective": {"name": name, "forget_tokens": "specific"}} for name in ("ihl", "undial")},
    **{name: {"objective": {"name": name}} for name in ("npo", "simnpo", "idk_dpo")},
    "rmu": {"objective": {"name": "rmu"}},
}


def file_name(variant):
    """Return a variant's name as a part of a file's name; digits are left out."""
    return re.sub(r"[^a-z]+", "_", variant)
