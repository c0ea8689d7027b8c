"""A custom objective: a function of tensors, named in a recipe or on the command line.

unlearn-peft train recipes/harry_potter.yaml --set objective=recipes/custom_objective.py:unlikelihood
"""

import torch

from unlearn_peft.training.objectives import Terms, Tokens, kl_divergence


def unlikelihood(forget: Tokens, retain: Tokens, settings) -> Terms:
    """-log(1 - p) on the forget set (Welleck et al. 2019, arXiv:1908.04319): bounded below, unlike plain ascent."""
    p = torch.exp(-forget.cross_entropy)
    return Terms(forget=-torch.log1p(-p.clamp(max=1 - 1e-4)), retain=kl_divergence(retain))
