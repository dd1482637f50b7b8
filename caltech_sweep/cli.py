"""Commands: each parses its arguments and calls a plain function; heavy imports stay inside them."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from caltech_sweep import __version__
from caltech_sweep.errors import CaltechSweepError
from caltech_sweep.metrics import BEST_ACCURACY

MOST = 1_000_000  # of whatever is counted

if TYPE_CHECKING:
    from caltech_sweep.stores import Store
    from caltech_sweep.study.definition import StudyDefinition

RENAMED = {"--stage-budget": "--cache-size"}  # options of earlier versions
# Errors of files that no program can help, wherever they come up, and what a person can do.
_OF_A_DISK = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ask its owner for access to it, or name another place"),
    errno.EROFS: "name another place",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some disk space, or name another place"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check that its disk or server works, then run the command again"),
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOTDIR: "a part of its path is a file; move that away, or name another place",
    errno.ELOOP: "remove the links that lead in a circle",
}


class _Path(click.Path):
    """A path on the command line: a ~ that the shell has left, as in --data=~/photos, is the home folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from caltech_sweep.paths import expanded

        try:
            return super().convert(str(expanded(value)) if isinstance(value, str) else value, param, ctx)
        except CaltechSweepError as error:
            self.fail(str(error), param, ctx)


class _Data(_Path):
    """The path of a dataset, or the address of its archive."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


class _Group(click.Group):
    """Turns every error that is written for the user into a sentence and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        from caltech_sweep.study.site import settings

        context.default_map = dict.fromkeys(self.commands, settings())
        try:
            return super().invoke(context)
        except click.NoSuchOption as error:
            if (new := RENAMED.get(error.option_name)) is None:
                raise
            raise click.UsageError(f"{error.option_name} is called {new} now.", error.ctx) from error

    def main(self, *arguments: Any, **named: Any) -> Any:
        atexit.register(_leave)  # the first that is registered comes last
        _open_closed_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is shown as \\u2265
                stream.reconfigure(errors="backslashreplace")
        try:
            if not _is_there(Path.cwd):
                raise CaltechSweepError("the folder of this command is gone; change into one that is there")
            return super().main(*arguments, **named)
        except CaltechSweepError as error:
            _say(f"Error: {error}")
            sys.exit(error.exit_code)
        except MemoryError as error:
            _say(f"Error: out of memory ({error}); use fewer or smaller images, or more memory")
            sys.exit(1)
        except OSError as error:
            sentence = _of_a_disk(error)
            if sentence is None:
                raise
            _say(f"Error: {sentence}")
            sys.exit(CaltechSweepError.exit_code)
        except Exception as error:
            from caltech_sweep.stores import failure

            told = failure(error)
            if told is None:
                raise
            _say(f"Error: {told}")
            sys.exit(told.exit_code)


def _leave() -> None:
    """Let the system have the memory of a process that ends: to look through it for cycles takes half a second.

    Not where torch is, whose bindings take what is not freed for leaks and say so.
    """
    if "torch" not in sys.modules:
        gc.freeze()


