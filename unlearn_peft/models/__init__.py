"""The frozen base: loading it, its fingerprint and layers, forward passes, and losses on logits."""
