"""Getting Caltech-101: real downloads from a server that misbehaves, real archives, hostile and damaged ones."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import random
import resource
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich import filesize

from caltech_sweep.cli import main
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import dataset_root
from caltech_sweep.data.fetch.archive import fetch
from caltech_sweep.data.fetch.download import RETRY, download
from caltech_sweep.data.fetch.unpack import unpack
from caltech_sweep.data.splits import caltech_split
from caltech_sweep.errors import DatasetError, UsageError
from caltech_sweep.files import locked
from helpers.datasets import fake_caltech
from helpers.servers import FileServer, serve

BODY = random.Random(0).randbytes(700_000)  # more than two reads
SHA = f"sha256:{hashlib.sha256(BODY).hexdigest()}"


def quiet(done: int, total: int) -> None:
    """Take progress and show nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as state:
        state.files["file.bin"] = BODY
        yield state


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CALTECH101_ROOT", raising=False)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def caltech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_caltech(tmp_path_factory.mktemp("own") / "101_ObjectCategories")


@pytest.fixture(scope="module")
def packed(caltech: Path) -> bytes:
    """A 101_ObjectCategories.tar.gz of the whole tree, whose files are empty."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, format=tarfile.USTAR_FORMAT) as tar:
        tar.add(caltech, caltech.name)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def zipped(packed: bytes) -> bytes:
    """The official zip's layout: the tar.gz in a folder, next to other things."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("caltech-101/Annotations.tar", b"")
        file.writestr("__MACOSX/caltech-101/._101_ObjectCategories.tar.gz", b"resource fork")
        file.writestr("caltech-101/101_ObjectCategories.tar.gz", packed)
    return buffer.getvalue()


def get(server: FileServer, target: Path, checksum: str = SHA, tries: int = 2) -> list[int]:
    """Download file.bin, with some tries more that do not wait, and return how far each progress report said it was."""
    seen: list[int] = []
    retry = RETRY.new(total=tries, backoff_factor=0)
    url = server.url("file.bin?token=hidden")
    download(url, target, [checksum], lambda done, _: seen.append(done), fix="FIX", retry=retry)
    assert target.read_bytes() == BODY and sorted(p.name for p in target.parent.iterdir()) == [target.name]
    return seen


# Downloads


def test_a_download_arrives_whole_and_once(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    assert get(server, target)[-1] == len(BODY)
    assert not get(server, target) and server.asked == [None]
    target.write_bytes(b"damaged")
    assert get(server, target) and server.asked == [None, None]


def test_a_broken_download_is_kept_and_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    server.cut = 300_000
    target = tmp_path / "new" / "file.bin"
    with pytest.raises(DatasetError, match=r"stopped after 0.3 of 0.7 MB.*the 0.3 MB that arrived are kept.*to go on"):
        get(server, target, tries=0)
    assert [p.name for p in target.parent.iterdir()] == ["file.bin.part"]
    assert (tmp_path / "new" / "file.bin.part").read_bytes() == BODY[:300_000]
    server.cut = None
    assert min(get(server, target)) > 300_000
    assert server.asked == [None, "bytes=300000-"]


def test_a_connection_that_breaks_again_and_again_still_gets_there(server: FileServer, tmp_path: Path) -> None:
    server.cut = 100_000
    get(server, tmp_path / "new" / "file.bin", tries=1)
    assert len(server.asked) == 7


def test_a_server_without_ranges_starts_over_and_attempts_are_bounded(server: FileServer, tmp_path: Path) -> None:
    server.cut, server.ranges = 300_000, False
    target = tmp_path / "new" / "file.bin"
    with pytest.raises(DatasetError, match="stopped after 0.3 of 0.7 MB"):
        get(server, target)
    assert len(server.asked) == 3  # one that brought bytes, and two that brought no new ones
    server.cut = None
    get(server, target)


@pytest.mark.parametrize("length", [600_000, 900_000])
def test_a_file_that_changed_meanwhile_is_not_mixed(server: FileServer, tmp_path: Path, length: int) -> None:
    server.cut, server.files["file.bin"] = 300_000, bytes(length)
    with pytest.raises(DatasetError, match="are kept"):
        get(server, tmp_path / "new" / "file.bin", tries=0)
    server.cut, server.files["file.bin"] = None, BODY
    get(server, tmp_path / "new" / "file.bin")
    assert server.asked == [None, "bytes=300000-", None]  # the checksum told, and all of it was fetched once more


def test_a_file_that_changes_during_the_download_is_not_mixed(server: FileServer, tmp_path: Path) -> None:
    server.cut, server.files["file.bin"] = 400_000, bytes(700_000)

    def change(done: int, total: int) -> None:
        server.files["file.bin"] = BODY

    download(server.url("file.bin"), tmp_path / "file.bin", [SHA], change, fix="FIX")
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert server.asked == [None, "bytes=400000-", None, "bytes=400000-"]


def test_another_file_that_comes_in_pieces_is_fetched_twice_at_most(server: FileServer, tmp_path: Path) -> None:
    server.cut, server.files["file.bin"] = 400_000, bytes(700_000)
    with pytest.raises(DatasetError, match="without the expected checksum"):
        get(server, tmp_path / "new" / "file.bin")
    assert len(server.asked) == 4 and not list((tmp_path / "new").iterdir())


def test_without_a_checksum_nothing_is_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"of another file")
    download(server.url("file.bin"), tmp_path / "file.bin", [], quiet, fix="FIX")
    assert (tmp_path / "file.bin").read_bytes() == BODY and server.asked == [None]


