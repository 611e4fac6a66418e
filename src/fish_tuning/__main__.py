"""`python -m fish_tuning`, for when the command is not on the path."""

from fish_tuning.cli import main

main(prog_name="fish-tuning")
