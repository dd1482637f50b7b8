"""Caltech-101 on this machine: downloaded, checked and unpacked, or copied from what the user already has.

Nothing is half done: a download grows in a ``.part`` file that later calls go on with, an archive is checked member
by member before anything is written, and the folder is unpacked beside its place and renamed into it once complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import struct
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import dataset_root
from caltech_sweep.data.splits import BACKGROUND, caltech_split
from caltech_sweep.errors import DatasetError, UsageError

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0 when the server does not say)

URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"  # DOI 10.22002/D1.20086, CC BY 4.0
CHECKSUMS = ("md5:3138e1922a9193bfa496528edbbc45d0", "md5:b224c7392d521a49829488ab0f1120d9")  # the zip; its tar.gz
WAITS_S = (0.5, 1.0, 2.0, 4.0)  # between attempts that bring nothing new; each new byte starts them afresh
MAX_DOWNLOAD = 4 << 30  # bytes; the largest published weights have 2.5e9
MAX_UNPACKED = 512 << 20  # bytes; Caltech-101 has 1.4e8 with the tar's own headers
MAX_MEMBERS = 30_000  # Caltech-101 has 9,248, and a file beside each of them when macOS packed it
_BLOCK = 1 << 18
_ZIP = "caltech-101.zip"
_ARCHIVES = tuple(paths.CALTECH_FOLDER + suffix for suffix in (".tar.gz", ".tgz", ".tar"))
_ELSEWHERE = "free some space, or name another folder with the environment variable CALTECH_SWEEP_DATA"


# What `caltech-sweep data` does


def fetch(source: Path | None, url: str | None, progress: Progress) -> Path:
    """Return the complete class-folder root that later commands find without a flag, fetching it where needed.

    Without a ``source``, the archive at ``url`` (default: the public one) is downloaded, unless the folder is there
    already. A ``source`` (a folder, a tar, a tar.gz or the official zip) is copied or unpacked and itself left as it
    is: a copy, so that moving or changing the original later changes no result. A folder that was there before and
    differs is kept beside the new one as ``101_ObjectCategories.old``.

    Raises UsageError when both are given, and DatasetError for everything else that can go wrong.
    """
    if source is not None and url is not None:
        raise UsageError("--from and --url both say where the dataset comes from; give one of them")
    if source is None and url is None and os.environ.get("CALTECH101_ROOT"):
        return _named_root()
    home = _make_folder(paths.data_home())
    root = home / paths.CALTECH_FOLDER
    if source is not None:
        return _install(home, _existing(source))
    address, checksums = _address(url or URL)
    mend = f"or download {_shown(address)} elsewhere and give the file: caltech-sweep data --from FILE"
    if not _is_complete(root):
        download(address, home / _ZIP, checksums, progress, mend=mend)
        _install(home, home / _ZIP)
    return root


def _named_root() -> Path:
    """Return the folder that CALTECH101_ROOT names, since every command reads it and no download."""
    try:
        root = dataset_root(DatasetConfig())
        _verify(root, root)
    except DatasetError as error:
        raise DatasetError(
            f"the environment variable CALTECH101_ROOT names the dataset, so nothing was fetched, but {error}; "
            "correct the variable, or unset it and run again"
        ) from error
    return root


def _address(url: str) -> tuple[str, tuple[str, ...]]:
    """Cut the checksum, ``#md5=...`` or ``#sha256=...``, off a URL; without one the public archive is expected."""
    address, _, fragment = url.partition("#")
    if not fragment:
        return address, CHECKSUMS
    match = re.fullmatch(r"(md5=[0-9a-f]{32}|sha256=[0-9a-f]{64})", fragment.lower())
    if match is None:
        raise DatasetError("--url: what follows the # must be md5=... or sha256=... with the archive's whole checksum")
    return address, (match[1].replace("=", ":"),)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"the folder {folder} cannot be made ({error.strerror}); {_ELSEWHERE}") from error
    return folder


