"""Downloads that are resumed and checked: a ``.part`` file grows until it is whole, which its checksum decides."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from caltech_sweep import stores
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import BLOCK, ELSEWHERE, alone, make_folder, write_all

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0 when the server does not say)

MAX_DOWNLOAD = 4 << 30  # bytes; the largest published weights have 2.5e9
MAY_PASS = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that are asked again
# No server at all is most likely no network, which is said at once: connect=0.
RETRY = Retry(
    4, connect=0, status_forcelist=MAY_PASS, backoff_factor=0.5, raise_on_status=False, respect_retry_after_header=False
)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its warnings tell whole URLs, secrets too


class _BrokenError(Exception):
    """An attempt that did not complete the file; ``again`` says whether another one may."""

    def __init__(self, text: str, again: bool = False) -> None:
        self.again = again
        super().__init__(text)


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
    fix: str,
    retry: Retry = RETRY,
    timeout_s: float = 30.0,
) -> None:
    """Make ``target`` the file at ``url``, going on with what an earlier call left in ``target.part``.

    ``checksums`` are "md5:..." or "sha256:..." (or the first digits of one), any of which will do; a target that has
    one is not fetched again. ``fix`` ends the sentence when the network is down. Processes that want the same folder
    take turns. Raises DatasetError; a broken connection keeps the ``.part``, a wrong checksum deletes it.
    """
    make_folder(target.parent)
    part = target.with_name(f"{target.name}.part")
    with alone(target.parent):
        try:
            if is_there(target, checksums):
                return
            if not checksums:
                part.unlink(missing_ok=True)  # nothing would tell whether the rest belongs to it
            for last in (False, True):  # what was put together from several answers may be of two files: once more
                whole = is_there(part, checksums) or _receive(url, part, progress, fix, retry, timeout_s)
                if is_there(part, checksums):
                    break
                part.unlink()
                if whole or last:
                    raise DatasetError(
                        f"{shown(url)} sent a file without the expected checksum {' or '.join(checksums)}, so it was "
                        f"deleted: it was damaged on its way or is another file; run again, {fix}"
                    )
            part.replace(target)
        except OSError as error:
            raise DatasetError(f"{target} cannot be stored ({error.strerror}); {ELSEWHERE}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, progress: Progress, fix: str, retry: Retry, timeout_s: float) -> bool:
    """Fill ``part``, trying again while it grows or a try is left; tell whether all of it came in one answer."""
    furthest = _size(part)
    whole, left, again = not furthest, int(retry.total or 0), retry
    while True:
        try:
            _attempt(url, part, progress, again, timeout_s)
            return whole
        except _BrokenError as error:
            have = _size(part)
            if have > furthest:
                left, furthest = int(retry.total or 0), have
            if not (left and error.again):
                kept = f"; the {have / 1e6:.1f} MB that arrived are kept" if have else ""
                reason = stores.hide_secrets(str(error), url)
                raise DatasetError(
                    f"{shown(url)} {reason}{kept}; run again to {'go on' if kept else 'try'} when it answers, {fix}"
                ) from error
            whole, left, again = False, left - 1, retry.new(connect=None)  # there is a server


def _attempt(url: str, part: Path, progress: Progress, retry: Retry, timeout_s: float) -> None:
    """Ask for what is missing and append it; raise _BrokenError when that did not complete the file."""
    have = _size(part)
    headers = {"User-Agent": "caltech-sweep", "Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    if not have:
        del headers["Range"]
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        try:
            response = session.get(url, headers=headers, stream=True, timeout=timeout_s)
        except requests.RequestException as error:
            raise _BrokenError(f"could not be reached ({stores.reason(_origin(error))})") from error
        with response:
            _append(response, part, _start(response, part, have), progress)


def _origin(error: BaseException) -> BaseException:
    """Return the first of a chain of errors, as the later ones tell the whole URL and their own names."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _start(response: requests.Response, part: Path, have: int) -> int:
    """Return where the body begins: after the ``have`` bytes that are there, or at 0."""
    status, span = response.status_code, response.headers.get("Content-Range", "")
    if status == 206 and span.strip().startswith(f"bytes {have}-"):
        return have
    if status in (206, 416) and have:
        part.unlink()
        raise _BrokenError("has no such part of the file", again=True)
    if status != 200:
        raise _BrokenError(f"answered {status} {response.reason}")
    return 0


def _append(response: requests.Response, part: Path, have: int, progress: Progress) -> None:
    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() else 0
    with part.open("ab" if have else "wb", buffering=0) as file:  # unbuffered: a full disk is noticed at the write
        try:
            for block in response.raw.stream(BLOCK, decode_content=False):
                have += len(block)
                if have > MAX_DOWNLOAD:
                    raise _BrokenError(f"sends more than {MAX_DOWNLOAD / 1e9:.1f} GB")
                write_all(file, block)
                progress(have, total)
        except HTTPError as error:
            of = f" of {total / 1e6:.1f}" if total else ""
            raise _BrokenError(f"stopped after {have / 1e6:.1f}{of} MB", again=True) from error
