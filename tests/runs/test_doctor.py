"""The doctor finds what would stop a run, says what to do, and its exit code says whether it would."""

from __future__ import annotations

import shutil
from collections import namedtuple

import psutil
import pytest
from tiny_project import write_project

from earlyexit.__main__ import main
from earlyexit.runs import doctor
from earlyexit.runs.paths import HOME_VARIABLE


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project on a quiet machine with room."""
    monkeypatch.setenv(HOME_VARIABLE, str(write_project(tmp_path)))
    monkeypatch.setattr(doctor, "LEAST_DISK", 0)
    monkeypatch.setattr(doctor, "DISK", 0)
    monkeypatch.setattr(doctor, "MEMORY", 0)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path


def findings(**asked) -> dict[str, doctor.Finding]:
    return {found.name: found for found in doctor.examine(**asked)}


def test_a_healthy_machine_gets_no_remedy_and_nothing_is_written(home, capsys):
    before = sorted(home.rglob("*"))
    assert {found.verdict for found in findings().values()} == {"fine"}
    assert list(findings()) == ["Python", "disk", "folders", "text", "cores", "memory"]
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "nothing would stop a run" in said and "→" not in said
    assert sorted(home.rglob("*")) == before


def full(*_, **__):
    raise OSError(28, "No space left on device")


Usage, Memory = namedtuple("Usage", "free"), namedtuple("Memory", "available total")
SICK = {
    "Python": ("sys.version_info", (3, 10)),
    "disk": ("shutil.disk_usage", lambda _: Usage(doctor.GIB // 4)),
    "folders": ("tempfile.TemporaryFile", full),
    "memory": ("psutil.virtual_memory", lambda: Memory(doctor.GIB // 4, doctor.GIB)),
}


@pytest.mark.parametrize("name", SICK)
def test_what_stops_a_run_is_named_with_a_remedy(home, monkeypatch, capsys, name):
    monkeypatch.undo()
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    monkeypatch.setattr(*SICK[name])
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(said) if line.startswith(name))
    assert said[at].split()[1] == "stops" and "→" in said[at + 1] and len(said[at + 1]) > 30
    assert said[-1] == "a run would be stopped"


def test_a_text_that_is_not_there_stops_and_one_that_is_does_not(home, tmp_path):
    lost = findings(profile="wikitext2", data_dir=str(tmp_path / "nowhere"))["text"]
    assert lost.verdict == "stops" and "not a folder" in lost.said and "--data-dir" in lost.remedy
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(" \n = A = \n \n a b \n" * 100)
    assert findings(profile="wikitext2", data_dir=str(tmp_path))["text"].verdict == "fine"


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_an_unknown_profile_is_wrong_usage(home, capsys, command):
    assert main([command, "--profile", "nope"]) == 2
    assert "nope" in capsys.readouterr().err


def test_other_users_and_too_many_threads_are_a_matter_of_care(home, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 64.0, 64.0))
    crowded = findings()["cores"]
    assert crowded.verdict == "careful" and "load 64.0" in crowded.said
    monkeypatch.setattr(doctor, "hardware", lambda: {"usable_cpus": 0})
    assert "--threads" in findings()["cores"].remedy
    monkeypatch.setattr(doctor, "DISK", 2 * shutil.disk_usage(home).total)
    assert findings()["disk"].verdict == "careful"
    monkeypatch.setattr(doctor, "MEMORY", 2 * psutil.virtual_memory().total)
    assert findings()["memory"].verdict in ("careful", "stops")