def _existing(source: Path) -> Path:
    """Return a source's class folders, or its archive, which an unzipped official zip holds in a folder."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise DatasetError(f"--from: there is no folder or file {source}; check the path")
    root = _class_root(source)
    packed = [source / name for name in (*_ARCHIVES, _ZIP) if (source / name).is_file()]
    return packed[0] if packed and root == source and not (source / BACKGROUND).is_dir() else root


def _class_root(folder: Path) -> Path:
    """Return the folder of class folders that ``folder`` is or holds; when there is none, ``folder`` itself."""
    name = paths.CALTECH_FOLDER
    with contextlib.suppress(OSError):
        for pattern in (BACKGROUND, f"{name}/*", f"*/{BACKGROUND}", f"*/{name}/*"):
            for found in sorted(folder.glob(pattern)):
                if found.is_dir():
                    return found.parent
    return folder


def _verify(root: Path, named: Path) -> None:
    """Raise DatasetError, speaking of ``named``, unless the folder is complete."""
    try:
        caltech_split(root)
    except DatasetError as error:
        raise DatasetError(str(error).replace(str(root), str(named))) from error
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}") from error


def _is_complete(root: Path) -> bool:
    try:
        _verify(root, root)
    except DatasetError:
        return False
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that fetch into it; they wait for their turn."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"the folder {folder} cannot be read ({error.strerror}); {_ELSEWHERE}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks: renames still keep every file whole
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _install(home: Path, source: Path) -> Path:
    """Copy or unpack ``source`` beside the dataset's place, verify it, and only then rename it into place."""
    root = home / paths.CALTECH_FOLDER
    with _alone(home):
        if root.is_dir() and source.is_dir() and root.samefile(source):
            _verify(root, root)
            return root
        for stale in home.glob(".unpack-*"):  # left by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        try:
            fresh = Path(tempfile.mkdtemp(prefix=".unpack-", dir=home))
        except OSError as error:
            raise DatasetError(f"the folder {home} cannot be written ({error.strerror}); {_ELSEWHERE}") from error
        try:
            inner = fresh / paths.CALTECH_FOLDER  # mkdtemp's own folder is closed to other users
            inner.mkdir()
            if source.is_dir():
                _copy_classes(source, inner)
            else:
                unpack(source, inner)
            found = _class_root(inner)
            _verify(found, source)
            _put_in_place(found, root)
        except OSError as error:
            raise DatasetError(f"{root} cannot be written ({error.strerror}); {_ELSEWHERE}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return root


def _copy_classes(source: Path, folder: Path) -> None:
    """Copy exactly the files that the split counts."""
    _verify(source, source)  # before a large folder that is something else is copied
    for old in sorted(path for path in source.iterdir() if path.is_dir()):
        new = folder / old.name
        new.mkdir()
        for file in old.iterdir():
            if file.is_file() and not file.name.startswith("."):
                try:
                    shutil.copyfile(file, new / file.name)
                except OSError as error:
                    raise DatasetError(
                        f"{file} cannot be copied to {folder} ({error.strerror}); {_ELSEWHERE}"
                    ) from error


def _same(one: Path, other: Path) -> bool:
    names = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def _put_in_place(found: Path, root: Path) -> None:
    if root.is_dir() and _same(found, root):
        return
    if os.path.lexists(root):  # also a dangling link: whatever it is, it is the user's and is kept
        old, number = root.with_name(f"{root.name}.old"), 1
        while os.path.lexists(old):
            number += 1
            old = root.with_name(f"{root.name}.old-{number}")
        root.rename(old)
    found.rename(root)


# Downloads


class _BrokenError(Exception):
    """An attempt that failed; ``again`` says whether another may do better, ``heard`` whether the server spoke."""

    def __init__(self, text: str, again: bool = True, heard: bool = True) -> None:
        self.again, self.heard = again, heard
        super().__init__(text)


@dataclass(frozen=True)
class _Note:
    """What the server said about the file whose first bytes are in ``.part``: kept beside it, to notice another."""

    source: str  # a digest of the URL, which may hold a secret
    validator: str | None  # for If-Range
    total: int  # bytes; 0 when the server does not say

    def write(self, path: Path) -> None:
        path.write_text(json.dumps([self.source, self.validator, self.total]))

    @classmethod
    def read(cls, path: Path, url: str) -> _Note | None:
        try:
            source, validator, total = json.loads(path.read_text())
        except (OSError, ValueError, TypeError):
            return None
        usable = source == _source(url) and isinstance(validator, str | None) and isinstance(total, int)
        return cls(source, validator, total) if usable else None


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _source(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _shown(url: str) -> str:
    """Return a URL as messages show it, without a query that may hold a secret; refuse what is no web address."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine or not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise DatasetError("the URL must be a web address that starts with http:// or https://; --from takes a file")
    if "@" in parts.netloc:
        raise DatasetError("the URL holds a user name or password; download it elsewhere and give the file with --from")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


@functools.lru_cache(maxsize=32)
def _digest(path: Path, algorithm: str, size: int, modified_ns: int) -> str:
    """Return a file's checksum; read again only when its size or time changed, as each trial asks for its weights."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _matches(path: Path, checksums: Sequence[str]) -> bool:
    if not path.is_file():
        return False
    stat = path.stat()
    pairs = [checksum.split(":") for checksum in checksums]
    return not pairs or any(_digest(path, kind, stat.st_size, stat.st_mtime_ns).startswith(x) for kind, x in pairs)


def download(
    url: str,
    target: Path,
    checksums: Sequence[str],
    progress: Progress,
    *,
    mend: str,
    waits_s: Sequence[float] = WAITS_S,
    timeout_s: float = 30.0,
) -> None:
    """Make ``target`` the file at ``url``, going on with what an earlier call left in ``target.part``.

    ``checksums`` are "md5:..." or "sha256:..." (or the first digits of one), any of which will do; a target that has
    one is not fetched again. ``mend`` ends the sentence when the network is down. Processes that want the same folder
    take turns. Raises DatasetError; a broken connection keeps the ``.part``, a wrong checksum deletes it.
    """
    shown = _shown(url)
    _make_folder(target.parent)
    part = target.with_name(f"{target.name}.part")
    with _alone(target.parent):
        try:
            if _matches(target, checksums):
                return
            _receive(url, part, progress, mend, waits_s, timeout_s)
            if not _matches(part, checksums):
                part.unlink()
                raise DatasetError(
                    f"{shown} sent a file without the expected checksum {' or '.join(checksums)}, so it was deleted: "
                    f"it was damaged on its way or is another file; run again, {mend}"
                )
            part.replace(target)
        except OSError as error:
            raise DatasetError(f"{target} cannot be stored ({error.strerror}); {_ELSEWHERE}") from error
        finally:
            if not part.exists():
                with contextlib.suppress(OSError):
                    _note_path(part).unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, progress: Progress, mend: str, waits_s: Sequence[float], timeout_s: float) -> None:
    """Fill ``part``, trying again while it grows or a wait is left."""
    left, furthest, heard = list(waits_s), _size(part), False
    while True:
        try:
            _attempt(url, part, progress, timeout_s)
            return
        except _BrokenError as error:
            heard = heard or error.heard
            if _size(part) > furthest:
                left, furthest = list(waits_s), _size(part)
            if not (left and error.again and heard):  # no server at all is most likely no network: say so at once
                kept = f"; the {_size(part) / 1e6:.1f} MB that arrived are kept" if _size(part) else ""
                what = "go on" if kept else "try"
                raise DatasetError(
                    f"{_shown(url)} {error}{kept}; run again to {what} when it answers, {mend}"
                ) from error
            time.sleep(left.pop(0))


def _attempt(url: str, part: Path, progress: Progress, timeout_s: float) -> None:
    """Ask once for what is missing and append it; raise _BrokenError when that did not complete the file."""
    note = _Note.read(_note_path(part), url)
    have = _size(part) if note else 0
    if note and note.total and have == note.total:
        return  # killed just before the checksum
    headers = {"User-Agent": "caltech-sweep", "Accept-Encoding": "identity"}
    if note and have:
        headers["Range"] = f"bytes={have}-"
        if note.validator:
            headers["If-Range"] = note.validator
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            _refused(error, part, have)
        return
    except (OSError, http.client.HTTPException, ValueError) as error:
        heard = not isinstance(error, urllib.error.URLError)
        raise _BrokenError(f"could not be reached ({_reason(error)})", heard=heard) from error
    with response:
        have, total = _start(response, part, note, have, url)
        _append(response, part, have, total, progress)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _refused(error: urllib.error.HTTPError, part: Path, have: int) -> None:
    """Sort an HTTP error: return when ``part`` is already whole, else raise whether to try again."""
    if error.code == 416 and have:
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "").strip())
        if total and int(total[1]) == have:
            return
        part.unlink()
        raise _BrokenError("has no such part of the file any more")
    raise _BrokenError(
        f"answered {error.code} {error.reason}", again=error.code >= 500 or error.code in (408, 425, 429)
    )