def leave_part(target: Path, content: bytes) -> None:
    """Leave what a killed process would."""
    target.parent.mkdir(exist_ok=True)
    target.with_name("file.bin.part").write_bytes(content)


def test_a_part_that_is_whole_needs_no_server_and_one_that_is_too_long_starts_over(
    server: FileServer, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "file.bin"
    leave_part(target, BODY)
    get(server, target)
    assert not server.asked
    target.unlink()
    leave_part(target, BODY + b"too long")
    get(server, target)  # the server answers 416
    assert server.asked == ["bytes=700008-", None]


def test_another_range_than_asked_for_starts_over(server: FileServer, tmp_path: Path) -> None:
    server.shift = 5
    leave_part(tmp_path / "new" / "file.bin", BODY[:1000])
    get(server, tmp_path / "new" / "file.bin")
    assert server.asked == ["bytes=1000-", None]


def test_a_wrong_checksum_deletes_the_file_and_says_so(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"without the expected checksum md5:00, so it was deleted"):
        get(server, tmp_path / "new" / "file.bin", "md5:00")
    assert not list((tmp_path / "new").iterdir())


def test_a_body_of_unknown_length_that_ends_early_fails_its_checksum(server: FileServer, tmp_path: Path) -> None:
    server.lengths, server.cut = False, 1000
    with pytest.raises(DatasetError, match="was deleted"):
        get(server, tmp_path / "new" / "file.bin")
    server.cut = None
    get(server, tmp_path / "new" / "file.bin")


def test_only_errors_that_may_pass_are_tried_again(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    get(server, tmp_path / "new" / "file.bin")
    server.statuses = [403, 500]
    with pytest.raises(DatasetError, match="answered 403 Forbidden; run again to try when it answers, FIX"):
        get(server, tmp_path / "other" / "file.bin")
    server.statuses = [500] * 3
    with pytest.raises(DatasetError, match="answered 500"):
        get(server, tmp_path / "other" / "file.bin")
    server.statuses = [204]
    with pytest.raises(DatasetError, match="answered 204"):
        get(server, tmp_path / "other" / "file.bin")


def test_a_server_that_hangs_up_is_asked_again_and_no_secret_is_logged(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.statuses = [0, 0]
    get(server, tmp_path / "new" / "file.bin")
    server.statuses = [0] * 3
    with pytest.raises(DatasetError, match=r"file.bin could not be reached \(.*closed connection.*FIX") as caught:
        get(server, tmp_path / "other" / "file.bin")
    assert "hidden" not in caplog.text + str(caught.value)


def test_a_server_that_speaks_no_http_or_hangs_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file.bin"
        with pytest.raises(DatasetError, match="could not be reached .*timed out"):
            download(url, tmp_path / "file.bin", [SHA], quiet, fix="FIX", retry=RETRY.new(total=0), timeout_s=0.1)
    started = time.monotonic()
    with pytest.raises(DatasetError, match=r"could not be reached \(.*refused\); run again to try"):
        download(url, tmp_path / "file.bin", [SHA], quiet, fix="FIX")
    assert time.monotonic() - started < 2  # at once: there is most likely no network


def test_a_server_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()

    def answer(listener: socket.socket, head: str, body: bytes) -> None:
        with listener:
            connection, _ = listener.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(f"HTTP/1.1 {head}\r\nConnection: close\r\n\r\n".encode() + body)

    def serve_twice() -> None:
        answer(listener, f"200 OK\r\nContent-Length: {len(BODY)}", BODY[:300_000])
        time.sleep(0.3)  # nobody listens
        answer(socket.create_server(address), "206 Partial\r\nContent-Range: bytes 300000-/*", BODY[300_000:])

    thread = threading.Thread(target=serve_twice)
    thread.start()
    url, retry = f"http://127.0.0.1:{address[1]}/file.bin", RETRY.new(backoff_factor=0.2)
    download(url, tmp_path / "file.bin", [SHA], quiet, fix="FIX", retry=retry, timeout_s=5)
    thread.join()
    assert (tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://x/y",
        "http://",
        "http://[",
        "http://x:y/z",
        "http://x/a b",
        "x.zip",
        "http://é/",
    ],
)
def test_urls_that_are_none_are_sentences(url: str) -> None:
    with pytest.raises(DatasetError, match="must be a web address"):
        fetch(None, url or "#", quiet)


def test_secrets_in_urls_are_never_shown(server: FileServer) -> None:
    with pytest.raises(DatasetError) as caught:
        fetch(None, "http://me:secret@127.0.0.1/x.zip", quiet)
    assert "secret" not in str(caught.value)
    with pytest.raises(DatasetError) as caught:
        fetch(None, server.url("none.zip?token=secret"), quiet)
    assert "none.zip answered 404" in str(caught.value) and "secret" not in str(caught.value)


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file of this process grow over ``limit`` bytes: a real failing write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_arrived(server: FileServer, tmp_path: Path) -> None:
    with (
        full_disk(100_000),
        pytest.raises(DatasetError, match=r"file.bin cannot be stored \(File too large\); free some space"),
    ):
        get(server, tmp_path / "new" / "file.bin")
    assert (tmp_path / "new" / "file.bin.part").stat().st_size == 100_000
    get(server, tmp_path / "new" / "file.bin")
    assert server.asked == [None, "bytes=100000-"]


def test_two_processes_take_turns(server: FileServer, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from caltech_sweep.data.fetch.download import download; "
        f"download({server.url('file.bin')!r}, Path('file.bin'), [{SHA!r}], lambda d, t: None, fix='')"
    )
    with locked(tmp_path) as held:
        assert held
        processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(2)]
        time.sleep(0.2)
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "file.bin").read_bytes() == BODY and server.asked == [None]