def _open_closed_streams() -> None:
    """Lead standard streams that are closed to nowhere: else the next file has their number, and gets what is said."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)  # for the workers
            setattr(sys, name, os.fdopen(number, mode))


def _is_there(folder: Callable[[], object]) -> bool:
    try:
        folder()
    except FileNotFoundError:
        return False
    return True


def _of_a_disk(error: OSError) -> str | None:
    """Return the sentence about an error of a file, or of the output, that no program can help; None for any other."""
    from caltech_sweep.text import one_line, readable

    if not _is_there(tempfile.gettempdir):
        return "temporary files cannot be written; name a folder for them with the environment variable TMPDIR"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open; allow more, such as with `ulimit -n 4096`"
    if error.errno not in _OF_A_DISK:
        return None
    if not error.filename:  # what it has not taken is not tried again at the end
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    what = (
        f"{one_line(readable(str(error.filename)), 200)} cannot be used"
        if error.filename
        else "the output cannot be written"
    )
    return f"{what} ({error.strerror}); {_OF_A_DISK[error.errno]}"


def _say(line: str) -> None:
    with suppress(OSError):  # a terminal or a pipe that was closed: a study goes on, or ends as it is to end
        click.echo(line, err=True)


def _emit(text: str, out: Path | None) -> None:
    """Print text, or write it to a file; raise CaltechSweepError when that cannot be written."""
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CaltechSweepError(f"--out: {out} cannot be written: {error.strerror}") from error


class _Number(click.FloatRange):
    """A range of numbers without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class _PerDevice(click.ParamType[int | None]):
    """A number of workers, or None for ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "auto" else click.IntRange(1, 1000).convert(value, param, ctx)


def _tracking(context: click.Context, option: click.Parameter, address: str | None) -> Store:
    from caltech_sweep.stores import VARIABLE, tracking_store

    if os.environ.get(VARIABLE) and context.get_parameter_source(option.name or "") is ParameterSource.DEFAULT_MAP:
        address = None
    return tracking_store(address)


def _storage(context: click.Context, option: click.Parameter, address: str | None) -> Store:
    from caltech_sweep.stores import study_store

    return study_store(address)


def _slots(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "max" and not (value.isdecimal() and 0 < int(value) <= MOST):
        raise click.BadParameter(f"{value!r} is neither max nor a number of at least 1.", context, option)
    return value


tracking_option = click.option(
    "--tracking-uri", callback=_tracking, help="MLflow store; default MLFLOW_TRACKING_URI or mlruns/mlflow.db."
)
storage_option = click.option(
    "--storage", callback=_storage, help="Optuna store, such as sqlite:///other.db; default mlruns/optuna.db."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Fix a setting for this run, such as lr=0.01."
)
trials_option = click.option("--trials", type=click.IntRange(1, MOST), help="Trials in total, rows included.")
data_option = click.option(
    "--data",
    type=_Data(),
    metavar="FOLDER|URL",
    help="Folder of class folders, or the address of a zip or tar with one; default CALTECH101_ROOT or data/.",
)
device_option = click.option(
    "--device", help="Device for all trials, such as cpu or cuda:1 (default: all GPUs, else the CPU)."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 10_000), help="Torch threads of each worker; default all cores, on GPUs shared."
)
together_option = click.option(
    "--together",
    type=click.IntRange(1, 1000),
    default=1,
    metavar="N",
    help="Trials that a worker trains at once where they only train a linear classifier on frozen layers: as one "
    "matrix product, with the result of each by itself but for rounding (default: 1).",
)
row_option = click.option("--row", "rows", multiple=True, metavar="NAME", help="Run only this row; may be repeated.")
resume_option = click.option(
    "--resume-trial",
    "resume_trials",
    multiple=True,
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="Run only the paused trial with this number, to its end; may be repeated.",
)
replicates_option = click.option(
    "--replicates", type=click.IntRange(1, 10_000), help="Number of seeds per row (default: from the study file)."
)
namespace_option = click.option(
    "--namespace",
    envvar="CALTECH_SWEEP_NAMESPACE",
    metavar="NAME",
    help="Put NAME/ before a study's name that has no slash, such as your own on servers of many people; default also "
    "CALTECH_SWEEP_NAMESPACE.",
)
name_option = click.option("--name", help="Store the study under another name.")
budget_option = click.option(
    "--budget",
    multiple=True,
    metavar="KEY=NUMBER",
    help="End the study within epochs=N or hours=N, counting what it spent before (default: from the study file).",
)


verify_option = click.option(
    "--verify", is_flag=True, help="Read every image file and the whole image cache again, not only their times."
)


def _load(study: str, options: dict[str, Any]) -> StudyDefinition:
    """Return a study, changed by the options that change it, which are taken out of ``options``."""
    from caltech_sweep.study.file import find_study, load_study
    from caltech_sweep.study.site import within

    changes = {key: options.pop(key) for key in ("trials", "data", "name", "replicates", "budget")}
    if namespace := options.pop("namespace"):
        name = changes["name"]
        changes["name"] = within(namespace, find_study(study).stem if name is None else name)
    return load_study(study, options.pop("overrides"), **changes)


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that change a study before it is used, and say where it is tracked."""
    more = (name_option, data_option, budget_option, trials_option, set_option)
    for option in (tracking_option, namespace_option, *more):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="caltech-sweep")
def main() -> None:
    """Sweep, track and report image-classifier trainings."""