def _start(response: http.client.HTTPResponse, part: Path, note: _Note | None, have: int, url: str) -> tuple[int, int]:
    """Return where the body begins and how long the file is; forget ``part`` when the body is another file's."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else 0
    if response.status == 206 and note and have:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        whole = int(found[2]) if found and found[2] != "*" else note.total
        if not found or int(found[1]) != have or (note.total and whole != note.total):
            part.unlink()
            raise _BrokenError("sent another part of the file than was asked for")
        return have, whole
    if response.status != 200:
        raise _BrokenError(f"answered {response.status} {response.reason}", again=False)
    tag = response.headers.get("ETag", "")
    strong = tag if tag.startswith('"') else response.headers.get("Last-Modified")  # a weak tag may not be used
    part.write_bytes(b"")
    _Note(_source(url), strong, total).write(_note_path(part))
    return 0, total


def _append(response: http.client.HTTPResponse, part: Path, have: int, total: int, progress: Progress) -> None:
    with part.open("ab", buffering=0) as file:  # unbuffered: a full disk is noticed at the write, not at the close
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenError(f"stopped after {have / 1e6:.1f} MB ({_reason(error)})") from error
            if not block:
                break
            have += len(block)
            if have > MAX_DOWNLOAD:
                raise _BrokenError(f"sends more than {MAX_DOWNLOAD / 1e9:.1f} GB", again=False)
            _write_all(file, block)
            progress(have, total)
    if have < total:
        raise _BrokenError(f"stopped after {have / 1e6:.1f} of {total / 1e6:.1f} MB")


# Archives


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than MAX_UNPACKED bytes, whatever an archive's headers claim."""

    def __init__(self, stream: IO[bytes] | io.BufferedIOBase, archive: Path) -> None:
        self._stream, self._archive, self._left = stream, archive, MAX_UNPACKED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        block = self._stream.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise _too_large(self._archive)
        buffer[: len(block)] = block
        return len(block)


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
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        LookupError,
        MemoryError,
    ) as error:
        raise DatasetError(
            f"{archive} cannot be unpacked ({_reason(error)}): it is damaged, incomplete or no such archive; get it "
            "again, or download it with `caltech-sweep data`"
        ) from error


