"""`python -m unlearn_peft.cli`, as accelerate and torch.distributed start it."""

from .main import main

main()
