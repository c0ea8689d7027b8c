"""Policies: which adapters each tenant must have forgotten, in YAML or a database."""
