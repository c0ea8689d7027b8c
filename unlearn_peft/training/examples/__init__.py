"""What is trained on: forget rows, the base's own answers, retain rows, refusals."""
