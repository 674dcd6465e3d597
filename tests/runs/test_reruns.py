"""A rerun beside what is published: times may differ, seeds explain what they differ by themselves."""

from __future__ import annotations

import subprocess

import pandas as pd
import pytest
from tiny_project import write_project

from earlyexit.__main__ import main
from earlyexit.runs import reruns
from earlyexit.runs.artifacts import MissingResult

TABLE = pd.DataFrame(
    {"seed": [0, 0, 1, 1], "exit": [0, 1, 0, 1], "perplexity": [9.0, 8.0, 9.5, 8.0],
     "speedup_time": [1.0, 2.0, 1.0, 2.0]}
)  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A repository in which a table is committed; it may be written again."""
    root = write_project(tmp_path)
    folder = root / "results" / "smoke"
    folder.mkdir(parents=True)
    TABLE.to_csv(folder / "front.csv", index=False)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "results"]):
        name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *name, *command], cwd=root, check=True)
    return root, folder / "front.csv"


@pytest.mark.parametrize(
    ("row", "column", "value", "kind", "explained"),
    [
        (0, "speedup_time", 3.0, "time", True),
        (0, "perplexity", 9.3, "number", True),  # seeds differ by 0.5 there
        (0, "perplexity", 9.6, "number", False),
        (1, "perplexity", 8.001, "number", False),  # seeds agree there
    ],
)
def test_a_difference_is_explained_by_time_or_by_seeds(place, row, column, value, kind, explained):
    root, file = place
    again = TABLE.copy()
    again.loc[row, column] = value
    again.to_csv(file, index=False)
    (found,) = reruns.compare("smoke", root=root).to_dict("records")
    assert (found["column"], found["kind"], found["explained"]) == (column, kind, explained)
    assert found["rows"] == 1
    assert found["largest"] == pytest.approx(abs(value / TABLE.loc[row, column] - 1))


def test_equal_tables_and_other_shapes(place, tmp_path, monkeypatch, capsys):
    root, file = place
    monkeypatch.setenv("EARLYEXIT_HOME", str(root))
    assert main(["compare", "smoke"]) == 0
    TABLE.iloc[:3].to_csv(file, index=False)
    assert main(["compare", "smoke"]) == 1
    said = capsys.readouterr().out
    assert "1 of them by more than seeds explain" in said
    other = tmp_path / "clone"
    other.mkdir()
    with pytest.raises(MissingResult, match="nothing to compare"):
        reruns.compare("smoke", other, root)
    TABLE.iloc[:3].to_csv(other / "front.csv", index=False)
    assert reruns.compare("smoke", other, root).empty  # the same as what is in results now


def test_tables_that_a_rerun_lacks_are_named(place, tmp_path, monkeypatch, capsys):
    root, file = place
    (other := tmp_path / "clone").mkdir()
    TABLE.to_csv(other / "front.csv", index=False)
    assert reruns.missing("smoke", other, root) == []
    TABLE.to_csv(file.with_name("claims.csv"), index=False)
    assert reruns.missing("smoke", other, root) == ["claims.csv"]
    monkeypatch.setenv("EARLYEXIT_HOME", str(root))
    assert main(["compare", "smoke", "--with", str(other)]) == 0
    assert "not in the rerun, so not compared: claims.csv" in capsys.readouterr().out
    file.unlink()  # committed, and gone now
    assert reruns.missing("smoke", root=root) == ["front.csv"]
