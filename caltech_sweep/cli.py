"""Commands: each parses its arguments and calls a plain function; heavy imports stay inside them."""

from __future__ import annotations

import click

from caltech_sweep import __version__


@click.group()
@click.version_option(__version__, prog_name="caltech-sweep")
def main() -> None:
    """Sweep, track and report image-classifier trainings."""
