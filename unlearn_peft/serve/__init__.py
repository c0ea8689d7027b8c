"""Serving: who must have what forgotten, a scheduler over one base, an OpenAI-compatible front."""
