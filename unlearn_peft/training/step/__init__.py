"""One optimiser step: reference activations, forward passes, microbatches, gradients."""