@main.command()
@click.argument("study")
@study_options
@storage_option
@click.option(
    "--adopt",
    is_flag=True,
    help="Take the study over from another study store, such as a lost one: rebuild it from its runs.",
)
@click.option("--workers", type=click.IntRange(1, 1000), help="Worker processes (default: one per GPU, or one).")
@click.option(
    "--per-device",
    type=_PerDevice(),
    default=1,
    help="Workers that share a GPU; auto: as many as its memory has room for after the first epoch, up to four.",
)
@together_option
@device_option
@threads_option
@row_option
@resume_option
@replicates_option
@click.option(
    "--confirm", type=click.IntRange(0, 10_000), default=0, metavar="K", help="Repeat the K best on fresh seeds."
)
@verify_option
@click.option("--reuse/--no-reuse", default=True, show_default=True, help="Share epochs and features between trials.")
@click.option(
    "--cache-size",
    type=_Number(0),
    metavar="GB",
    help="Disk for what is shared.",
)
@click.option(
    "--cache",
    metavar="FOLDER|URL",
    help="Keep what is shared where every node of a cluster has it: in a folder that all see, or at an address "
    "such as s3://bucket/states (default: below the data folder).",
)
@click.option(
    "--local-stores",
    type=_Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep the stores in FOLDER, on this machine's own disk, and copy them to their place after every trial: for "
    "stores on a network mount, such as Drive on Colab.",
)
@click.option(
    "--hang-timeout",
    type=_Number(30),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Kill a worker that was silent for this long, and try its trial again.",
)
@click.option(
    "--max-failures",
    type=click.IntRange(1, MOST),
    default=5,
    show_default=True,
    help="Stop after this many trials in a row that crashed, ran out of memory or met bad data.",
)
@click.option("--in-process", is_flag=True, help="Train in this process, for debugging.")
@click.option(
    "--executor",
    type=click.Choice(["processes", "ray"]),
    default="processes",
    show_default=True,
    envvar="CALTECH_SWEEP_EXECUTOR",
    help="Train in processes of this machine, or on a Ray cluster; default also CALTECH_SWEEP_EXECUTOR.",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Of the Ray cluster, which this machine is a node of (default: a private one on this machine).",
)
@click.option(
    "--slots",
    callback=_slots,
    metavar="N|max",
    help="Trials at once on the Ray cluster (default: max, as many as it has room for).",
)
@click.option(
    "--upload-from-workers",
    is_flag=True,
    help="Let the nodes of the Ray cluster send artifacts to the tracking server by themselves.",
)
@click.option(
    "--cpus-per-trial",
    type=_Number(0.01),
    metavar="CPUS",
    help="CPUs of a Ray node for each trial (default: --threads, or all of a node; 1 with a GPU).",
)
@click.option(
    "--gpus-per-trial",
    type=_Number(0),
    metavar="GPUS",
    help="GPUs for each trial, also a fraction (default: 1 where the cluster has GPUs).",
)
def run(study: str, **options: Any) -> None:
    """Run STUDY, a name in sweeps/ or a path, to its total of trials.

    The exit code is 0 when every trial ran or diverged by its own settings, 1 when one failed for another reason or
    the study stopped after --max-failures, 2 for wrong input, and 130 after a stop by Ctrl-C.

    Example: caltech-sweep run transfer --trials 20 --workers 2
    """
    definition = _load(study, options)
    from caltech_sweep.sweep.options import OF_RAY, RunOptions, started

    source = click.get_current_context().get_parameter_source
    for name in OF_RAY if options["executor"] != "ray" else ():
        if source(name) is ParameterSource.DEFAULT_MAP:  # the site's are for when its cluster is used
            options[name] = getattr(RunOptions, name)
    chosen = RunOptions(**options)
    with started(chosen, _say) as begun:  # they import what they need while this process does
        from caltech_sweep.sweep.session import run_study

        summary = run_study(definition, chosen, _say, begun)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(summary.outcomes.items())) or "nothing to do"
    _say(f"study {definition.name}: {counts}")
    if summary.stopped:
        _say(summary.stopped)
        sys.exit(1)
    if not summary.complete:
        _say("stopped; run the same command to resume")
        sys.exit(130)
    _say(f"see the tables with: caltech-sweep report {definition.name}")
    if summary.failures:
        sys.exit(1)


@main.command()
@click.argument("study")
@study_options
@storage_option
@together_option
@device_option
@threads_option
@row_option
@replicates_option
@verify_option
def plan(study: str, **options: Any) -> None:
    """Say what running STUDY would train, without training, downloading or writing anything.

    The exit code is 0 when run with the same options would start. Else it is 2, standard error says why, and what can
    be planned without the images is still printed. Only run finds an image that is damaged behind its header.

    Example: caltech-sweep plan transfer
    """
    definition = _load(study, options)
    from caltech_sweep.sweep.options import RunOptions
    from caltech_sweep.sweep.plan import plan_study

    done = plan_study(definition, RunOptions(**options))
    click.echo(done.text)
    for problem in done.problems:
        _say(f"Error: run would not start: {problem}")
    if done.problems:
        sys.exit(done.problems[0].exit_code)


