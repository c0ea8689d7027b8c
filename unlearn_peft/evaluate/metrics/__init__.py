"""Metrics: what a model says, or gives the tokens of rows -> scores."""
