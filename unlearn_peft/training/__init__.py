"""A recipe -> a trained adapter."""
