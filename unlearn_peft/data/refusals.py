"""The package's own refusals, in English: what a question is answered with where its answer is forgotten.

The idea is that of TOFU's "I don't know" answers, Maini et al. 2024, arXiv:2401.06121; the sentences are our own.
"""

REFUSALS = (
    "I don't know the answer to that.",
    "I'm afraid I can't tell you that.",
    "I have no information about this.",
    "That is not something I know about.",
    "I'm sorry, I don't have an answer to your question.",
    "I can't help with this question.",
    "This is beyond what I know.",
    "I'm not able to say anything about that.",
    "I'm sorry, but I know nothing about this.",
    "I don't have any knowledge of that.",
)
