"""One optimiser step: which rows, what the frozen base gives for them, and the losses' gradients."""
