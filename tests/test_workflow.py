"""The grid on an engine: killed, resumed, with a cell that fails, and as a cluster would get it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_project import LITTLE, TIMED, write_notebook, write_texts, write_training

from earlyexit.__main__ import main, study_settings
from earlyexit.runs import runner
from earlyexit.runs.paths import HOME_VARIABLE, PACKAGE

WORKFLOW = PACKAGE.parent / "workflow"
# Stands in for a cluster that writes down what it is asked for, and refuses it.
SBATCH = """\
#!{python}
import re, sys
rule = re.search(r"--target-jobs '?([^:']+):", " ".join(sys.argv) + sys.stdin.read()).group(1)
with open("submitted", "a") as file:
    print(rule, *sys.argv[1:], file=file)
sys.exit("this cluster is full")
"""


def snakemake(root: Path, *options: str, path: str = "") -> subprocess.Popen:
    """Start the workflow of this checkout on the project at ``root``, with four jobs at a time."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", WORKFLOW / "Snakefile"]
    command += ["--directory", root, "--configfile", root / "grid.yaml", "--quiet", *options]
    environment = {HOME_VARIABLE: str(root), "PYTHONPATH": str(PACKAGE.parent)}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, cwd=root)


def grid_project(root: Path, profiles: int, seeds: str) -> list[str]:
    """A project, and the studies of its grid; labels differ by the learning rate."""
    write_training(root)
    common = f"--profile smoke --seeds {seeds} --data-dir {write_texts(root)} --set {LITTLE}"
    studies = [f"{common} learning_rate=0.0{1 + number}" for number in range(profiles)]
    (root / "grid.yaml").write_text(yaml.safe_dump({"studies": studies, "stages": ["exits"]}))
    return studies


def models(root: Path) -> dict[str, int]:
    """Name of a model in the cache → when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in root.glob(".cache/models/[!.]*")}


@pytest.mark.slow
@pytest.mark.grid  # minutes: 4 jobs at a time, a process each, for 6 cells and 4 notebooks, thrice
def test_a_grid_that_is_killed_and_fails_is_finished_by_whoever_comes(tmp_path, monkeypatch):
    studies = grid_project(tmp_path, profiles=2, seeds="0 1 2")
    labels = [runner.plan(study_settings(study), root=tmp_path).label for study in studies]
    local = [
        "--workflow-profile",
        str(WORKFLOW / "profiles/local"),
        "--cores",
        "4",
        "--retries",
        "0",
    ]
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert main(["run", *studies[0].split(), "--stage", "exits", "0"]) == 0  # begun without a grid
    begun = models(tmp_path)
    assert len(begun) == 2  # with gates and without

    engine = snakemake(tmp_path, *local)
    until = time.monotonic() + 300
    while len(models(tmp_path)) < 4 and engine.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()
    killed = models(tmp_path)
    assert begun.items() <= killed.items()

    (tmp_path / "fail").write_text(labels[1][-4:])
    assert snakemake(tmp_path, *local).wait(timeout=600) != 0
    records = sorted(path.parent.name for path in tmp_path.glob("results/*/*.run.json"))
    assert records == [labels[0]] * 2  # the other study's notebook failed, and deleted nothing
    trained = models(tmp_path)
    assert len(trained) == 12 and killed.items() <= trained.items()
    published = {p: p.stat().st_mtime_ns for p in tmp_path.glob("results/*/*")}

    (tmp_path / "fail").unlink()
    assert main(["run", *studies[1].split(), "--only", "01"]) == 0  # finished without the grid
    assert models(tmp_path) == trained
    assert snakemake(tmp_path, *local).wait(timeout=600) == 0
    for study in studies:
        assert all(not step.reasons for step in runner.plan(study_settings(study)).steps)
    assert models(tmp_path) == trained
    assert all(path.stat().st_mtime_ns == written for path, written in published.items())


@pytest.mark.slow  # Snakemake starts, and so does torch inside it
def test_a_cluster_gets_partitions_sizes_and_whole_nodes(tmp_path):
    grid_project(tmp_path, profiles=1, seeds="0 1")
    write_notebook(tmp_path, "02_timed", [TIMED])  # reads no other, so that it is submitted at once
    tools = tmp_path / "bin"
    tools.mkdir()
    fakes = {"sbatch": SBATCH, "sacct": "#!/bin/sh\n", "sacctmgr": "#!/bin/sh\necho research\n"}
    for name, text in fakes.items():
        (tools / name).write_text(text.format(python=sys.executable))
        (tools / name).chmod(0o755)
    options = ["--workflow-profile", str(WORKFLOW / "profiles/slurm"), "--retries", "0"]
    assert snakemake(tmp_path, *options, path=str(tools)).wait(timeout=300) != 0
    submitted: dict[str, list[str]] = {}
    for line in (tmp_path / "submitted").read_text().splitlines():
        rule, call = line.split(" ", 1)
        submitted.setdefault(rule, []).append(call)
    assert {rule: len(calls) for rule, calls in submitted.items()} == {"exits": 2, "timed": 1}
    profile = yaml.safe_load((WORKFLOW / "profiles/slurm/config.yaml").read_text())
    for rule, calls in submitted.items():
        sizes, threads = profile["set-resources"][rule], profile["set-threads"][rule]
        wanted = [f"-p {sizes['slurm_partition'].strip(chr(39))} ", f"--gpus={sizes['gpu']} "]
        wanted += [f"--mem {sizes['mem_mb']} ", f"-t {sizes['runtime']} ", "-A research "]
        for call in calls:
            assert all(part in call for part in wanted), call
            assert f"--cpus-per-task={threads} " in call or f"--cpus-per-gpu={threads} " in call
            assert ("--exclusive" in call) == (rule == "timed")
    assert not list(tmp_path.glob("build/*/grid/*.done"))


def test_profiles_speak_of_every_rule():
    config = yaml.safe_load((WORKFLOW / "config.yaml").read_text())
    slurm = yaml.safe_load((WORKFLOW / "profiles/slurm/config.yaml").read_text())
    assert set(slurm["set-resources"]) == {*config["stages"], "notebook", "timed"}
    assert all({"mem_mb", "runtime"} <= set(sizes) for sizes in slurm["set-resources"].values())
