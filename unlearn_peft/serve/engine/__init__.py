"""Engines: rows that join and leave a batch, each with its own set of adapters."""
