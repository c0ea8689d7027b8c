"""Rows -> tokens."""
