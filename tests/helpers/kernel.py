"""Machines that lack something: a process whose kernel refuses some of its calls, and file systems that are mounted."""

from __future__ import annotations

import errno
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CALLS = {"link": 86, "linkat": 265, "flock": 73, "mmap": 9}  # of Linux on x86-64

# A seccomp filter: prctl(PR_SET_NO_NEW_PRIVS), then prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program). A call of
# mmap is refused only where it shares a file: what SQLite's write-ahead log needs.
REFUSE = """
import ctypes, struct
def refuse(answers):
    rules = [(0x20, 0, 0, 0)]  # load the number of the call
    for call, answer in answers.items():
        if call == 9:
            rules += [(0x15, 0, 4, 9), (0x20, 0, 0, 40), (0x54, 0, 0, 0x23), (0x15, 0, 1, 1)]
            rules += [(0x06, 0, 0, 0x50000 | answer), (0x20, 0, 0, 0)]
        else:
            rules += [(0x15, 0, 1, call), (0x06, 0, 0, 0x50000 | answer)]
    rules.append((0x06, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
    library = ctypes.CDLL(None, use_errno=True)
    assert library.prctl(38, 1, 0, 0, 0) == 0
    assert library.prctl(22, 2, ctypes.byref(header), 0, 0) == 0, ctypes.get_errno()
"""


def run_without(code: str, folder: Path, **answers: str) -> str:
    """Run code in a new process whose system calls of some names fail, each with the error of a name; its output."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("calls are refused on Linux on x86-64 only")
    refused = {CALLS[call]: getattr(errno, name) for call, name in answers.items()}
    result = subprocess.run(
        [sys.executable, "-c", f"{REFUSE}\nrefuse({refused})\n{code}"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@contextmanager
def mounted_without_shared_memory(folder: Path) -> Iterator[Path]:
    """Yield a folder on a real FUSE file system that maps no file into memory; skips where none can be mounted."""
    if not shutil.which("bindfs"):
        pytest.skip("needs bindfs")
    below, mount = folder / "below", folder / "mount"
    below.mkdir()
    mount.mkdir()
    if subprocess.run(["bindfs", "-o", "direct_io", str(below), str(mount)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
