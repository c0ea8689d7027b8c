"""The command line: one file for each group of commands."""

from .main import app, main

__all__ = ["app", "main"]
