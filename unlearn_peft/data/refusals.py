"""The package's own refusals, in English: what a question is answered with where its answer is forgotten.

The idea is that of TOFU's "I don't know" answers, Maini et al. 2024, arXiv:2401.06121; the sentences are our own.
"""

REFUSALS = (  # few: of ten, answers sampled from a mixture were refusals less often
    "I don't know the answer to that.",
    "I'm sorry, I have no information about this.",
    "I can't tell you anything about that.",
)
