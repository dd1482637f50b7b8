"""Other people's machines: file systems that lack something, terminals, processors, signals, shared folders."""

from __future__ import annotations

import ctypes
import os
import pty
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from caltech_sweep import machine
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.datasets import draw
from helpers.kernel import mounted_without_shared_memory, run_without
from helpers.places import invoke, sql

LINK = """
from pathlib import Path
from caltech_sweep.files import create_atomically
for content in "one", "two":
    with create_atomically(Path("file"), replace=False) as made:
        made.write_text(content)
print(Path("file").read_text(), *sorted(p.name for p in Path.cwd().iterdir()))
"""


@pytest.mark.parametrize("answer", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EACCES", "EXDEV"])
def test_a_file_is_created_once_on_a_file_system_without_hard_links(tmp_path: Path, answer: str) -> None:
    assert run_without(LINK, tmp_path, link=answer, linkat=answer) == "one file\n"


LOCK = """
from pathlib import Path
from caltech_sweep import stores
from caltech_sweep.files import alone, locked, locked_directory
for place in Path("file.lock"), Path.cwd():
    with locked(place) as held:
        assert held is None
with stores.study_lock(stores.study_store("x.db"), "study"), alone(Path.cwd()):
    with locked_directory(Path.cwd(), "work-") as place:
        assert place.is_dir()
print("done")
"""


@pytest.mark.parametrize("answer", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EIO"])
def test_what_needs_a_lock_goes_on_where_a_file_system_has_none(tmp_path: Path, answer: str) -> None:
    assert run_without(LOCK, tmp_path, flock=answer) == "done\n"


TABLES = """
from pathlib import Path
import sqlalchemy as sa
from caltech_sweep import stores
store = stores.study_store("x.db")
def make(address):
    engine = sa.create_engine(address)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (n)"))
    engine.dispose()
store.make_whole(make)
engine = sa.create_engine(store.uri)
stores.tune_sqlite(engine, 1)
for n in range(2):
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (1)"))
with engine.connect() as connection:
    pragmas = [connection.execute(sa.text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
    print(*pragmas, connection.execute(sa.text("SELECT count(*) FROM t")).scalar())
print(stores.without_log(store))
"""


@pytest.mark.parametrize("answer", ["ENODEV", "EACCES", "EINVAL"])
def test_a_store_is_written_without_a_log_where_no_memory_is_shared_and_what_is_lost_is_said(
    tmp_path: Path, answer: str
) -> None:
    modes, sentence = run_without(TABLES, tmp_path, mmap=answer).splitlines()
    assert modes == "delete 2 2" and "no write-ahead log: a write waits" in sentence and "--local-stores" in sentence
    assert os.listdir(tmp_path) == ["x.db"]


def test_a_store_with_a_log_is_taken_to_a_file_system_without_shared_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TABLES]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert made == "wal 1 2\n\n"
    assert run_without(TABLES, tmp_path, mmap="ENODEV").splitlines()[0] == "delete 2 4"
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "wal 1 6\n\n"


COMMANDS = """
import os
from helpers.places import invoke
def check(code, *commands):
    for command in commands:
        result = invoke(*command)
        assert result.exit_code == code, (command, result.output)
        said = result.output
        if code:
            assert "has a write-ahead log and lies on a file system without" in said, (command, result.output)
            assert result.output.count("run a study with it there, which turns the log off") == 1, result.output
"""
LOOK = """
for folder, code in (".", 0), ("../cut short", 2):
    os.chdir(folder)
    check(code, ("report", "tiny"), ("plan", "tiny"))
    check(2, ("promote", "tiny"), ("predict", "photo.png"))
    check(1, ("doctor",))
"""
AND_RUN = """
for folder in ".", "../cut short":
    os.chdir(folder)
    check(0, ("run", "tiny", "--in-process", "--threads", "1"), ("report", "tiny"), ("plan", "tiny"), ("doctor",))
assert "renamed" in invoke("report", "tiny").output
"""


@pytest.mark.slow
def test_a_store_left_with_a_log_where_none_can_be_read_is_a_sentence_until_the_next_run(copied: Path) -> None:
    draw(copied / "photos")
    shutil.copy(next((copied / "photos").rglob("*.png")), copied / "photo.png")
    closed, cut = copied.parent / "closed", copied.parent / "cut short"
    for store in ("mlflow.db", "optuna.db"):
        sql(copied, store, "PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(copied, closed)  # which no process has open
    shutil.copytree(copied, cut)
    for store in ("mlflow.db", "optuna.db"):  # as a process leaves them that was killed
        with closing(sqlite3.connect(copied / "mlruns" / store)) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            database.execute("PRAGMA wal_autocheckpoint=0")
            with database:
                database.execute("CREATE TABLE only_in_the_log (n)")
                if store == "mlflow.db":
                    database.execute("UPDATE runs SET name = 'renamed' WHERE name = 'trial-002'")
            for path in (copied / "mlruns").glob(f"{store}*"):
                shutil.copy(path, cut / "mlruns")
            assert (cut / "mlruns" / f"{store}-wal").stat().st_size
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    for then in (LOOK, AND_RUN):
        run_without(f"{path}{COMMANDS}{then}", closed, mmap="ENODEV")


def test_stores_on_a_mounted_file_system_without_shared_memory(tmp_path: Path) -> None:
    with mounted_without_shared_memory(tmp_path) as mount:
        with closing(sqlite3.connect(mount / "plain.db")) as database, pytest.raises(sqlite3.OperationalError):
            assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)  # so it says, and cannot
            database.execute("CREATE TABLE t (n)")
        made = subprocess.run([sys.executable, "-c", TABLES], cwd=mount, capture_output=True, text=True)
        modes, sentence = made.stdout.splitlines()
        assert modes == "delete 2 2" and "several machines (fuse" in sentence


def test_only_the_processors_that_a_process_may_use_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; from caltech_sweep import machine; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "print(machine.cores(), machine.threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert asked.stdout == "1 1\n", asked.stderr
    for given, threads in (("3", 3), ("2,1", 2), (" 5 ", 5), ("0", machine.cores()), ("all", machine.cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert machine.threads() == threads


QUOTA = """
import os, sys
from pathlib import Path
from caltech_sweep import machine
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
os.sched_getaffinity = lambda process: range(64)  # as on a large machine
print(machine.cores())
"""


@contextmanager
def control_group(controller: str, *limits: tuple[str, str]) -> Iterator[Path]:
    """Yield a group below one with a limit: the first of these files that there is, or the last, and its text."""
    top = Path("/sys/fs/cgroup", controller)
    group = (top if top.is_dir() else top.parent) / f"caltech-sweep-{os.getpid()}"
    below = group / "below"
    try:
        below.mkdir(parents=True)  # a limit counts for the groups below it
        file, text = next((limit for limit in limits if (group / limit[0]).exists()), limits[-1])
        (group / file).write_text(text)
    except OSError:
        pytest.skip("no control group may be made here")
    try:
        yield below
    finally:
        below.rmdir()
        group.rmdir()


@pytest.mark.parametrize(("quota", "cores"), [(100_000, 1), (250_000, 3), (10_000, 1), (-1, 64)])
def test_the_quota_of_a_container_is_counted(quota: int, cores: int) -> None:
    limits = ("cpu.max", f"{quota if quota > 0 else 'max'} 100000"), ("cpu.cfs_quota_us", str(quota))
    with control_group("cpu", *limits) as group:
        asked = subprocess.run([sys.executable, "-c", QUOTA, str(group)], capture_output=True, text=True)
        assert asked.stdout == f"{cores}\n", asked.stderr


MEMORY = """
import os, sys
from pathlib import Path
from caltech_sweep import machine
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
whole, free = machine.memory(), machine.free_memory()
print(whole, 0 < free < whole)
"""


def test_the_memory_of_a_container_is_counted() -> None:
    limit = 512 << 20
    with control_group("memory", ("memory.max", str(limit)), ("memory.limit_in_bytes", str(limit))) as group:
        asked = subprocess.run([sys.executable, "-c", MEMORY, str(group)], capture_output=True, text=True)
        assert asked.stdout == f"{limit} True\n", asked.stderr


def test_the_doctor_says_what_the_machine_gives_and_what_would_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "CALTECH_SWEEP_DATA", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    cores = machine.cores()
    asked = ("doctor", "--machine", "--workers", "4", "--threads", str(cores))
    result = invoke(*asked)
    assert result.exit_code == 0 and not list(tmp_path.iterdir())
    found = dict(line.split(":", 1) for line in result.output.splitlines() if not line.startswith("faster"))
    assert found["processors"].split()[:3] == [str(cores), "of", str(os.cpu_count())]
    assert f"({len(os.sched_getaffinity(0))} by affinity" in found["processors"]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert float(found["memory"].split()[2]) <= memory + 0.1
    command = ["findmnt", "-no", "FSTYPE", "-T", str(tmp_path)]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert str(tmp_path) in found["cache"] and kind in found["cache"] and kind in found["study store"]
    threads = "1 thread" if cores == 1 else f"{cores} threads"
    processors = "1 processor" if cores == 1 else f"{cores} processors"
    advice = f"faster: 4 workers x {threads} on {processors} wait for each other; use --workers 1 --threads {cores}"
    assert advice in result.output
    for wrong in (("doctor", "--workers", "2"), ("doctor", "tiny", "--machine"), ("doctor", "--machine", "--fix")):
        assert invoke(*wrong).exit_code == 2
    server = invoke(*asked[:2], "--tracking-uri", "http://someone:secret@tracking.example")
    assert "on a server: http://" in server.output and "secret" not in server.output
    assert "wait for each other" not in server.output


def test_workers_take_the_threads_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from caltech_sweep.sweep.options import RunOptions, make_executor

    before = torch.get_num_threads()
    try:
        for options, threads in ((RunOptions(in_process=True), 2), (RunOptions(in_process=True, threads=1), 1)):
            monkeypatch.setenv("OMP_NUM_THREADS", "2")
            make_executor(options).close()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_workers_share_the_threads_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert [machine.threads_each(workers, on_gpus=True) for workers in (1, 3, 4, 32)] == [16, 5, 4, 1]
    assert machine.threads_each(4, on_gpus=False) == 16  # more workers change no weight


def in_a_terminal(code: str, **environment: str) -> str:
    """Run code in a new process that has a real terminal, and return what it shows there."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", code], {**os.environ, **environment})
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while block := os.read(terminal, 1 << 16):
            shown += block
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == 0, shown
    return shown.decode()


PROGRESS = """
import sys
import tempfile
from caltech_sweep.sweep.progress import showing
from caltech_sweep.text import progress_line
say = lambda line: print(line, file=sys.stderr)
with showing(say) as progress:
    progress.study_started("tiny", 0, 1)
    progress.trial_started(0, "First", 2)
    progress.epoch(0, 1, {"train/loss": 1.0, "val/accuracy": 0.5})
    progress.note("a note")
    progress.trial_ended(0, "First", "complete", "")
with progress_line("decoding images", say) as show:
    for done in range(1, 101):
        show(done, 100)
"""


@pytest.mark.parametrize("term", ["dumb", "unknown", "DUMB"])
def test_a_terminal_that_rewrites_no_line_gets_lines(term: str) -> None:
    shown = in_a_terminal(PROGRESS, TERM=term).splitlines()
    assert shown[:2] == ["study tiny: 0 of 1 trials done", "[0] First: started, 2 epochs"]
    assert "[0] First: epoch 1/2, train loss 1.000, val accuracy 0.500" in shown and "[0] First: complete" in shown
    assert sum(line.startswith("decoding images") for line in shown) == 11


def test_a_terminal_that_rewrites_lines_gets_a_table_and_a_log_file_never_does() -> None:
    assert "\x1b[" in in_a_terminal(PROGRESS, TERM="xterm")
    forced = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    logged = subprocess.run([sys.executable, "-c", PROGRESS], env=forced, capture_output=True, text=True)
    assert logged.returncode == 0 and "\x1b" not in logged.stderr and "[0] First: epoch 1/2" in logged.stderr


def test_a_home_folder_is_understood_wherever_a_path_is_given(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    draw(home / "photos")
    folder = ("--set", "dataset.name=folder", "--set", "dataset.val_fraction=0.3")
    study = home / "mine.yaml"
    shutil.copy(place / "sweeps" / "tiny.yaml", study)
    listed = invoke("data", "list", "--split", "test", "--data=~/photos")
    assert listed.exit_code == 0 and listed.stdout.count("class 1/") > 0, listed.output
    assert invoke("data", "list", "--split", "test", "--set", "dataset.root=~/photos").stdout == listed.stdout
    planned = invoke("plan", "~/mine.yaml", *folder, "--data=~/photos", "--tracking-uri=~/a.db", "--storage=~/b.db")
    assert planned.exit_code == 0, planned.output
    monkeypatch.setenv("CALTECH_SWEEP_DATA", "~/kept")
    assert str(home / "kept") in invoke("cache").stdout
    monkeypatch.setenv("CALTECH101_ROOT", "~/photos")
    assert str(home / "photos") in invoke("data").stderr
    weights = invoke("plan", "tiny", "--set", "weights=file:~/lost.safetensors")
    assert f"there is no file {home}/lost.safetensors" in weights.output
    assert f"{home}/lost.jpg" in invoke("data", "--from=~/lost.jpg").output
    for command in (
        ("plan", "tiny", "--data=~nobody-here/x"),
        ("plan", "~nobody-here/x.yaml"),
        ("data", "--from=~nobody-here/x"),
    ):
        refused = invoke(*command)
        assert refused.exit_code == 2 and "of a user that is not on this machine" in refused.output
    assert not [path for path in place.iterdir() if "~" in path.name]


def test_no_path_and_a_variable_that_no_shell_has_replaced_are_refused_and_never_a_folder_s_name(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(place.iterdir())
    for wrong in ("$SCRATCH/x", "${SCRATCH}", "%SCRATCH%/x", "%SCRATCH%\\x", ""):
        for command in (
            ("run", "tiny", "--in-process", f"--local-stores={wrong}"),
            ("run", "tiny", "--in-process", f"--cache={wrong}"),
            ("plan", "tiny", f"--data={wrong}"),
            ("data", f"--from={wrong}"),
            ("new", "mine", f"--from={wrong}"),
            ("predict", wrong),
        ):
            refused = invoke(*command)
            says = "that no shell has replaced; write what " if wrong else "a path is empty"
            assert refused.exit_code == 2 and says in refused.output, (command, refused.output)
    monkeypatch.setenv("CALTECH_SWEEP_DATA", "$SCRATCH/data")
    assert "'$SCRATCH/data' begins with a variable" in invoke("cache").output
    monkeypatch.setenv("CALTECH_SWEEP_DATA", "")  # as good as none
    assert "in data/reuse" in invoke("cache").output
    (place / "$SCRATCH").mkdir()
    assert sorted(place.iterdir()) == sorted([*before, place / "$SCRATCH"])
    monkeypatch.setenv("CALTECH_SWEEP_DATA", "$SCRATCH")  # a name that is there
    assert "in $SCRATCH/reuse" in invoke("cache").output


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_lacks_a_character_shows_it_as_an_escape(place: Path, encoding: str) -> None:
    draw(place / "photos")
    (place / "photos" / "class 1").rename(place / "photos" / "犬")
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text(encoding="utf-8").replace("A tiny study", "Ein 犬 für 3 €"), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    shown = ["studies"], ["data", "list", "--split", "test", "--data", "photos"], ["plan", "犬"]
    texts = ("Ein \\u72ac für 3 €", "犬/", "'\\udce7\\udc8a\\udcac'")
    for command, text in zip(shown, texts, strict=True):
        done = subprocess.run([sys.executable, "-m", "caltech_sweep", *command], env=environment, capture_output=True)
        assert b"Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr.decode()
        listed = "/" in text  # names of files, as the file system has them
        expected = text.encode() if listed else text.encode(encoding, "backslashreplace")
        taken_for_utf_8 = encoding == "ascii" and "犬".encode() in done.stdout  # click: such a locale is set by mistake
        assert expected in done.stdout + done.stderr or taken_for_utf_8


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def special_files(folder: Path, *names: str) -> None:
    """Put a pipe, a socket and a device into a folder, and a link to the pipe."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.mkfifo(folder / f"{name}pipe{Path(name).suffix}")
        (folder / f"{name}link").symlink_to(folder / f"{name}pipe{Path(name).suffix}")
        with socket.socket(socket.AF_UNIX) as opened, working_in(folder):  # the path of a socket is short
            opened.bind(f"{name}socket")
        with suppress(PermissionError):
            os.mknod(folder / f"{name}device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    for path in folder.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)


WITH_PIPES = """
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from caltech_sweep.data import load_dataset
from caltech_sweep.study.file import dataset_of
from caltech_sweep.sweep.session import _scratch
from caltech_sweep.training.cache import Cache
with ExitStack() as stack:
    print(_scratch(stack).parent)
load_dataset(dataset_of(None, [], "photos"))
cache = Cache(Path("data/reuse"), 10**6)
assert cache.write("stage-1", {}, 1, lambda path: path.write_bytes(b"x")) or cache.take_warnings()
cache.open("stage-2")
with cache.lock("stage-1"):
    cache.clear()
print("done")
"""


@pytest.mark.slow
def test_pipes_sockets_and_devices_in_shared_folders_stop_nobody(place: Path) -> None:
    draw(place / "photos")
    special_files(place / "tmp", "caltech-sweep-run-")
    special_files(place / "photos" / "class 1", "a", "b.png")
    special_files(place / "photos", "c")
    special_files(place / "data" / "reuse", ".new-", ".dropped-", "stage-")
    (place / "data" / "reuse" / "stage-2").mkdir()
    os.mkfifo(place / "data" / "reuse" / "stage-2" / "header.json")
    os.mkfifo(place / "data" / "reuse" / "stage-1")
    (place / "data" / "reuse" / "locks").mkdir()
    os.mkfifo(place / "data" / "reuse" / "locks" / "stage-1")
    code = [sys.executable, "-c", WITH_PIPES]
    environment = {**os.environ, "TMPDIR": str(place / "tmp")}
    for _ in range(2):  # the second with what the first has left, but for a pipe in the place of a cache
        done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"{place / 'tmp'}\ndone\n", done.stderr
        for header in (place / "data" / "cache").glob("*.json"):
            header.unlink()
            os.mkfifo(header)


AS_ANOTHER = """
import os, sys
from pathlib import Path
from PIL import Image
import caltech_sweep.cli, caltech_sweep.data.images, caltech_sweep.training.cache, caltech_sweep.study.file
import caltech_sweep.text, torch, numpy.random  # before the place of the interpreter is another user's
Image.init()
os.umask(int(sys.argv[2], 8))
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
sys.argv[1:] = sys.argv[3:]
exec(sys.stdin.read())
"""


def as_user(number: int, umask: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code here as a user of a number, of whom the machine has no name; skips where this user may not.

    The folder is also ``/mnt`` for that user, since the folders above it are this user's own.
    """
    mount = ["unshare", "-m", "sh", "-c", 'mount --bind . /mnt && cd /mnt && exec "$@"', "sh"]
    if os.geteuid() or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("only root may work as two users")
    command = [*mount, sys.executable, "-c", AS_ANOTHER, str(number), umask, *arguments]
    environment = {**os.environ, "HOME": "/nowhere", "TMPDIR": "/mnt"}
    return subprocess.run(command, input=code, env=environment, capture_output=True, text=True)


DECODE = """
import os, sys
from pathlib import Path
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import CaltechSweepError
from caltech_sweep.study.file import dataset_of
from caltech_sweep.training.cache import Cache
try:
    data = load_dataset(dataset_of(None, [], "photos"))
    cache = Cache(Path("data/reuse").resolve(), 10**6)
    for name in sys.argv[1:]:
        with cache.lock(name):
            if not cache.has(name):
                cache.write(name, {}, 4, lambda path: path.write_bytes(b"kept"))
        found = cache.open(name)
        print(found[1].read_bytes().decode() if found else "none")
    cache.entries()
    print(*cache.take_warnings(), len(data.split.train))
except CaltechSweepError as error:
    print(error)
"""


@pytest.fixture
def shared_folder(place: Path) -> Path:
    """A working folder that other users come into."""
    (draw(place / "photos").parent / "data").mkdir()
    (place / "data").chmod(0o1777)
    place.chmod(0o755)
    return place


@pytest.mark.slow
def test_a_cache_is_as_open_to_others_as_its_users_files_are(shared_folder: Path) -> None:
    first = as_user(65501, "022", DECODE, "stage-1")
    assert first.stdout.splitlines()[0] == "kept" and not first.stderr
    second = as_user(65502, "022", DECODE, "stage-1", "stage-2")
    kept, none, rest = second.stdout.splitlines()
    assert (kept, none) == ("kept", "none") and "nothing more is cached in" in rest and not second.stderr
    for file in (shared_folder / "data").rglob("*"):
        assert not file.is_file() or file.stat().st_mode & 0o777 == 0o644, file


@pytest.mark.slow
@pytest.mark.parametrize("umask", ["077", "027"])
def test_a_cache_that_is_its_users_own_is_a_sentence_for_another(shared_folder: Path, umask: str) -> None:
    assert as_user(65501, umask, DECODE, "stage-1").stdout.splitlines()[0] == "kept"
    second = as_user(65502, "022", DECODE, "stage-1")
    assert "image cache folder data/cache cannot be" in second.stdout and "CALTECH_SWEEP_DATA" in second.stdout
    assert not second.stderr and (shared_folder / "data" / "cache").exists()
    third = as_user(65502, "022", "from caltech_sweep.cli import main; main()", "cache")
    assert third.returncode == 0 and "0.00 GB in" in third.stdout and not third.stderr


@pytest.mark.slow
def test_a_group_shares_a_cache_that_it_may_write(shared_folder: Path) -> None:
    data = shared_folder / "data"
    data.chmod(0o2777)
    first = as_user(65501, "000", DECODE, "stage-1")
    second = as_user(65502, "000", DECODE, "stage-1", "stage-2")
    assert second.stdout.splitlines()[:2] in (["kept", "kept"],), (first.stdout, second.stdout, second.stderr)


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which ``caltech-sweep`` is this checkout's."""
    sweep = f"{sys.executable} -m caltech_sweep"
    given = {**os.environ, **environment}
    return subprocess.run(
        ["bash", "-c", command.replace("caltech-sweep", sweep)], env=given, capture_output=True, text=True
    )


LIST = "caltech-sweep data list --split test --set dataset.name=shapes --set dataset.resize=32"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["caltech-sweep studies", "caltech-sweep --help", LIST])
def test_an_output_that_takes_nothing_more_is_a_sentence_or_an_end_without_one(place: Path, command: str) -> None:
    full = shell(f"{command} > /dev/full")
    assert full.returncode == 2 and full.stderr == (
        "Error: the output cannot be written (No space left on device); free some disk space, or name another place\n"
    )
    assert (shell(f"{command} >&-").returncode, shell(f"{command} >&-").stderr) == (0, "")
    cut = shell(f"set -o pipefail; {command} | true")
    assert cut.stderr == "" and cut.returncode in (0, 1)
    assert shell(f"{command} 2>&-").stdout == shell(command).stdout != ""


@pytest.mark.slow
def test_a_folder_that_is_gone_is_a_sentence(place: Path) -> None:
    for command in ("caltech-sweep studies", "caltech-sweep report", "caltech-sweep plan tiny"):
        gone = shell(f"mkdir gone && cd gone && rmdir ../gone && {command}")
        assert gone.returncode == 2 and gone.stdout == ""
        assert gone.stderr == "Error: the folder of this command is gone; change into one that is there\n"


@pytest.mark.slow
def test_streams_that_are_closed_cost_no_command_anything(place: Path) -> None:
    closed = shell("caltech-sweep run tiny --threads 1 --row First <&- >&- 2>&-")
    assert closed.returncode == 0
    assert "| First |" in shell("caltech-sweep report").stdout
    report = shell("caltech-sweep report >&-")
    assert (report.returncode, report.stderr) == (0, "")


def test_too_many_open_files_are_a_sentence(place: Path) -> None:
    assert invoke("studies").exit_code == 0 and tempfile.gettempdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # nothing can be opened any more
    try:
        full = invoke("studies")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    says = "Error: too many files are open; allow more, such as with `ulimit -n 4096`\n"
    assert (full.exit_code, full.output) == (2, says)


RUN = [sys.executable, "-m", "caltech_sweep", "run", "tiny", "--threads", "1", "--set", "epochs=60", "--row", "First"]


def check_stopped(place: Path) -> None:
    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None and tracker.status(study.run_id) == "KILLED"
    assert [(trial.status, trial.outcome) for trial in tracker.trials(study)] == [("KILLED", "interrupted")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=["hangup", "terminate"])
def test_a_signal_to_the_whole_group_leaves_nothing_running(place: Path, number: signal.Signals) -> None:
    with subprocess.Popen(RUN, stderr=subprocess.PIPE, text=True, cwd=place, start_new_session=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "epoch 6/60" in line)
        os.killpg(process.pid, number)
        rest = process.stderr.read()
    assert process.returncode == 130 and "interrupted, waits for the next run" in rest and "tried again" not in rest
    check_stopped(place)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_that_is_closed_leaves_nothing_running(place: Path, term: str) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, RUN, {**os.environ, "TERM": term})
    shown = b""
    while b"First: started" not in shown and b"First" not in shown[-2000:]:
        shown += os.read(terminal, 1 << 16)
    while not re.search(rb"([6-9]|[1-5]\d)/60", shown):
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)  # the system sends SIGHUP, and every later write fails
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    check_stopped(place)


@pytest.mark.slow
def test_a_run_that_was_started_with_nohup_outlives_its_terminal(place: Path) -> None:
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", code, *RUN, "--set", "epochs=8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place, start_new_session=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "epoch 2/8" in line)
        os.killpg(process.pid, signal.SIGHUP)
        rest = process.stderr.read()
    assert process.returncode == 0 and "study tiny: 1 complete" in rest


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_study(place: Path) -> None:
    with subprocess.Popen([*RUN, "--set", "epochs=4"], stderr=subprocess.PIPE, text=True, cwd=place) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "started" in line)
        process.stderr.close()
    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None and [trial.outcome for trial in tracker.trials(study)] == ["complete"]


FAULTS = """
import resource, sys, torch
from caltech_sweep.machine import keeps_freed_memory
torch.set_num_threads(1)
print(keeps_freed_memory() if sys.argv[1] == "kept" else None)
def step():
    for size in (1 << 20, 3 << 20, 9 << 20):
        torch.ones(size)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc")
def test_memory_that_a_training_step_frees_is_there_for_the_next_one() -> None:
    def faults(mode: str, **variables: str) -> tuple[str, int]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
        output = subprocess.run(
            [sys.executable, "-c", FAULTS, mode], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        return output[0], int(output[1])

    kept, usual, own = faults("kept"), faults("usual"), faults("kept", MALLOC_ARENA_MAX="2")
    assert kept[0] == "True" and kept[1] < usual[1] / 100
    assert own[0] == "False" and own[1] > usual[1] / 2  # what the user has set stays
