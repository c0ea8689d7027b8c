"""What a model still knows, what forgetting cost it, and what it writes now: every figure with n and an interval.

`suite.measure` runs the quick suite on a live base, `full.measure` what the full one has beside it, and `ability` tasks
of lm-evaluation-harness; the other files hold the metrics that they are made of, as pure functions of per-row numbers,
and those that need more than a base (a retrained model, non-members).
"""