@main.command()
@click.argument("study")
@click.option(
    "--from",
    "source",
    type=_Path(path_type=Path),
    required=True,
    help="A folder of class folders, or of train, val and test folders; or a csv file of paths and labels.",
)
def new(study: str, source: Path) -> None:
    """Look at images of your own and write a commented study file for them, sweeps/STUDY.yaml, that runs as it is.

    Example: caltech-sweep new flowers --from ~/photos/flowers
    """
    from caltech_sweep.sweep.new import ARCH, describe, write_study
    from caltech_sweep.training.networks import source_of

    path, found = write_study(study, source, source_of(ARCH).published_file(ARCH) is not None)
    for line in describe(found):
        click.echo(line)
    click.echo(f"wrote {path}")
    _say(f"see what it would train with: caltech-sweep plan {study}")


@main.command()
def studies() -> None:
    """List the study files in sweeps/.

    Example: caltech-sweep studies
    """
    from caltech_sweep.study.file import list_studies, load_study

    for study in list_studies():
        try:
            definition = load_study(study)
        except CaltechSweepError as error:
            click.echo(f"{study:20} cannot be read: {str(error).splitlines()[0]}")
            continue
        count = f"{len(definition.rows)} rows, {definition.trials} trials"
        click.echo(f"{study:20} {count:22} {definition.title}")


@main.command()
@click.argument("studies", nargs=-1)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["markdown", "html", "latex", "csv", "json"]),
    help="Default: markdown; on a terminal, tables that fit its width.",
)
@click.option("--out", type=_Path(dir_okay=False, path_type=Path), help="Write to a file instead.")
@click.option(
    "--best", type=click.IntRange(0, MOST), default=3, show_default=True, help="Sampled trials below the rows."
)
@click.option("--all", "everything", is_flag=True, help="List every trial, with its epochs, its time and how it ended.")
@click.option("--check", is_flag=True, help="Exit with 1 when a row is outside its tolerance of the reference.")
@click.option("--compare", nargs=2, metavar="ROW ROW", help="Rows that the page compares class by class.")
@data_option
@namespace_option
@tracking_option
def report(
    studies: tuple[str, ...],
    kind: str | None,
    out: Path | None,
    best: int,
    everything: bool,
    check: bool,
    compare: tuple[str, str] | None,
    data: str | None,
    namespace: str | None,
    tracking_uri: Store,
) -> None:
    """Print the comparison tables of STUDIES, or of all, from the tracking store only.

    The format html is a whole page that opens offline: tables, curves, the search, confusion matrices, classes, and
    the images that were most confidently wrong, from the dataset's folder where it is there. The formats csv and json
    always list every trial.

    Example: caltech-sweep report transfer --format html --out transfer.html
    """
    from caltech_sweep.report.build import lists_all, load_tables, render
    from caltech_sweep.report.check import outside
    from caltech_sweep.study.site import within

    studies = tuple(name for study in studies or (None,) if (name := within(namespace, study)) is not None)
    if kind == "html":
        from caltech_sweep.report.page.assemble import build_page
        from caltech_sweep.report.page.importance import weigh
        from caltech_sweep.report.page.section import Options

        page = build_page(studies, Options(best, compare, data, weigh, everything), tracking_uri)
        tables, text = list(page.tables), page.html
    else:
        tables = load_tables(studies, best, tracking_uri, everything or lists_all(kind))
        width = shutil.get_terminal_size().columns if kind is None and out is None and sys.stdout.isatty() else None
        text = render(tables, kind or "markdown", everything, width)
    problems = outside(tables, explicit=bool(studies)) if check else []
    _emit(text, out)
    for problem in problems:
        _say(problem)
    if problems:
        sys.exit(1)


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@tracking_option
def ui(port: int, host: str, tracking_uri: Store) -> None:
    """Serve the MLflow UI on the tracking store.

    Example: caltech-sweep ui --port 5001
    """
    from caltech_sweep.tracking.ui import serve

    serve(host, port, tracking_uri)