# What `caltech-sweep data` does


@pytest.mark.slow
def test_the_dataset_is_downloaded_verified_unpacked_and_found(server: FileServer, zipped: bytes, home: Path) -> None:
    server.files["c.zip"], server.cut = zipped, len(zipped) // 2 + 1
    url = f"{server.url('c.zip')}#md5={hashlib.md5(zipped).hexdigest()}"
    result = CliRunner().invoke(main, ["data", "--url", url])
    assert (result.exit_code, result.stdout) == (0, f"Caltech-101 is in {home / '101_ObjectCategories'}\n")
    size = filesize.decimal(len(zipped))
    assert f"downloading: {size} of {size}" in result.stderr
    assert len(caltech_split(dataset_root(DatasetConfig())).test) > 2800
    assert sorted(p.name for p in home.iterdir()) == ["101_ObjectCategories", "caltech-101.zip"]
    assert fetch(None, None, quiet) == home / "101_ObjectCategories"  # asks no server
    assert len(server.asked) == 2
    # the same content from elsewhere: nothing is replaced
    assert fetch(home / "caltech-101.zip", None, quiet) == home / "101_ObjectCategories"
    assert sorted(p.name for p in home.iterdir()) == ["101_ObjectCategories", "caltech-101.zip"]


def test_another_file_under_the_url_is_refused(server: FileServer, home: Path) -> None:
    with pytest.raises(DatasetError, match="checksum md5:3138e1922a9193bfa496528edbbc45d0 or .*so it was deleted"):
        fetch(None, server.url("file.bin"), quiet)
    assert not list(home.iterdir())
    with pytest.raises(DatasetError, match="must be md5=... or sha256=..."):
        fetch(None, server.url("file.bin#part2"), quiet)