def _inner_tar(zipped: zipfile.ZipFile, archive: Path) -> zipfile.ZipInfo:
    for info in zipped.infolist():
        usual = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if PurePosixPath(info.filename).name in _ARCHIVES and usual:
            return info
    raise DatasetError(
        f"{archive} holds no {_ARCHIVES[0]} that can be read, so it is not the official zip; if it holds the dataset, "
        "unzip it and give the folder with --from"
    )


@contextlib.contextmanager
def _open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """Stream the members of a tar or tar.gz, or of the one in a zip; at the end, check the archive's own checksums."""
    with contextlib.ExitStack() as stack:
        try:
            stream: IO[bytes] = stack.enter_context(archive.open("rb"))
        except OSError as error:
            raise DatasetError(f"{archive} cannot be read ({error.strerror}); check its permissions") from error
        magic = stream.read(4)
        stream.seek(0)
        if magic in (b"PK\x03\x04", b"PK\x05\x06"):
            zipped = stack.enter_context(zipfile.ZipFile(stream))
            stream = stack.enter_context(zipped.open(_inner_tar(zipped, archive)))
        buffered = io.BufferedReader(_Limited(stream, archive), _BLOCK)
        if buffered.peek(2)[:2] == b"\x1f\x8b":
            # gzip's own reader, because tarfile's never compares the checksum at the end
            opened = stack.enter_context(gzip.GzipFile(fileobj=buffered))
            buffered = io.BufferedReader(_Limited(opened, archive), _BLOCK)
        # "|" never seeks, so that forged sizes cannot send the reader in circles
        yield stack.enter_context(tarfile.open(fileobj=buffered, mode="r|", bufsize=_BLOCK))
        while buffered.read(_BLOCK):
            pass


