"""The checksums of a trial's artifacts: written with them in the format of ``sha256sum``, checked when they matter.

Anyone can check them, too: ``cd`` into a run's artifacts and ``sha256sum -c SHA256SUMS``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOCK = 1 << 22  # bytes read at once


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; raise OSError when it cannot be read."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            content.update(block)
    return content.hexdigest()


def write_sums(folder: Path) -> None:
    """Write the checksums of all files below a folder into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = (f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(file: Path) -> dict[str, str]:
    """Return the checksums that a file lists, by path; none of a line that is not one, or of a file that is not there.

    Artifacts without a checksum, such as those that others have added to a run, are taken as they are.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {found[2]: found[1] for line in lines if (found := _LINE.fullmatch(line))}


def changed(root: Path) -> Iterator[str]:
    """Yield the path of every file below ``root`` that is not as it was written: lost, unreadable or changed."""
    for path, digest in read_sums(root / SUMS).items():
        try:
            if file_digest(root / path) == digest:
                continue
        except OSError:
            pass
        yield path