def test_offline_is_one_sentence_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there: no network
    monkeypatch.setenv("no_proxy", "")
    result = CliRunner().invoke(main, ["data"])
    assert result.exit_code == 2 and result.stdout == ""
    url = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
    assert result.stderr.startswith(f"Error: {url} could not be reached (")
    assert result.stderr.endswith(
        f"; run again to try when it answers, or download {url} elsewhere and give the file: "
        "caltech-sweep data --from FILE\n"
    )


@pytest.mark.slow
def test_a_folder_is_copied_and_kept_as_it_is(caltech: Path, home: Path) -> None:
    root = fetch(caltech.parent, None, quiet)
    assert root == home / "101_ObjectCategories" and not root.is_symlink()
    assert fetch(root, None, quiet) == root == fetch(home, None, quiet)
    (root / "class_005" / "image_0001.jpg").unlink()
    (root / "mine.txt").write_text("keep")
    with pytest.raises(DatasetError, match="9,144 files"):
        fetch(root, None, quiet)
    assert fetch(caltech, None, quiet) == root
    assert (home / "101_ObjectCategories.old" / "mine.txt").read_text() == "keep"
    assert sorted(p.name for p in home.iterdir()) == ["101_ObjectCategories", "101_ObjectCategories.old"]
    caltech_split(caltech)


def test_an_unzipped_official_zip_is_understood(tmp_path: Path) -> None:
    (tmp_path / "unzipped").mkdir()
    (tmp_path / "unzipped" / "101_ObjectCategories.tar.gz").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"unzipped/101_ObjectCategories.tar.gz cannot be unpacked"):
        fetch(tmp_path / "unzipped", None, quiet)


def test_an_incomplete_archive_is_named_and_changes_nothing(tmp_path: Path, home: Path) -> None:
    (tmp_path / "c.tar").write_bytes(tar_of(member("renamed/BACKGROUND_Google/image_0001.jpg")))
    (home / ".unpack-killed" / "half").mkdir(parents=True)
    os.utime(home / ".unpack-killed", (0, 0))
    with pytest.raises(DatasetError, match=r"c.tar/BACKGROUND_Google lacks the stray file 'tmp'"):
        fetch(tmp_path / "c.tar", None, quiet)
    assert not list(home.iterdir())


def test_command_lines_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        fetch(tmp_path, "http://x/y", quiet)
    with pytest.raises(DatasetError, match="there is no folder or file .*nowhere"):
        fetch(tmp_path / "nowhere", None, quiet)
    with pytest.raises(DatasetError, match="there is no folder or file /dev/zero"):
        fetch(Path("/dev/zero"), None, quiet)
    with pytest.raises(DatasetError, match="has no folder BACKGROUND_Google"):
        fetch(tmp_path, None, quiet)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(DatasetError, match=r"data cannot be made \(Not a directory\).*CALTECH_SWEEP_DATA"):
        fetch(tmp_path, None, quiet)


