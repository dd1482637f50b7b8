"""caltech-sweep, but nothing is written while a training goes on: for the column of ``sweep.py`` that shows its worth.

    python benchmarks/foreground.py run ...

A state is on disk before the next epoch begins, and the next trial begins when the artifacts of the one before are.
Workers import this file as ``__mp_main__``, as ``multiprocessing`` has it.
"""

from caltech_sweep.cli import main
from caltech_sweep.sweep.executors.processes import ProcessExecutor

if __name__ == "__mp_main__":
    from caltech_sweep.training.checkpoints import TrialCheckpoints

    save = TrialCheckpoints._save

    def save_and_wait(self: TrialCheckpoints, epoch: int) -> None:
        """Save a state, and wait until it is written."""
        save(self, epoch)
        self.settle()

    TrialCheckpoints._save = save_and_wait  # type: ignore[method-assign]

if __name__ == "__main__":
    ProcessExecutor.free_soon = lambda self: 0  # type: ignore[method-assign]
    main(prog_name="caltech-sweep")
