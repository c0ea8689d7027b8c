"""Metrics: answers or per-token numbers of rows -> one number a row."""
