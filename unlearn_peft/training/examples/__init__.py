"""What is trained on: forget rows, self-generated answers, retain rows, refusals."""
