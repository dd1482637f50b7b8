"""Artifacts that go straight from the machine that has trained a trial to the store of its run's artifacts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from caltech_sweep.files import SUMS, file_digest, read_sums
from caltech_sweep.stores import reason
from caltech_sweep.text import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Destination:
    """The run that artifacts go to; secrets that no address holds come from each machine's environment."""

    run_id: str
    server: str = field(repr=False)

    @property
    def _client(self) -> MlflowClient:
        from caltech_sweep.tracking.client import unchecked  # which no process needs that only trains

        return unchecked(self.server)

    def take(self, file: Path, path: str, digest: str) -> str:
        """Send a file and read it back; return what is wrong if the store does not have it with this SHA-256 then."""
        parent = PurePosixPath(path).parent.as_posix()
        try:
            self._client.log_artifact(self.run_id, str(file), None if parent == "." else parent)
            same = self._digest(path) == digest
        except Exception as error:  # each kind of artifact store raises errors of its own
            return one_line(f"{path} was not taken: {reason(error, self.server)}", 300)
        return "" if same else f"{path} was not kept as it was sent"

    def confirmed(self, files: Mapping[str, tuple[int, str]]) -> set[str]:
        """Return which of some files, known by their bytes and SHA-256, the store has.

        Their sizes are listed, and their SHA-256 are compared with the store's own SHA256SUMS, which is read; the files
        themselves are not. Raises what the artifact store raises.
        """
        folders = {PurePosixPath(path).parent.as_posix() for path in files}
        listed = {
            item.path: item.file_size
            for folder in sorted(folders)
            for item in self._client.list_artifacts(self.run_id, None if folder == "." else folder)
        }
        found = {path for path, (size, _) in files.items() if path in listed and listed[path] in (size, None)}
        if SUMS not in files:
            return found
        with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as place:
            copy = Path(self._client.download_artifacts(self.run_id, SUMS, place))
            if file_digest(copy) != files[SUMS][1]:
                return set()
            sums = read_sums(copy)
        return {path for path in found if path == SUMS or sums.get(path) == files[path][1]}

    def _digest(self, path: str) -> str:
        with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as place:
            return file_digest(Path(self._client.download_artifacts(self.run_id, path, place)))
