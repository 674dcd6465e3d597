"""A rerun is set beside what is published: which numbers differ, and which of them seeds explain.

Times differ from run to run. Any other number is the same on a machine of the same kind with the same
versions, and elsewhere it may differ as much as it does between seeds.
"""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from earlyexit.runs import provenance
from earlyexit.runs.artifacts import MissingResult
from earlyexit.runs.paths import Project, project

# Columns that hold times or follow from them, and tables that hold nothing else.
TIMED = re.compile(r"time|second|_ms$|resident|predicted|^error$|^against_|^efficiency$")
TIMED_TABLES = re.compile(r"time|batching|break_even|compaction|run_parts|resident|sparse_limits")
MACHINE = ("cpu", "threads", "gpu", "platform")  # what numbers may depend on


def compare(label: str, other: Path | None = None, root: Path | None = None) -> pd.DataFrame:
    """Compare the tables under a label with those that are published.

    Args:
        other: folder with the rerun's tables, such as ``results/cpu`` of a clone or
            ``build/by-hand/cpu/results``; None: those in ``results/``, against the last commit.

    Returns:
        One row per column that differs: table, column, kind ("number" or "time"), rows that differ,
        the largest relative difference, and ``explained``: whether it is a time or no larger than the
        published numbers differ between seeds. A table that only one of them has is left out.

    Raises:
        MissingResult: there is no table to compare.
    """
    place = project(root)
    here = place.published(label)
    published = _committed(place, label) if other is None else _reader(here)
    rerun = _reader(other or here)
    rows = []
    names = sorted(path.name for path in (other or here).glob("*.csv"))
    pairs = {name: (published(name), rerun(name)) for name in names}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] is not None}
    if not pairs:
        what = f"of those in {other or here} are published as {label}" if names else f"in {here}"
        raise MissingResult(f"no tables {what}: there is nothing to compare")
    for name, pair in pairs.items():
        rows += _differences(name.removesuffix(".csv"), *pair)
    columns = ["table", "column", "kind", "rows", "largest", "explained"]
    return pd.DataFrame(rows, columns=columns)


def missing(label: str, other: Path | None = None, root: Path | None = None) -> list[str]:
    """Return the published tables that a rerun lacks; arguments as above."""
    place = project(root)
    here = place.published(label)
    if other is None:
        listed = (_git(place, f"HEAD:{place.relative(here)}") or b"").decode().splitlines()
        names = {name for name in listed if name.endswith(".csv")}
    else:
        names = {path.name for path in here.glob("*.csv")}
    return sorted(names - {path.name for path in (other or here).glob("*.csv")})


def conditions(label: str, other: Path | None = None, root: Path | None = None) -> list[str]:
    """Return in words what sets machine and versions of two runs apart; arguments as above."""
    place = project(root)
    here = place.published(label)
    if other is None:
        listed = (_git(place, f"HEAD:{place.relative(here)}") or b"").decode().splitlines()
        names = [name for name in listed if name.endswith(provenance.SUFFIX)]
        texts = [_git(place, f"HEAD:{place.relative(here)}/{name}") for name in names]
        old = [provenance.READER.validate_json(text) for text in texts if text]
        new = provenance.read_records(here)
    else:
        old = provenance.read_records(here)
        new = provenance.read_records(other) or provenance.read_records(other.parent)  # by hand
    if not (old and new):
        return ["no record says on which machine one of them ran"]
    before, now = (
        {key: last.hardware.get(key) for key in MACHINE} | last.versions
        for last in (max(records, key=lambda record: record.time) for records in (old, new))
    )
    return [f"{k}: {before[k]} → {now.get(k)}" for k in before if before[k] != now.get(k)]


def _differences(table: str, before: pd.DataFrame, after: pd.DataFrame) -> list[tuple]:
    """Return a row for each column that differs; see :func:`compare`."""
    if list(before) != list(after) or len(before) != len(after):
        return [(table, "", "number", max(len(before), len(after)), np.nan, False)]
    rows = []
    for column in before:
        old, new = before[column], after[column]
        differs = ~((old == new) | (old.isna() & new.isna()))
        if not differs.any():
            continue
        ends = column in ("low", "high") and any(map(TIMED.search, before))  # of an interval
        timed = TIMED.search(column) or TIMED_TABLES.search(table) or ends
        kind = "time" if timed else "number"
        largest, explained = np.nan, kind == "time"
        if all(pd.api.types.is_numeric_dtype(values) for values in (old, new)):
            change = (new - old).abs()
            largest = (change / old.abs().clip(lower=1e-12))[differs].max()
            explained |= bool((change <= _spread(before, column))[differs].all())
        rows.append((table, column, kind, int(differs.sum()), largest, explained))
    return rows


def _spread(table: pd.DataFrame, column: str) -> pd.Series:
    """Return for each row by how much its number differs between seeds; 0 where there is one seed."""
    place = table.groupby("seed").cumcount()
    ends = table[column].groupby(place)
    return ends.transform("max") - ends.transform("min")


def _reader(folder: Path) -> Callable[[str], pd.DataFrame | None]:
    """Return a function from a table's file name to the table; None if it is not in the folder."""
    return lambda name: pd.read_csv(folder / name) if (folder / name).is_file() else None


def _committed(place: Project, label: str) -> Callable[[str], pd.DataFrame | None]:
    """Return a function from a table's file name to the table of the last commit."""

    def read(name: str) -> pd.DataFrame | None:
        content = _git(place, f"HEAD:{place.relative(place.published(label))}/{name}")
        return None if content is None else pd.read_csv(io.BytesIO(content))

    return read


def _git(place: Project, what: str) -> bytes | None:
    """Return what git shows of a commit's file or folder; None if there is none."""
    command = ["git", "show", what]
    try:
        return subprocess.run(command, cwd=place.root, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
