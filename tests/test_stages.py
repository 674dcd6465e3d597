"""A grid's cells are what the notebooks would train themselves, and their command computes them."""

from __future__ import annotations

import logging
import shutil

import pandas as pd
import pytest
from tiny_project import LITTLE, write_project, write_texts, write_training

from earlyexit import stages
from earlyexit.__main__ import main, study_settings
from earlyexit.evaluation.ablation import Change
from earlyexit.runs.cache import Trained
from earlyexit.runs.paths import HOME_VARIABLE, project
from earlyexit.runs.settings import Settings
from earlyexit.runs.workers import JOBS
from earlyexit.study import Study


def test_the_cells_of_a_study_are_its_stages_and_seeds():
    grid = stages.grid(Settings("wikitext2", data_dir=None))
    assert grid.label == "wikitext2"
    every, first = [0, 1, 2], [0]
    assert grid.cells == {
        "exits": every, "traces": every, "systems": every,
        "alone": every, "changes": first, "recipes": first, "heads": first,
    }  # fmt: skip
    assert ("heads", 0) in grid.before("04_speedup_breakdown")
    assert len(grid.before("01_build")) == 10 and not grid.before("08_study")
    others = {"02_calibration", "08_study", "09_existing_models", "10_generation"}
    assert set(grid.needs["08_study"]) == set(grid.needs) - others
    assert {"04_speedup_breakdown", "08_study"} <= grid.timed
    assert not {"01_build", "02_calibration", "06_guarantees"} & grid.timed


def test_a_notebook_of_another_project_has_no_cells(tmp_path):
    shutil.copyfile(project().notebook("02_calibration"), write_training(tmp_path).notebook("03_x"))
    grid = stages.grid(study_settings("--profile smoke --seeds 5 6"), tmp_path)
    assert list(grid.needs) == ["01_build", "02_timed", "03_x"]
    assert grid.cells["exits"] == [5, 6] and grid.cells["alone"] == [5]
    assert "recipes" not in grid.cells and grid.timed == {"02_timed"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--stage all", "--stage all: choose one of exits, traces"),
        ("--stage exits 7", "--stage exits 7: the study has the seeds 0; others are given"),
        ("--stage exits x", "--stage exits x: a seed is a whole number"),
        ("--stage exits --only 01", "no --only, --force or --dry-run"),
    ],
)
def test_a_wrong_cell_is_told_in_one_line(capsys, arguments, complaint):
    assert main(["run", "--profile", "smoke", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_a_project_with_other_notebooks_has_no_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(HOME_VARIABLE, str(write_project(tmp_path)))
    assert main(["run", "--profile", "smoke", "--stage", "exits"]) == 2
    assert "there is no 01_build with its usual parameters" in capsys.readouterr().err


def test_torchrun_is_for_stages(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "--profile", "smoke"]) == 2
    assert "add --stage" in capsys.readouterr().err


def little_study(data_dir, seeds) -> Study:
    overrides = dict(pair.split("=") for pair in LITTLE.split())
    overrides = {k: int(v) if v.isdecimal() else v for k, v in overrides.items()}
    common = {"profile": "smoke", "seeds": seeds, "data_dir": data_dir}
    return Study("01_build", common | {"overrides": overrides})


def test_a_cell_trains_into_the_cache_and_says_its_throughput(tmp_path, monkeypatch, caplog):
    place = write_training(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    options = f"--profile smoke --seeds 3 4 --data-dir {write_texts(tmp_path)} --set {LITTLE}"
    caplog.set_level(logging.INFO, "earlyexit")
    assert main(["run", *options.split(), "--stage", "traces", "4"]) == 0
    traces = list(place.cache.glob("traces/*.parquet"))
    assert len(traces) == 2
    assert main(["run", *options.split(), "--stage", "exits", "4"]) == 0  # made with the traces
    assert "seed 4, exits: " in caplog.text and "tokens/s on 1 process(es)" in caplog.text
    study = little_study(study_settings(options).data_dir, [3, 4])
    assert study.model(4).model.n_layers == 2
    with pytest.raises(FileNotFoundError, match="seed 3"):
        study.model(3)


@pytest.mark.slow  # two processes start, and each imports torch
def test_models_trained_side_by_side_come_through_the_cache(tmp_path, monkeypatch):
    """In processes of their own: a model, and a table of one that is trained alone."""
    place = write_training(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv(JOBS, "2")
    study = little_study(str(write_texts(tmp_path)), [0])
    alone = study.alone, "depth_losses", 0, Change()
    done = study.side_by_side({"exits": (study.build, 0), "alone": alone})
    assert len(list(place.cache.glob("models/*"))) == 3  # with gates, without, and alone
    assert done["exits"].model.fingerprint() == study.model(0).model.fingerprint()
    again = study.side_by_side({"alone": alone})["alone"]
    pd.testing.assert_frame_equal(done["alone"], again)


def test_throughput_is_of_a_whole_training():
    history = pd.DataFrame({"step": [1, 2], "tokens": [100, 200], "processes": [4, 4]})
    trained = Trained(None, history, "", pd.DataFrame(), seconds=0.5)
    assert stages.throughput(trained) == "200 tokens in 0.5 s, 400 tokens/s on 4 process(es)"
    resumed = Trained(None, history, "", pd.DataFrame())
    assert "interrupted" in stages.throughput(resumed)