@main.command()
@click.option("--clear", is_flag=True, help="Remove everything that is kept.")
def cache(clear: bool) -> None:
    """Show, or clear, the training states and frozen features that trials share.

    Example: caltech-sweep cache --clear
    """
    from caltech_sweep import paths
    from caltech_sweep.training.cache import Cache, default_budget

    folder = paths.cache_folder()
    store = Cache(folder, 0)
    if clear:
        click.echo(f"freed {store.clear() / 1e9:.2f} GB in {folder}")
        return
    for entry in store.entries():
        held = "  held for a paused trial" if entry.held else ""
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}"
        click.echo(f"{entry.bytes / 1e6:10.1f} MB  {used}  {entry.name}{held}")
    click.echo(f"{store.size() / 1e9:.2f} GB in {folder}; by default at most {default_budget(folder) / 1e9:.2f} GB")


@main.group(invoke_without_command=True)
@click.option("--from", "source", type=_Path(path_type=Path), help="A folder, .tar.gz or .zip of your own.")
@click.option("--url", help="Where to download from instead of the public archive.")
@click.pass_context
def data(context: click.Context, source: Path | None, url: str | None) -> None:
    """Get Caltech-101: download, verify and unpack it, or take a copy of your own.

    Example: caltech-sweep data --from 101_ObjectCategories.tar.gz
    """
    if context.invoked_subcommand is not None:
        return
    from rich import filesize

    from caltech_sweep.data.fetch.archive import fetch
    from caltech_sweep.text import progress_line

    with progress_line("downloading", _say, filesize.decimal) as progress:
        root = fetch(source, url, progress)
    click.echo(f"Caltech-101 is in {root}")


@data.command("list")
@click.argument("study", required=False)
@click.option("--split", "part", type=click.Choice(["train", "val", "test"]), required=True)
@click.option("--format", "kind", type=click.Choice(["csv"]), default="csv", show_default=True)
@set_option
@data_option
def data_list(study: str | None, part: str, kind: str, overrides: tuple[str, ...], data: str | None) -> None:
    """Print the images of one part as path,class lines: of STUDY's dataset, or without it of a folder.

    A folder is Caltech-101 where it has a BACKGROUND_Google, and else any folder of class folders; --set sets another
    part of a dataset, such as dataset.name=shapes or dataset.val_fraction=0.2.

    Example: caltech-sweep data list --split test --data photos > test.csv
    """
    import csv
    import io

    from caltech_sweep.data import dataset_root, load_split
    from caltech_sweep.study.file import dataset_of

    config = dataset_of(study, overrides, data)
    root, split = dataset_root(config), load_split(config)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    for item in split.part(part):
        writer.writerow([(item.path.relative_to(root) if root else item.path).as_posix(), item.class_name])
    # names as the file system has them, whatever the locale is
    click.echo(lines.getvalue().encode("utf-8", "surrogateescape"), nl=False)
    if split.passed_over:
        _say(f"passed over: {split.passed_over}")


