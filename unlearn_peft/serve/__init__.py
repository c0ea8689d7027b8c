"""Serving: an OpenAI-compatible server that applies each tenant's adapters on one base."""
