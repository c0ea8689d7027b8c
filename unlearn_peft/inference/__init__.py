"""Adapters on a live model: attached to all rows, or a set for each row."""
