"""``python -m patune`` is ``patune``."""

from patune.cli import main

main(prog_name="patune")