@main.command()
@click.argument("study")
@click.option("--run", "run_id", metavar="RUN_ID", help="Promote this trial instead of the best on validation.")
@click.option("--name", help="Name of the registered model; default the study's name.")
@click.option("--alias", default="champion", show_default=True, help="Alias that is moved to the new version.")
@namespace_option
@tracking_option
def promote(
    study: str, run_id: str | None, name: str | None, alias: str, namespace: str | None, tracking_uri: Store
) -> None:
    """Log the best-on-val trial of STUDY as an MLflow model, register it and move the alias to it.

    Example: caltech-sweep promote transfer
    """
    from caltech_sweep.serving.promote import promote as promote_study
    from caltech_sweep.study.site import within

    done = promote_study(within(namespace, study) or study, run_id, name, alias, tracking_uri)
    accuracy = done.trial.metrics.get(BEST_ACCURACY, float("nan"))
    click.echo(
        f"{done.name} version {done.version} is now {done.name}@{done.alias}: trial {done.trial.name!r} "
        f"(run {done.trial.run_id}), validation accuracy {accuracy:.4f}"
    )
    _say(f"use it with: caltech-sweep predict IMAGE... --model {done.name}@{done.alias}")


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=_Path(path_type=Path))
@click.option(
    "--model", metavar="MODEL", help="NAME@ALIAS, NAME/VERSION or a RUN_ID; default the store's only champion."
)
@click.option("--top", type=click.IntRange(1, MOST), default=3, show_default=True, help="Classes of each image.")
@click.option(
    "--batch-size", type=click.IntRange(1, MOST), default=64, show_default=True, help="Images computed at once."
)
@click.option("--format", "kind", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@click.option("--device", help="Such as cpu or cuda:1; default the GPU, or the CPU.")
@click.option("--allow-pickle", is_flag=True, help="Load a run's pickled weights, which can run code.")
@tracking_option
def predict(
    images: tuple[Path, ...],
    model: str | None,
    top: int,
    batch_size: int,
    kind: str,
    device: str | None,
    allow_pickle: bool,
    tracking_uri: Store,
) -> None:
    """Print the most probable classes of each IMAGE; a folder means the image files in and below it.

    An image that cannot be read is named on standard error, the others are predicted, and the exit code is 2.

    Example: caltech-sweep predict photo.jpg --model transfer@champion
    """
    from caltech_sweep.serving.predict import find_images, format_predictions, predict_files
    from caltech_sweep.serving.registry import open_model

    files = list(find_images(images))
    classifier = open_model(model, tracking_uri, device, allow_pickle)
    broken: list[str] = []

    def complain(problem: str) -> None:
        broken.append(problem)
        _say(f"Error: {problem}")

    for line in format_predictions(kind, predict_files(classifier, files, top, batch_size, complain), files):
        click.echo(line)
    if broken:
        sys.exit(CaltechSweepError.exit_code)


@main.command()
@click.argument("study", required=False)
@click.option("--fix", is_flag=True, help="Fix what can be fixed; without it nothing is changed.")
@click.option("--machine", "around", is_flag=True, help="Say what a run finds on this machine, and what is faster.")
@click.option("--workers", type=click.IntRange(1, 1000), help="With --machine: workers of the run that is asked about.")
@threads_option
@namespace_option
@tracking_option
@storage_option
def doctor(
    study: str | None,
    fix: bool,
    around: bool,
    workers: int | None,
    threads: int | None,
    namespace: str | None,
    tracking_uri: Store,
    storage: Store,
) -> None:
    """Compare the two stores of STUDY, or of every study, and their artifacts; say what is wrong, and fix it.

    The exit code is 0 when nothing is left to fix, else 1. A study that is being run, or that belongs
    to another study store, is skipped. Without STUDY the caches of decoded images are checked, too.

    With --machine no study is looked at, and the exit code is 0.

    Example: caltech-sweep doctor --fix
    """
    if around and (study or fix) or not around and (workers or threads):
        raise click.UsageError("--machine takes no STUDY and no --fix, and --workers and --threads are for --machine")
    if around:
        from caltech_sweep.sweep.surroundings import lines, look_around

        for line in lines(look_around(tracking_uri, storage, workers, threads)):
            click.echo(line)
        return
    from caltech_sweep.study.site import within
    from caltech_sweep.sweep.doctor import examine
    from caltech_sweep.text import counted

    diagnosis = examine(within(namespace, study), tracking_uri, storage, fix, click.echo)
    skipped = f", {diagnosis.skipped} skipped" if diagnosis.skipped else ""
    examined = counted(diagnosis.studies, "study", "studies")
    click.echo(f"{examined} examined{skipped}: {diagnosis.found} found, {diagnosis.fixed} fixed")
    if not diagnosis.healthy:
        if not fix:
            _say("fix what can be fixed with: caltech-sweep doctor --fix")
        sys.exit(1)


@main.command()
@click.argument("study", required=False)
@namespace_option
@tracking_option
@storage_option
def status(study: str | None, namespace: str | None, tracking_uri: Store, storage: Store) -> None:
    """Say which studies are being run, or how far STUDY is: who runs it, each trial, where, and how long it takes.

    Example: caltech-sweep status
    """
    from caltech_sweep.study.site import within
    from caltech_sweep.sweep.status import status as lines

    for line in lines(within(namespace, study), tracking_uri, storage):
        click.echo(line)


@main.command()
@tracking_option
@click.option(
    "--storage", callback=_storage, help="Optuna store, next to which the journals are; default mlruns/optuna.db."
)
def replay(tracking_uri: Store, storage: Store) -> None:
    """Upload results that were kept while the tracking store was down. The next run of the study does this, too.

    Example: caltech-sweep replay
    """
    from caltech_sweep.sweep.session import replay as replay_all

    if not replay_all(tracking_uri, storage, _say):
        sys.exit(1)
