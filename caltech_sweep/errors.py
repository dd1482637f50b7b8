"""Every error a user can meet, as one tree.

    CaltechSweepError          exit code 2: the input or the surroundings are wrong, nothing was written
    ├── UsageError             a command line that does not fit together
    ├── StudyFileError         one or more problems in a study file, all reported together
    ├── DatasetError           a missing, incomplete or damaged dataset
    ├── ModelError             an unknown model, or weights that do not fit it
    ├── StoreError             a tracking or study store that cannot be read or written
    └── TrialError             one trial failed; the study goes on
        ├── DivergedError      the loss became NaN or infinite
        └── OutOfMemoryError   the batch did not fit on the device

Each message is a sentence: what is wrong, where, and the mend.
"""


class CaltechSweepError(Exception):
    """Base of all errors whose message is written for the user."""

    exit_code = 2


class UsageError(CaltechSweepError):
    """A command line that does not fit together."""


class StudyFileError(CaltechSweepError):
    """Problems in one study file; ``problems`` holds one sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DatasetError(CaltechSweepError):
    """A missing, incomplete or damaged dataset."""


class ModelError(CaltechSweepError):
    """An unknown model, or weights that do not fit it."""


class StoreError(CaltechSweepError):
    """A tracking or study store that cannot be read or written."""


class TrialError(CaltechSweepError):
    """One trial failed; the study goes on."""

    exit_code = 1


class DivergedError(TrialError):
    """The loss became NaN or infinite."""

    def __init__(self, epoch: int, step: int, loss: float) -> None:
        self.epoch, self.step, self.loss = epoch, step, loss
        super().__init__(f"the training loss became {loss} in epoch {epoch}, step {step}; try a lower learning rate")


class OutOfMemoryError(TrialError):
    """The batch did not fit on the device."""
