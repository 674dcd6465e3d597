"""One page holds text, figures, tables and provenance of the executed notebooks, and asks no network."""

from __future__ import annotations

import base64
import re

import pytest
from nbformat import v4, write
from tiny_project import write_project

from earlyexit.__main__ import main
from earlyexit.runs.paths import HOME_VARIABLE, project
from earlyexit.runs.provenance import Record
from earlyexit.runs.report import report

PIXEL = base64.b64encode(b"not really a picture").decode()
WIDGET = "application/vnd.jupyter.widget-view+json"
VERSIONS = {"python": "3.11.0", "torch": "2.0"}
HARDWARE = {"cpu": "A processor", "threads": 1, "gpu": None}


def executed(began: str = "2026-01-01T00:00:00.5", ended: str = "2026-01-01T00:10:00.5"):
    """An executed notebook with an output of each kind."""
    view = {WIDGET: {"model_id": "x"}, "text/plain": "VBox()"}
    outputs = [
        v4.new_output("stream", name="stderr", text="a bar: 100%"),
        v4.new_output("stream", name="stdout", text="printed"),
        v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}),
        v4.new_output("display_data", view | {"text/plain": "a bar as a widget"}),
        v4.new_output("execute_result", view | {"text/html": "<b>how sliders stand</b>"}),
        v4.new_output("execute_result", {"text/markdown": "A **computed** sentence."}),
    ]
    cells = [v4.new_markdown_cell("# The question"), v4.new_code_cell("1 + 1", outputs=outputs)]
    times = {"start_time": began, "end_time": ended}
    return v4.new_notebook(cells=cells, metadata={"papermill": times, "widgets": {"state": {}}})


@pytest.fixture
def place(tmp_path):
    """A project with the executed copy of the first of two notebooks, and its record."""
    place = project(write_project(tmp_path))
    path = place.executed("smoke", "01_build")
    path.parent.mkdir(parents=True)
    write(executed(), path)
    Record(
        "01_build", "smoke", "0" * 16, "python -m earlyexit run --only 01", {"seeds": [3]}, "c0ffee" * 6,
        False, VERSIONS, HARDWARE, "2026-01-01T00:05:00+00:00", seconds=61.0,
    ).write(place.published("smoke"))  # fmt: skip
    return place


def test_a_page_has_what_a_reader_wants_and_nothing_else(place):
    page = report("smoke", place.root).read_text("utf-8")
    for there in ("The question", "printed", PIXEL, "<b>how sliders stand</b>", "<strong>computed"):
        assert there in page
    assert "a bar" not in page and "VBox" not in page
    assert page.count("<summary>code</summary>") == 1
    for told in ("python -m earlyexit run --only 01", "c0ffeec0ff", "A processor", "seeds [3]"):
        assert told in page
    assert "not run here: 02_plot" in page


def test_a_page_loads_nothing(place):
    page = report("smoke", place.root).read_text("utf-8")
    assert not re.search(r"<script[^>]*\bsrc|<link[^>]*\bhref|@import|cdnjs|unpkg", page)
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)[^)]*\)", page)


def test_a_copy_of_another_run_than_the_record_is_said_to_be_one(place):
    write(
        executed("2026-01-02T00:00:00", "2026-01-02T00:10:00"), place.executed("smoke", "01_build")
    )
    page = report("smoke", place.root).read_text("utf-8")
    assert "No record of results is of this run" in page and "A processor" not in page


def test_without_an_executed_copy_it_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(HOME_VARIABLE, str(write_project(tmp_path)))
    assert main(["report", "--profile", "smoke"]) == 1
    said = capsys.readouterr().err
    assert "build/smoke" in said and "`python -m earlyexit run --profile smoke --force`" in said


def test_a_changed_profile_has_a_report_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(HOME_VARIABLE, str(write_project(tmp_path)))
    assert main(["report", "--profile", "smoke~epochs=2.0"]) == 1
    assert "no executed notebook in build/smoke~epochs=2.0" in capsys.readouterr().err
    assert main(["report", "--profile", "nope~epochs=2.0"]) == 2
