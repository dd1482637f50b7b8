"""Archives unpacked safely: every member is checked before anything is written."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import cast

from caltech_sweep import paths, stores
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import BLOCK, writing
from caltech_sweep.text import quoted

ARCHIVES = tuple(paths.CALTECH_FOLDER + suffix for suffix in (".tar.gz", ".tgz", ".tar"))  # by preference
MAX_UNPACKED = 512 << 20  # bytes; Caltech-101 has 1.4e8 with the tar's own headers
MAX_HEADER = 1 << 19  # bytes before a member, such as its name and times, and what is read ahead of them
MAX_MEMBERS = 30_000  # Caltech-101 has 9,248, and one more for each of them when macOS packed it


class _Limited(io.BufferedIOBase):
    """A stream that refuses to give more than MAX_UNPACKED bytes, whatever an archive's headers claim."""

    def __init__(self, stream: io.BufferedIOBase, archive: Path) -> None:
        self._stream, self._archive, self._left = stream, archive, MAX_UNPACKED
        self._until_header_ends = MAX_UNPACKED

    def expect(self, size: int) -> None:
        """Allow ``size`` bytes of a member and the header of the next one, until this is called again."""
        self._until_header_ends = size + MAX_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        block = self._stream.read(size)
        self._left -= len(block)
        self._until_header_ends -= len(block)
        if self._left < 0:
            raise _too_large(self._archive)
        if self._until_header_ends < 0:
            raise DatasetError(
                f"{self._archive}: the header of a member takes more than {MAX_HEADER >> 10} KB; nothing was unpacked, "
                "do not trust this file"
            )
        return block


def _too_large(archive: Path) -> DatasetError:
    return DatasetError(
        f"{archive} unpacks to more than {MAX_UNPACKED >> 20} MB or {MAX_MEMBERS:,} files, which Caltech-101 does not; "
        "get the public archive with `caltech-sweep data`"
    )


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Turn what the standard readers raise on damaged bytes, which is of many kinds, into one sentence."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"{archive} cannot be unpacked ({stores.reason(error)}): it is damaged, incomplete or no such archive; get "
            "it again, or download it with `caltech-sweep data`"
        ) from error


def _inner_tar(zipped: zipfile.ZipFile, archive: Path) -> zipfile.ZipInfo:
    for info in zipped.infolist():
        usual = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if PurePosixPath(info.filename).name in ARCHIVES and usual:
            return info
    raise DatasetError(
        f"{archive} holds no {ARCHIVES[0]} that can be read, so it is not the official zip; if it holds the dataset, "
        "unzip it and give the folder with --from"
    )


@contextlib.contextmanager
def _open_tar(archive: Path) -> Iterator[tuple[tarfile.TarFile, _Limited]]:
    """Stream the members of a tar or tar.gz, or of the one in a zip; at the end, check the archive's own checksums."""
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(archive.open("rb"))
        except OSError as error:
            raise DatasetError(f"{archive} cannot be read ({error.strerror}); check its permissions") from error
        if stream.peek(4)[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            zipped = stack.enter_context(zipfile.ZipFile(stream))
            stream = cast(io.BufferedReader, stack.enter_context(zipped.open(_inner_tar(zipped, archive))))
        limited = _Limited(stream, archive)
        if stream.peek(2)[:2] == b"\x1f\x8b":
            # gzip's own reader, because tarfile's never compares the checksum at the end
            limited = _Limited(stack.enter_context(gzip.GzipFile(fileobj=limited)), archive)
        # "|" never seeks, so that forged sizes cannot send the reader in circles
        limited.expect(0)
        with tarfile.open(fileobj=limited, mode="r|", bufsize=BLOCK) as tar:
            # a second pair of eyes; Python 3.11.0 to 3.11.3 have none, where only the checks below are made
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            yield tar, limited
        limited.expect(MAX_UNPACKED)
        while limited.read(BLOCK):
            pass


def climbs(name: str) -> bool:
    path = PureWindowsPath(name)  # splits at / and at \
    return bool(path.anchor) or ".." in path.parts or "\0" in name


def _members(opened: tuple[tarfile.TarFile, _Limited], archive: Path) -> Iterator[tarfile.TarInfo]:
    """Yield folders, files and hard links to earlier files; raise DatasetError that names any other member.

    Symbolic links are refused wherever they point: no chain of them can then lead out of the folder.
    """
    tar, limited = opened
    files: set[PurePosixPath] = set()
    size = 0
    for count, member in enumerate(tar, start=1):
        size += max(member.size, 0)
        limited.expect(max(member.size, 0))
        if count > MAX_MEMBERS or size > MAX_UNPACKED:
            raise _too_large(archive)
        if climbs(member.name):
            wrong = "has a name that leads out of its folder"
        elif member.issym():
            wrong = f"is a symbolic link (to {quoted(member.linkname)}), of which Caltech-101 has none"
        elif member.islnk() and (climbs(member.linkname) or PurePosixPath(member.linkname) not in files):
            wrong = f"is a link to {quoted(member.linkname)}, which is no earlier file of the archive"
        elif not (member.isdir() or member.isreg() or member.islnk()):
            wrong = "is a device or another special file"
        else:
            if not member.isdir():
                files.add(PurePosixPath(member.name))
            yield member
            continue
        raise DatasetError(
            f"{archive}: the member {quoted(member.name)} {wrong}; nothing was unpacked, do not trust this file"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar, a tar.gz or the official zip into an existing folder, after checking every member.

    Modes, owners and times in the archive are ignored. Raises DatasetError, with nothing written, for a member that
    leads out of the folder; and for a damaged or oversized archive or a folder that cannot be written.
    """
    with _reading(archive):
        with _open_tar(archive) as opened:
            for _ in _members(opened, archive):
                pass
        with _open_tar(archive) as opened:
            for member in _members(opened, archive):
                target = folder / member.name
                with writing(target):  # what can be read wrongly was found the first time
                    if member.islnk():  # copied: the stream cannot go back, and not every file system has links
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(folder / member.linkname, target)
                    else:
                        opened[0].extract(member, folder, set_attrs=False)
