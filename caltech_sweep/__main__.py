"""``python -m caltech_sweep``."""

from caltech_sweep.cli import main

main(prog_name="caltech-sweep")
