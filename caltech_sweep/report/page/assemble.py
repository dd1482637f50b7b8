"""The report as one page that opens offline: tables, curves, the search, confusions, classes, wrong images.

Nothing is fetched: style, script, drawings and thumbnails are inside, and the page's own policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from caltech_sweep.report.build import choose
from caltech_sweep.report.grid import one_line
from caltech_sweep.report.model import Table
from caltech_sweep.report.page import curves
from caltech_sweep.report.page.comparison import Comparison, _comparison
from caltech_sweep.report.page.section import POINTS, Curves, Options, Section, _across, _named, _section
from caltech_sweep.report.render import anchors
from caltech_sweep.report.tables import build_table, told_apart
from caltech_sweep.stores import Address, Store
from caltech_sweep.tracking.history import read_histories, read_moments
from caltech_sweep.tracking.reader import open_reader

LOCAL_UI = "http://127.0.0.1:5000"  # where `caltech-sweep ui` serves a local store

POINTS_OF_A_SERVER = 200  # sampled trials whose epochs are read one by one
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # what neither HTML nor a file can hold


@dataclass(frozen=True)
class Page:
    """A page, and the tables in it."""

    html: str
    tables: tuple[Table, ...]


# -- one study ---------------------------------------------------------------------------------------------------------


# -- all studies -------------------------------------------------------------------------------------------------------


def _link(store: Store, experiment_id: str) -> Callable[[str], str]:
    base = store.page or LOCAL_UI
    return lambda run_id: f"{base}/#/experiments/{experiment_id}/runs/{run_id}"


def build_page(studies: Sequence[str], options: Options, tracking_uri: Address) -> Page:
    """Return the page of some studies, or of all, from the tracking store and, for thumbnails, the dataset's folder.

    Raises UsageError for a study or a row that is not there, StoreError for a store that cannot be read or is empty.
    """
    reader = open_reader(tracking_uri)
    stored = reader.studies(choose(studies, reader.names(), reader.store))
    runs = [run.run_id for study in stored for _, _, run in curves.drawn(study)]
    histories = read_histories(reader.store, runs, list(curves.METRICS))
    most = POINTS_OF_A_SERVER if reader.store.is_web else POINTS
    searches = [run for found in map(curves.sampled, stored) if len(found) <= most for run in found]
    names = {run.objective.each_epoch for run in searches}
    moments = [
        moment
        for name in sorted(names)
        for moment in read_moments(reader.store, [r.run_id for r in searches if r.objective.each_epoch == name], name)
    ]
    tables = told_apart(
        [
            build_table(s, options.best, reader.text, _link(reader.store, s.record.experiment_id), options.everything)
            for s in stored
        ]
    )
    sections, everything = [], []
    for index, (study, table, anchor) in enumerate(zip(stored, tables, anchors(tables), strict=True)):
        named = _named(study, options.best, reader)
        sections.append(_section(index, study, table, anchor, named, histories, moments, reader, options))
        everything += named
    html = _render(sections, _comparison(everything, options.compare), _across(sections), reader.store)
    return Page(html, tuple(section.table for section in sections))


def _data(sections: Sequence[Section], comparison: Comparison | None) -> dict[str, Any]:
    """Return what the page's script needs."""
    views = [section.confusions for section in sections if section.confusions]
    return {
        "matrices": {view.id: {"classes": view.classes, "cells": view.cells} for view in views},
        "rows": comparison.counts() if comparison else [],
    }


def _render(sections: Sequence[Section], comparison: Comparison | None, across: Curves | None, store: Store) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("caltech_sweep.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def source(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    script = source("page.js")
    # The browser runs the script with this digest and no other, whatever a study's title may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = sections[0].table.title if len(sections) == 1 else f"{len(sections)} studies"
    html: str = environment.get_template("page.html").render(
        title=one_line(title),
        sections=sections,
        comparison=comparison,
        across=across,
        styles=range(curves.STYLES),
        local_ui=None if store.is_web else LOCAL_UI,
        style=source("page.css"),
        script=script,
        digest=digest,
        data=_data(sections, comparison),
        svg=Markup,
    )
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", html)
