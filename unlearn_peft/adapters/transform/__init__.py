"""Adapters -> other adapters, or a merged model."""