def test_a_folder_named_by_the_environment_is_not_fetched(caltech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALTECH101_ROOT", str(caltech.parent))
    assert fetch(None, None, quiet) == caltech
    monkeypatch.setenv("CALTECH101_ROOT", str(caltech / "class_001"))
    with pytest.raises(DatasetError, match="CALTECH101_ROOT names the dataset, so nothing was fetched, but .*unset it"):
        fetch(None, None, quiet)


# Archives


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[bytes, ...]:
    return name.encode("utf-8", "surrogateescape"), content, kind, link.encode("utf-8", "surrogateescape")


def tar_of(*members: tuple[bytes, ...]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content, kind, link in members:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.type, info.linkname = kind, link.decode("utf-8", "surrogateescape")
            info.size, info.mode = len(content), 0o6777
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def unpacked(content: bytes, sandbox: Path) -> dict[str, bytes]:
    """Unpack bytes in a sandbox and return the files; whatever happens, nothing outside the folder changes."""
    (sandbox / "folder").mkdir(parents=True, exist_ok=True)
    (sandbox / "archive").write_bytes(content)
    try:
        unpack(sandbox / "archive", sandbox / "folder")
    finally:
        assert sorted(p.name for p in sandbox.iterdir()) == ["archive", "folder"]
        assert not [p for p in sandbox.rglob("*") if p.is_symlink()]
    return contents(sandbox / "folder")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


GOOD = member("a/good", b"good")
HOSTILE = {
    "absolute": (member("/tmp/evil", b"x"), "/tmp/evil", "leads out"),
    "climbs": (member("a/../../evil", b"x"), "a/../../evil", "leads out"),
    "climbs backwards": (member("a\\..\\..\\evil", b"x"), "evil", "leads out"),
    "drive": (member("C:evil", b"x"), "C:evil", "leads out"),
    "symlink out": (member("a/evil", kind=tarfile.SYMTYPE, link="/etc"), "a/evil", "symbolic link"),
    "symlink in": (member("a/evil", kind=tarfile.SYMTYPE, link="good"), "a/evil", "symbolic link"),
    "hard link out": (member("evil", kind=tarfile.LNKTYPE, link="/etc/passwd"), "evil", "link to '/etc/passwd'"),
    "hard link up": (member("evil", kind=tarfile.LNKTYPE, link="a/../../x"), "evil", "no earlier file"),
    "hard link to nothing": (member("evil", kind=tarfile.LNKTYPE, link="a/none"), "evil", "no earlier file"),
    "device": (member("evil", kind=tarfile.CHRTYPE), "evil", "special file"),
    "pipe": (member("evil", kind=tarfile.FIFOTYPE), "evil", "special file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_named_before_anything_is_written(case: str, tmp_path: Path) -> None:
    bad, name, why = HOSTILE[case]
    for content in (tar_of(GOOD, bad), gzip.compress(tar_of(GOOD, bad))):
        with pytest.raises(DatasetError) as caught:
            unpacked(content, tmp_path / "sandbox")
        assert name in str(caught.value).replace("\\\\", "\\") and why in str(caught.value)
        assert "nothing was unpacked" in str(caught.value) and not list((tmp_path / "sandbox/folder").iterdir())


def test_harmless_archives_unpack_with_plain_modes(tmp_path: Path) -> None:
    link = member("b/link", kind=tarfile.LNKTYPE, link="./a/good")
    content = tar_of(member("./a", kind=tarfile.DIRTYPE), member("./a/good", b"good"), link, member("ü \n'", b"1"))
    files = {"a/good": b"good", "b/link": b"good", "ü \n'": b"1"}
    assert unpacked(content, tmp_path / "tar") == files == unpacked(gzip.compress(content), tmp_path / "gz")
    assert not (tmp_path / "tar/folder/a/good").stat().st_mode & 0o7111


def forged(size: int, kind: bytes) -> bytes:
    """A header that claims a size whose bytes do not follow."""
    info = tarfile.TarInfo("big")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_bombs_are_refused_with_nothing_written(tmp_path: Path) -> None:
    zeros = gzip.compress(bytes(1 << 20))  # gzip streams may follow each other
    sparse = bytearray(forged(512, tarfile.GNUTYPE_SPARSE))
    sparse[483:495] = b"77777777777\0"  # the size with its holes
    sparse[148:156] = b"%06o\0 " % (sum(sparse) - sum(sparse[148:156]) + 8 * 32)
    bombs = {
        "after the end": gzip.compress(tar_of(GOOD)) + zeros * 520,
        "one large member": forged(600 << 20, tarfile.REGTYPE),
        "endless": forged(1 << 70, tarfile.REGTYPE),
        "holes": bytes(sparse) + bytes(512),
        "many members": forged(0, tarfile.DIRTYPE) * 30_001,
    }
    for name, content in bombs.items():
        with pytest.raises(DatasetError, match=r"unpacks to more than 512 MB or 30,000 files"):
            unpacked(content, tmp_path / name)
        assert not list((tmp_path / name / "folder").iterdir())


def zip_of(content: bytes, name: str = "x/101_ObjectCategories.tar.gz") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    return buffer.getvalue()


TAR = tar_of(GOOD, member("b/noise", BODY[:3000]), member("b/" + "long" * 60, b"x"))
PLAIN = {"tar": TAR, "tar.gz": gzip.compress(TAR, mtime=0), "zip": zip_of(gzip.compress(TAR, mtime=0))}
FILES = {"a/good": b"good", "b/noise": BODY[:3000], "b/" + "long" * 60: b"x"}


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_every_truncation_is_a_sentence(kind: str, tmp_path: Path) -> None:
    assert unpacked(PLAIN[kind], tmp_path / "whole") == FILES
    for length in range(0, len(PLAIN[kind]), 53):
        with pytest.raises(DatasetError, match="cannot be unpacked"):
            unpacked(PLAIN[kind][:length], tmp_path / str(length))


def test_a_truncated_plain_tar_lacks_whole_files_at_most(tmp_path: Path) -> None:
    assert unpacked(TAR, tmp_path / "whole") == FILES
    for length in range(0, len(TAR), 97):  # without a checksum, only a cut within a member is noticed here
        with contextlib.suppress(DatasetError):
            assert unpacked(TAR[:length], tmp_path / str(length)).items() <= FILES.items()


def test_a_disk_that_fills_while_unpacking_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "c.tar").write_bytes(TAR)
    (tmp_path / "folder").mkdir()
    with full_disk(1000), pytest.raises(DatasetError, match=r"b/noise cannot be written \(File too large\); free some"):
        unpack(tmp_path / "c.tar", tmp_path / "folder")


def test_files_that_are_no_archive_are_sentences(tmp_path: Path) -> None:
    for name, content in {"empty": b"", "html": b"<html>" * 200, "zeros": bytes(20_000), "text": b"x"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match="cannot be unpacked|has no folder BACKGROUND_Google"):
            fetch(tmp_path / name, None, quiet)
    with pytest.raises(
        DatasetError, match="holds no 101_ObjectCategories.tar.gz that can be read, so it is not the official zip"
    ):
        unpacked(zip_of(b"", "x/readme"), tmp_path / "zip")
    with pytest.raises(DatasetError, match=r"folder/a/good cannot be written \((File exists|Not a directory)\)"):
        unpacked(tar_of(member("a", b"file"), GOOD), tmp_path / "clash")


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(PLAIN)), data=st.data())
def test_flipped_bytes_never_crash_or_escape(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    content = bytearray(PLAIN[kind])
    places = st.integers(0, len(content) - 1) | st.integers(0, min(600, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        content[place] = value
    start = data.draw(st.integers(0, len(content)))
    repeated = data.draw(st.sampled_from([b"", bytes(content[start : start + 512])]))
    content[start:start] = repeated
    with contextlib.suppress(DatasetError):
        unpacked(bytes(content), tmp_path_factory.mktemp("fuzz"))


names = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", "/", "~", "C:", "\\", "\0", "ü", "x" * 300]), max_size=5
).map("/".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
kinds = st.sampled_from([*tarfile.SUPPORTED_TYPES, b"Z", b"\0"])
members = st.builds(member, names, st.binary(max_size=20), kinds, names)


@settings(max_examples=25, deadline=None)
@given(st.lists(members, min_size=1, max_size=5))
def test_hostile_members_never_crash_or_escape_and_others_are_written_as_tarfile_does(
    tmp_path_factory: pytest.TempPathFactory, hostile: list[tuple[bytes, ...]]
) -> None:
    content, links = tar_of(*hostile), {tarfile.LNKTYPE, tarfile.SYMTYPE}
    with contextlib.suppress(DatasetError):
        ours = unpacked(content, tmp_path_factory.mktemp("fuzz"))
        if not links & {kind for _, _, kind, _ in hostile}:  # ours are copies
            theirs = tmp_path_factory.mktemp("theirs")
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                # Python 3.11.0 to 3.11.3 have no filter yet.
                tar.extractall(theirs, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            assert ours == contents(theirs)
