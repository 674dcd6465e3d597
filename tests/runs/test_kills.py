"""A process that is killed while it writes leaves the old file or none, and the next run heals it.

Every kind of file is written by the package's own writer in a child process, which ends in the middle
of each file (the system kills it at a size that the file exceeds), and again before each file is put
in its place. What the package's own reader then finds is never half of anything.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from earlyexit import atomic
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus import load
from earlyexit.cost.time_model import TimeModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.checkpoints import checkpoint_about, save_model
from earlyexit.runs import runner
from earlyexit.runs.artifacts import MissingResult, Outputs, read_table
from earlyexit.runs.paths import project
from earlyexit.runs.provenance import SUFFIX, read_record
from earlyexit.training.resume import TrainingState

DIGEST = "0" * 64
OLD, NEW = 1, 2  # what a file says


class Kind(NamedTuple):
    """How a number is written to a folder, and read from it."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], int | None]


@pytest.fixture(scope="module")
def kinds(make_model, corpus) -> dict[str, Kind]:
    model = make_model()
    trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
    figure = Figure(figsize=(1, 1))  # empty: ticks take long to draw
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters())

    def state(folder: Path) -> TrainingState:
        return TrainingState(folder, {"seed": 0})

    def outputs(folder: Path) -> Outputs:
        return Outputs("smoke", "01_build", {}, folder)

    def recorded(folder: Path) -> int | None:
        home = project(folder).by_hand("smoke")
        record = read_record(home, "01_build")
        if record is None or record.unmatched(home):
            return None
        return int(next(iter(record.files.values())).caption)

    def table(number: int) -> pd.DataFrame:
        return pd.DataFrame({"seed": [0] * 40, "x": [number] * 40})

    return {
        "model": Kind(
            lambda folder, n: save_model(model, folder / "model.safetensors", {"n": n}),
            lambda folder: checkpoint_about(folder / "model.safetensors")["n"],
        ),
        "trace": Kind(
            lambda folder, n: replace(trace, model_hash=str(n)).save(folder / "trace.parquet"),
            lambda folder: int(ExitTrace.load(folder / "trace.parquet").model_hash),
        ),
        "state": Kind(
            lambda folder, n: state(folder).save(layer, optimizer, {"step": n}),
            lambda folder: state(folder).restore(layer, optimizer)["step"] or None,
        ),
        "prices": Kind(
            lambda folder, n: TimeModel({}, {"n": n}).save(folder / "prices.json"),
            lambda folder: TimeModel.load(folder / "prices.json").check["n"],
        ),
        "corpus": Kind(
            lambda folder, n: load._write_cache(folder / "corpus.npz", DIGEST, {"n": np.array(n)}),
            lambda folder: int(load._read_cache(folder / "corpus.npz", DIGEST)["n"]),
        ),
        "policy": Kind(
            lambda folder, n: ExitPolicy("gate", (n / 4,)).save(folder / "policy.json"),
            lambda folder: 4 * ExitPolicy.load(folder / "policy.json").thresholds[0],
        ),
        "record": Kind(
            lambda folder, n: replace(outputs(folder).record, seconds=n).write(folder),
            lambda folder: read_record(folder, "01_build").seconds,
        ),
        "table": Kind(
            lambda folder, n: outputs(folder).table(table(n), "numbers", str(n)),
            lambda folder: read_table("smoke", "numbers", folder, by_hand=True).x[39],
        ),
        "figure": Kind(lambda folder, n: outputs(folder).figure(figure, "line", str(n)), recorded),
        "document": Kind(
            lambda folder, n: outputs(folder).document(f"[{n}]", "list", str(n)), recorded
        ),
    }


def found(kind: Kind, folder: Path) -> int | None:
    """What the package reads; None if it finds nothing, or refuses what it finds."""
    try:
        return kind.read(folder)
    except (OSError, ValueError, TypeError, AttributeError, MissingResult):
        return None


def contents(folder: Path) -> dict[Path, bytes]:
    """The files that were put in place; records hold a time and are read by ``found``."""
    files = (path for path in folder.rglob("[!.]*.*") if not path.name.endswith(SUFFIX))
    return {path.relative_to(folder): path.read_bytes() for path in files if path.is_file()}


def ended(prepare: Callable[[], object], write: Callable[[], object]) -> int:
    """Write in a child process, and return what ended it: 0, or a signal with a minus before it."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BaseException):
        prepare()
        write()
        os._exit(0)
    os._exit(1)


def at_size(size: int) -> None:
    """From now on, end this process in the middle of any write beyond ``size`` bytes of a file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def before_replacement(number: int) -> None:
    """Kill this process when it is about to put its file of this number in place."""
    replacements, move = count(), os.replace

    def killing(source, target) -> None:
        if next(replacements) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)

    atomic.os.replace = killing


KINDS = [
    *("model", "trace", "state", "prices", "corpus", "policy"),
    *("record", "table", "figure", "document"),
]


@pytest.mark.parametrize("old", [None, OLD])
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_write_leaves_the_old_file_or_none(kinds, tmp_path, name, old):
    kind, whole = kinds[name], tmp_path / "whole"
    kind.write(whole, NEW)
    assert kind.read(whole) == NEW
    sizes = {path.stat().st_size for path in whole.rglob("*.*") if path.is_file()}
    moments = [partial(at_size, size // 2) for size in sizes]
    moments += [partial(before_replacement, number) for number in range(len(sizes))]
    for number, moment in enumerate(moments):
        folder = tmp_path / str(number)
        if old:
            kind.write(folder, old)
        before = contents(folder)
        assert ended(moment, partial(kind.write, folder, NEW)) in (-signal.SIGXFSZ, -signal.SIGKILL)
        assert contents(folder).items() <= before.items() | contents(whole).items()
        assert found(kind, folder) in ({old} if len(sizes) == 1 else {old, None})
        atomic.remove_leftovers(folder, untouched=0)
        assert not list(folder.rglob(".*"))
        kind.write(folder, NEW)  # the next run
        assert kind.read(folder) == NEW


def test_a_run_removes_what_killed_ones_left_in_the_cache(tmp_path):
    """But not the file that a process is writing now, here or on another machine of the same folder."""
    ended_process = subprocess.Popen(["true"])
    ended_process.wait()
    place = project(tmp_path)
    (place.cache / "models").mkdir(parents=True)
    left, now = (place.cache / f"models/.m.{n}.tmp" for n in (ended_process.pid, os.getpid()))
    elsewhere = left.with_name(f".other.{ended_process.pid}.tmp")
    for path in (left, now, elsewhere):
        path.touch()
    for path in (left, now):
        os.utime(path, (0, 0))
    with runner._only_writer(place, "smoke", "01_build"):
        assert now.exists() and elsewhere.exists() and not left.exists()
