"""A table or figure is whole and certified, or it is not read."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from tiny_project import write_project

from earlyexit.figures import use_style
from earlyexit.runs import artifacts
from earlyexit.runs.artifacts import MissingResult, Outputs, read_table

mpl.use("Agg")


@pytest.fixture
def root(tmp_path):
    return write_project(tmp_path)


@pytest.fixture
def out(root):
    return Outputs("smoke", "01_build", {"data_dir": "/home/someone/text", "k": 2}, root)


TABLE = pd.DataFrame(
    {"seed": [0, 1], "signal_name": ["max_prob", "a & b"], "loss": [0.1 + 0.2, np.nan]}
)


def test_a_table_comes_back_bit_for_bit(out, root):
    out.table(TABLE, "sweep", "Loss of 5 % & more", text_hash="abc")
    pd.testing.assert_frame_equal(read_table("smoke", "sweep", root), TABLE, check_exact=True)
    tex = (root / "results/smoke/sweep.tex").read_text()
    for part in (r"\toprule", r"signal\_name", r"a \& b", "0.3 ", r"Loss of 5 \% \& more", "--"):
        assert part in tex
    assert not list(root.rglob("*.tmp"))


def test_the_certificate_says_where_a_number_comes_from(out, root):
    out.table(TABLE, "sweep", "Loss", text_hash="abc")
    meta = json.loads((root / "results/smoke/sweep.meta.json").read_text())
    assert meta["parameters"] == {"data_dir": "text", "k": 2}  # no folder of this machine
    assert meta["text_hash"] == "abc"
    assert set(meta["versions"]) >= {"python", "torch", "numpy", "pandas", "papermill"}
    assert set(meta["hardware"]) >= {"cpu", "cores", "ram_gib", "gpu", "platform"}
    assert {"commit", "dirty", "command", "notebook", "code", "time", "run_id"} <= set(meta)
    assert meta["commit"] is None  # the folder is no repository


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (TABLE.drop(columns="seed"), "no column `seed`"),
        (TABLE.assign(loss=[1.0, np.inf]), "infinite value in column `loss`"),
        (TABLE.iloc[:0], "no rows"),
        (TABLE.rename(columns={"loss": 3}), "plain names"),
        (TABLE.rename(columns={"loss": "seed"}), "two columns"),
    ],
)
def test_a_table_that_cannot_be_trusted_is_refused(out, root, table, complaint):
    with pytest.raises(ValueError, match=complaint):
        out.table(table, "sweep", "Loss")
    assert not (root / "results").exists()


def test_two_notebooks_cannot_share_a_name(out, root):
    out.table(TABLE, "sweep", "Loss")
    with pytest.raises(ValueError, match="01_build writes that name"):
        Outputs("smoke", "02_plot", {}, root).table(TABLE, "sweep", "Loss")


def test_a_missing_table_names_its_notebook(root):
    command = re.escape("run --profile cpu --set epochs=2.0 --only 01_build")
    with pytest.raises(MissingResult, match=command):
        read_table("cpu~epochs=2.0", "numbers", root)


@pytest.mark.parametrize("damage", ["edit", "no certificate", "no file"])
def test_a_damaged_table_is_not_read(out, root, damage):
    out.table(TABLE, "sweep", "Loss")
    csv = root / "results/smoke/sweep.csv"
    match damage:
        case "edit":
            csv.write_text(csv.read_text().replace("0,", "7,"))
        case "no certificate":
            csv.with_name("sweep.meta.json").unlink()
        case "no file":
            csv.unlink()
    with pytest.raises(MissingResult, match="run `python -m earlyexit run --profile smoke"):
        read_table("smoke", "sweep", root)


@pytest.mark.parametrize(
    ("nth", "name"), [(0, "sweep.csv"), (1, "sweep.tex"), (2, "sweep.meta.json")]
)
def test_disk_full_leaves_the_old_file_and_nothing_else(out, root, monkeypatch, nth, name):
    out.table(TABLE, "sweep", "Loss")
    folder = root / "results/smoke"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = iter(range(3))

    def fsync(descriptor):  # where data reach the disk, and a full one is noticed
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        out.table(TABLE.assign(loss=1.0), "sweep", "Another")
    assert {path.name for path in folder.iterdir()} == set(before)
    assert (folder / name).read_bytes() == before[name]
    # Either all is as it was, or what is mixed is refused.
    if nth == 0:
        pd.testing.assert_frame_equal(read_table("smoke", "sweep", root), TABLE)
    else:
        with pytest.raises(MissingResult, match="does not match its certificate"):
            read_table("smoke", "sweep", root)


def test_a_figure_is_vector_truetype_and_stable(out, root):
    use_style()
    written = []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, 1], label="a")
        ax.set_xlabel("depth")
        out.figure(fig, "line", "A line")
        plt.close(fig)
        written.append(
            [(root / f"figures/smoke/line.{kind}").read_bytes() for kind in ("pdf", "png")]
        )
    assert written[0] == written[1]
    pdf, png = written[0]
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert png.startswith(b"\x89PNG")
    assert next(artifacts.certificates("smoke", root))[1]["kind"] == "figure"


def test_the_label_is_the_runners_or_the_profiles(monkeypatch):
    assert artifacts.run_label("cpu", {"epochs": 2.0}) == "cpu~epochs=2.0"
    assert artifacts.run_label("cpu", {}, [0]) == "cpu"
    assert artifacts.run_label("cpu", {"epochs": 2.0}, [3, 4]) == "cpu~epochs=2.0~seeds=3,4"
    monkeypatch.setenv(artifacts.LABEL, "cpu~rows=3")
    assert artifacts.run_label("cpu") == "cpu~rows=3"


def test_no_artifact_names_a_folder_of_this_machine(out, root):
    out.table(TABLE, "sweep", "Loss")
    text = (root / "results/smoke/sweep.meta.json").read_text()
    assert str(Path.home()) not in text
    assert str(root) not in text


def test_a_remedy_asks_for_what_the_label_says():
    told = artifacts.remedy("cpu~seeds=3,4~tolerances=[0.01, 0.1]", "03_threshold_sweep")
    assert told == (
        "run `python -m earlyexit run --profile cpu --seeds 3 4 --set 'tolerances=[0.01, 0.1]'"
        " --only 03_threshold_sweep`"
    )
