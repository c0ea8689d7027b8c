"""The operator's own ports: the policy over HTTP, and metrics."""