def _climbs(name: str) -> bool:
    return bool(re.match(r"[\\/]|[A-Za-z]:", name)) or ".." in re.split(r"[\\/]", name) or "\0" in name


def _members(tar: tarfile.TarFile, archive: Path) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath]]:
    """Yield folders, files and hard links to earlier files; raise DatasetError that names any other member.

    Symbolic links are refused wherever they point: no chain of them can then lead out of the folder.
    """
    files: set[PurePosixPath] = set()
    size = 0
    for count, member in enumerate(tar, start=1):
        size += max(member.size, 0)
        if count > MAX_MEMBERS or size > MAX_UNPACKED:
            raise _too_large(archive)
        path = PurePosixPath(member.name)
        if _climbs(member.name):
            wrong = "has a name that leads out of its folder"
        elif member.issym():
            wrong = f"is a symbolic link (to {member.linkname!r}), of which Caltech-101 has none"
        elif member.islnk() and (_climbs(member.linkname) or PurePosixPath(member.linkname) not in files):
            wrong = f"is a link to {member.linkname!r}, which is no earlier file of the archive"
        elif not (member.isdir() or member.isreg() or member.islnk()):
            wrong = "is a device or another special file"
        else:
            if not member.isdir():
                files.add(path)
            yield member, path
            continue
        raise DatasetError(
            f"{archive}: the member {member.name!r} {wrong}; nothing was unpacked, do not trust this file"
        )


def _write_all(file: io.FileIO, block: bytes) -> None:
    view = memoryview(block)  # an unbuffered write may take a part: on a full disk the next one raises
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{target} cannot be written ({error.strerror}); {_ELSEWHERE}") from error


def _write(stream: IO[bytes], target: Path) -> None:
    """Write one file, keeping errors of writing apart from those of reading."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("wb", buffering=0)
    with file:
        while block := stream.read(_BLOCK):
            with _writing(target):
                _write_all(file, block)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar, a tar.gz or the official zip into an existing folder, after checking every member.

    Modes, owners and times in the archive are ignored. Raises DatasetError, with nothing written, for a member that
    leads out of the folder; and for a damaged or oversized archive or a folder that cannot be written.
    """
    with _reading(archive):
        with _open_tar(archive) as tar:
            for member, _ in _members(tar, archive):
                if hasattr(tarfile, "data_filter"):  # a second pair of eyes, in the Pythons that have it
                    tarfile.data_filter(member, str(folder))
        with _open_tar(archive) as tar:
            for member, path in _members(tar, archive):
                if member.islnk():
                    with (folder / PurePosixPath(member.linkname)).open("rb") as earlier:
                        _write(earlier, folder / path)
                elif (stream := tar.extractfile(member)) is not None:
                    with stream:
                        _write(stream, folder / path)
