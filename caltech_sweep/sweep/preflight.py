"""Everything that is checked before a study writes anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_sweep import machine, paths
from caltech_sweep.artifacts import CHECKPOINT
from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import CaltechSweepError, UsageError
from caltech_sweep.stores import Store, study_store, tracking_store
from caltech_sweep.study.definition import StudyDefinition, variants
from caltech_sweep.study.file import weights_key
from caltech_sweep.study.site import within
from caltech_sweep.sweep.options import RunOptions
from caltech_sweep.sweep.optuna_store import by_content, check_resumable
from caltech_sweep.sweep.survey import Weights, digested
from caltech_sweep.text import suggestion
from caltech_sweep.tracking.writer import MlflowTracker, nothing_complete

if TYPE_CHECKING:
    from caltech_sweep.data.images import LoadedData


def find_weights(definition: StudyDefinition, tracking: Store) -> Weights:
    """Resolve every ``file:``, ``run:`` and ``study:`` of a study to a file, its contents and the run it is of."""
    found: Weights = {}
    for config in variants(definition, ("weights",)):
        kind, _, name = config.weights.partition(":")
        if kind not in ("file", "run", "study") or config.weights in found:
            continue
        if kind == "file":
            found[config.weights] = digested(paths.expanded(name))
            continue
        if kind == "study" and tracking.is_missing:
            raise nothing_complete(name, tracking)
        tracker = MlflowTracker(tracking)
        near = within(definition.name.rpartition("/")[0], name)  # a study of the same namespace comes first
        if kind == "study" and near is not None and near != name and tracker.study(near) is not None:
            name = near
        run_id = tracker.best_trial(name).run_id if kind == "study" else name
        found[config.weights] = digested(tracker.checked_artifact(run_id, CHECKPOINT), run_id)
    return found


def _check_rows(definition: StudyDefinition, rows: tuple[str, ...]) -> None:
    names = [row.name for row in definition.rows]
    for name in rows:
        if name not in names:
            raise UsageError(f"--row: study {definition.name!r} has no row {name!r}{suggestion(name, names)}")


def cache_place(options: RunOptions) -> tuple[Path, str | None]:
    """Return the folder of what trials share on this machine, and the address that it is a copy of, if it is one."""
    given = options.cache
    if given is not None and "://" not in given:
        return paths.expanded(given).resolve(), None
    return paths.cache_folder().resolve(), given


def check_options(definition: StudyDefinition, options: RunOptions) -> tuple[Store, Store]:
    """Return the tracking and the study store.

    Raises UsageError for options that no run takes, StoreError for a store that cannot be written.
    """
    _check_rows(definition, options.rows)
    if options.executor != "ray" and options.device not in (None, "cpu"):
        from caltech_sweep.training.device import pick_device

        pick_device(options.device)
    if url := cache_place(options)[1]:
        from caltech_sweep.training.mirror import check_address

        check_address(url)
    tracking, storage = tracking_store(options.tracking_uri), study_store(options.storage)
    if tracking.is_same(storage):
        raise UsageError("--storage: MLflow and Optuna cannot share one database; name another file")
    tracking.check_writable()
    storage.check_writable()
    if options.resume_trials and (options.rows or options.confirm):
        raise UsageError("--resume-trial: runs nothing but the trials it names; leave --row and --confirm out")
    check_resumable(definition.name, storage, options.resume_trials)
    return tracking, storage


def identity_of(
    definition: StudyDefinition, fingerprint: str, weights: Weights, networks: Mapping[str, str]
) -> dict[str, Any]:
    """Return what must stay the same of a study under its name: its definition, images, weights and networks."""
    initial = {name: source.digest for name, source in weights.items()}
    known = by_content(definition.identity(), weights)
    own = {"networks": dict(networks)} if networks else {}
    return {**known, "images": fingerprint, "initial_weights": initial, **own}


def kept_epochs(options: RunOptions, data: LoadedData | None, weights: Weights | None) -> Callable[[TrialConfig], int]:
    """Return what tells how many epochs of a trial are kept from earlier trials of any study."""
    if data is None or weights is None or not options.reuse or options.address is not None:
        return lambda config: 0  # what other machines keep is not known here
    import torch

    from caltech_sweep.training.checkpoints import stored_epochs
    from caltech_sweep.training.device import pick_device
    from caltech_sweep.training.keys import CacheOptions

    torch.set_num_threads(options.threads or machine.threads())
    device, use = pick_device(options.device), CacheOptions(cache_place(options)[0], 0, together=options.together > 1)

    def kept(config: TrialConfig) -> int:
        try:
            source = weights.get(weights_key(config))
            return stored_epochs(config, data, device, source.path if source else None, use)
        except CaltechSweepError:  # weights that are not there; the run is refused for that anyway
            return 0

    return kept
