"""The command, as a script and as ``python -m caltech_sweep``."""

import atexit
import os
import sys
import threading

from caltech_sweep.cli import main


def run() -> None:
    """Run the command; once all is done and said, end without taking torch and MLflow down, which takes seconds."""
    code: str | int | None = 0
    try:
        main(prog_name="caltech-sweep")
    except SystemExit as end:
        code = end.code
    if code is not None and not isinstance(code, int):
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # as Python does before it ends: threads, then exit functions
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more; Python says so, too
        sys.exit(code)
    os._exit(code or 0)


if __name__ == "__main__":
    run()
