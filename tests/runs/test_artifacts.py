"""A table or figure is whole and recorded, or it is not read."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
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
from earlyexit.runs.provenance import FORMAT

mpl.use("Agg")

HAND = "build/by-hand/smoke"


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
    pd.testing.assert_frame_equal(
        read_table("smoke", "sweep", root, by_hand=True), TABLE, check_exact=True
    )
    tex = (root / HAND / "results/sweep.tex").read_text()
    for part in (r"\toprule", "signal name", r"a \& b", "0.300", r"Loss of 5 \% \& more", "--"):
        assert part in tex
    assert not list(root.rglob("*.tmp"))


def test_by_hand_nothing_is_written_among_what_is_published(out, root):
    out.table(TABLE, "sweep", "Loss")
    out.document("<p>", "page", "A page", suffix="html")
    assert not (root / "results").exists() and not (root / "figures").exists()
    assert {p.name for p in (root / HAND).rglob("*.*")} == {
        "01_build.run.json", "sweep.csv", "sweep.tex", "page.html",
    }  # fmt: skip


def test_the_record_says_where_a_number_comes_from(out, root):
    out.table(TABLE, "sweep", "Loss", text_hash="abc")
    text = (root / HAND / "01_build.run.json").read_text()
    record = json.loads(text)
    assert record["parameters"] == {"data_dir": "text", "k": 2}  # no folder of this machine
    assert set(record["files"]) == {"results/sweep.csv", "results/sweep.tex"}
    file = record["files"]["results/sweep.csv"]
    assert (file["kind"], file["name"], file["caption"]) == ("table", "sweep", "Loss")
    assert file["text_hash"] == "abc"
    assert set(record["versions"]) >= {"python", "torch", "numpy", "pandas", "papermill"}
    assert set(record["hardware"]) >= {"cpu", "cores", "ram_gib", "gpu", "platform"}
    assert 50 < record["peak_mib"] < 100_000
    assert record["format"] == FORMAT and record["command"] == "by hand"
    assert record["commit"] is None  # the folder is no repository
    assert str(Path.home()) not in text and str(root) not in text


def test_one_record_lists_all_files_of_a_run_and_those_of_no_other(out, root):
    out.table(TABLE, "sweep", "Loss")
    again = Outputs("smoke", "01_build", out.record.parameters, root)  # its first cell, run again
    again.table(TABLE, "front", "Front")
    names = {file.name for file in again.record.files.values()}
    assert names == {"sweep", "front"}
    other = Outputs("smoke", "01_build", {"k": 3}, root)
    other.table(TABLE, "front", "Front")
    assert {file.name for file in other.record.files.values()} == {"front"}
    assert not (root / HAND / "results/sweep.csv").exists()


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
    assert not (root / "build").exists()


def test_two_notebooks_cannot_share_a_name(out, root):
    out.table(TABLE, "sweep", "Loss")
    with pytest.raises(ValueError, match=r"results/smoke/sweep: 01_build writes that name"):
        Outputs("smoke", "02_plot", {}, root).table(TABLE, "sweep", "Loss")
    Outputs("smoke", "02_plot", {}, root).document("x", "sweep", "A page", suffix="html")


def test_a_missing_table_names_its_notebook(root):
    command = re.escape("run --profile cpu --set epochs=2.0 --only 01_build")
    with pytest.raises(MissingResult, match=command):
        read_table("cpu~epochs=2.0", "numbers", root)


def write_published(out, root, table=TABLE):
    """The table, as ``run`` publishes it: with paths from the top of the project."""
    out.table(table, "sweep", "Loss")
    files = {}
    for name, file in out.record.files.items():
        top, _, rest = name.partition("/")
        target = root / top / "smoke" / rest
        target.parent.mkdir(parents=True, exist_ok=True)
        (out.folder / name).rename(target)
        files[f"{top}/smoke/{rest}"] = file
    (out.folder / "01_build.run.json").unlink()
    replace(out.record, files=files).write(root / "results/smoke")


def test_by_hand_what_was_written_by_hand_is_read_and_published_results_otherwise(
    out, root, monkeypatch
):
    def loss(**options):
        return read_table("smoke", "sweep", root, **options).loss[0]

    write_published(out, root)
    assert loss(by_hand=True) == TABLE.loss[0]
    Outputs("smoke", "01_build", {}, root).table(TABLE.assign(loss=7.0), "sweep", "Loss")
    assert loss(by_hand=True) == 7.0
    assert loss() == TABLE.loss[0]  # the README quotes what is published
    monkeypatch.setenv(artifacts.FOLDER, str(root / "build/smoke/02_plot.out"))
    assert loss(by_hand=True) == TABLE.loss[0]


@pytest.mark.parametrize("damage", ["edit", "no record", "no file", "truncated", "foreign"])
def test_a_damaged_table_is_not_read(out, root, damage):
    write_published(out, root)
    csv, record = root / "results/smoke/sweep.csv", root / "results/smoke/01_build.run.json"
    match damage:
        case "edit":
            csv.write_text(csv.read_text().replace("0,", "7,"))
        case "no record":
            record.unlink()
        case "no file":
            csv.unlink()
        case "truncated":
            record.write_bytes(record.read_bytes()[:300])
        case "foreign":
            record.write_text('{"outputs": {}}')
    with pytest.raises(MissingResult, match="run `python -m earlyexit run --profile smoke"):
        read_table("smoke", "sweep", root)


@pytest.mark.parametrize(
    ("nth", "name"), [(0, "results/sweep.csv"), (1, "results/sweep.tex"), (2, "01_build.run.json")]
)
def test_disk_full_leaves_the_old_file_and_nothing_else(out, root, monkeypatch, nth, name):
    out.table(TABLE, "sweep", "Loss")
    before = {path: path.read_bytes() for path in (root / HAND).rglob("*.*")}
    calls = iter(range(3))

    def fsync(descriptor):  # where data reach the disk, and a full one is noticed
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        out.table(TABLE.assign(loss=1.0), "sweep", "Another")
    assert set((root / HAND).rglob("*.*")) == set(before)
    assert (root / HAND / name).read_bytes() == before[root / HAND / name]
    # Either all is as it was, or what is mixed is refused.
    if nth == 0:
        pd.testing.assert_frame_equal(read_table("smoke", "sweep", root, by_hand=True), TABLE)
    else:
        with pytest.raises(MissingResult, match="is missing"):
            read_table("smoke", "sweep", root, by_hand=True)


def test_a_figure_is_vector_truetype_and_stable(out, root):
    use_style()
    written = []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, 1], label="a")
        ax.set_xlabel("depth")
        out.figure(fig, "line", "A line")
        plt.close(fig)
        written.append([(root / HAND / f"figures/line.{k}").read_bytes() for k in ("pdf", "png")])
    assert written[0] == written[1]
    pdf, png = written[0]
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert png.startswith(b"\x89PNG")
    assert {file.kind for file in out.record.files.values()} == {"figure"}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_figure_may_be_given_by_its_axes(out, root, rows):
    fig, axes = plt.subplots(rows, 2)
    assert out.figure(axes, "line", "Axes") is fig
    assert out.figure(axes.flat[0], "line", "One of them") is fig
    plt.close(fig)


def test_the_label_is_the_runners_or_the_profiles(monkeypatch):
    assert artifacts.run_label("cpu", {"epochs": 2.0}) == "cpu~epochs=2.0"
    assert artifacts.run_label("cpu", {}, [0, 1, 2]) == "cpu"
    assert artifacts.run_label("cpu", {"epochs": 2.0}, [3, 4]) == "cpu~epochs=2.0~seeds=3,4"
    monkeypatch.setenv(artifacts.LABEL, "cpu~rows=3")
    assert artifacts.run_label("cpu") == "cpu~rows=3"


def test_a_remedy_asks_for_what_the_label_says():
    told = artifacts.remedy("cpu~seeds=3,4~epsilons=[0.01, 0.1]", "03_threshold_sweep")
    assert told == (
        "run `python -m earlyexit run --profile cpu --seeds 3 4 --set 'epsilons=[0.01, 0.1]'"
        " --only 03_threshold_sweep`"
    )
