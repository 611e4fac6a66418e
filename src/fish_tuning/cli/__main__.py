"""`python -m fish_tuning.cli`, for when the command is not on the path."""

from fish_tuning.cli import main

main(prog_name="fish-tuning")
