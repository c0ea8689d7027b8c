"""Atomic writes, bounded reads of untrusted files, and where the user's cache and secret are."""
