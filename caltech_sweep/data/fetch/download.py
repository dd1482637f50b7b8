"""Downloads that are resumed and checked: a ``.part`` file grows until it is whole and its checksum is right."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from caltech_sweep import stores
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import BLOCK, ELSEWHERE, alone, make_folder, write_all

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0 when the server does not say)

WAITS_S = (0.5, 1.0, 2.0, 4.0)  # between attempts that bring nothing new; each new byte starts them afresh
MAX_DOWNLOAD = 4 << 30  # bytes; the largest published weights have 2.5e9


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


def shown(url: str) -> str:
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
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_there(path: Path, checksums: Sequence[str]) -> bool:
    """Tell whether a file is there with one of some checksums, or with any where there are none."""
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
    make_folder(target.parent)
    part = target.with_name(f"{target.name}.part")
    with alone(target.parent):
        try:
            if is_there(target, checksums):
                return
            _receive(url, part, progress, mend, waits_s, timeout_s)
            if not is_there(part, checksums):
                part.unlink()
                raise DatasetError(
                    f"{shown(url)} sent a file without the expected checksum {' or '.join(checksums)}, so it was "
                    f"deleted: it was damaged on its way or is another file; run again, {mend}"
                )
            part.replace(target)
        except OSError as error:
            raise DatasetError(f"{target} cannot be stored ({error.strerror}); {ELSEWHERE}") from error
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
                reason = stores.hide_secrets(str(error), url)
                raise DatasetError(
                    f"{shown(url)} {reason}{kept}; run again to {what} when it answers, {mend}"
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
        raise _BrokenError(f"could not be reached ({stores.reason(error)})", heard=heard) from error
    with response:
        have, total = _start(response, part, note, have, url)
        _append(response, part, have, total, progress)


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
                block = response.read(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenError(f"stopped after {have / 1e6:.1f} MB ({stores.reason(error)})") from error
            if not block:
                break
            have += len(block)
            if have > MAX_DOWNLOAD:
                raise _BrokenError(f"sends more than {MAX_DOWNLOAD / 1e9:.1f} GB", again=False)
            write_all(file, block)
            progress(have, total)
    if have < total:
        raise _BrokenError(f"stopped after {have / 1e6:.1f} of {total / 1e6:.1f} MB")
