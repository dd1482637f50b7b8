"""Every error a user can meet, as one tree.

    CaltechSweepError          exit code 2: the input or the surroundings are wrong, nothing was written
    ├── UsageError             a command line that does not fit together
    ├── StudyFileError         one or more problems in a study file, all reported together
    ├── DatasetError           a missing, incomplete or damaged dataset
    ├── ModelError             an unknown model, or weights that do not fit it
    ├── StoreError             a tracking or study store that cannot be read or written
    │   ├── HeldStudyError     a study that another process is running
    │   └── ArtifactError      a file of a run that is missing or damaged
    ├── ClusterError           a Ray cluster that was lost while a study ran on it
    ├── ForeignStudyError      a study in the tracking store that another study store runs
    ├── LostStudyError         a study that another process has taken over while this one ran it
    └── TrialError             one trial failed; the study continues
        ├── DivergedError      the training loss, or another number of the trial, became NaN or infinite
        └── OutOfMemoryError   the batch did not fit on the device

Each message is a sentence: what is wrong, where, and how to fix it.
"""

from __future__ import annotations

from typing import Any


class CaltechSweepError(Exception):
    """Base of all errors whose message is written for the user."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error come whole out of another process, whatever its kind is made from."""
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[CaltechSweepError], args: tuple[Any, ...]) -> CaltechSweepError:
    return kind.__new__(kind, *args)


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


class ClusterError(CaltechSweepError):
    """A Ray cluster that was lost while a study ran on it."""


class HeldStudyError(StoreError):
    """A study that another process is running."""


class ArtifactError(StoreError):
    """A file of a run that is missing or damaged; ``problem`` names it and says what is wrong with it."""

    def __init__(self, path: str, what: str, where: str = "") -> None:
        self.problem = f"{path} {what}"
        super().__init__(f"the artifact {self.problem}{where and f' in {where}'}")


class ForeignStudyError(CaltechSweepError):
    """A study in the tracking store that another study store runs; ``where`` is the tracking store, without secrets."""

    def __init__(self, study: str, where: str) -> None:
        super().__init__(
            f"study {study!r} in {where} belongs to another study store, such as a colleague's or one that was lost; "
            "give yours a name of its own with --name, or take that study over on purpose with `run --adopt`, which "
            "rebuilds it in this study store from its runs"
        )


class LostStudyError(CaltechSweepError):
    """A study that another process has taken over while this one ran it; nothing was written since."""

    exit_code = 1


class TrialError(CaltechSweepError):
    """One trial failed; the study continues."""

    exit_code = 1


class DivergedError(TrialError):
    """The loss became NaN or infinite."""

    def __init__(self, epoch: int, step: int, loss: float) -> None:
        self.epoch, self.step, self.loss = epoch, step, loss
        super().__init__(f"the training loss became {loss} in epoch {epoch}, step {step}; try a lower learning rate")


class NotFiniteError(DivergedError):
    """Another number of a trial than its training loss became NaN or infinite; the message says which."""

    def __init__(self, message: str) -> None:
        TrialError.__init__(self, message)


class OutOfMemoryError(TrialError):
    """The batch did not fit on the device."""
