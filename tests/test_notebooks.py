"""The real notebooks on the smallest profile. Slow, because it is the whole series, really run."""

from __future__ import annotations

import re
import shutil

import nbformat
import pytest
from bs4 import BeautifulSoup
from paper import width

from earlyexit.runs import runner
from earlyexit.runs.cache import NotTrained
from earlyexit.runs.freshness import all_published, discover, published
from earlyexit.runs.paths import project
from earlyexit.runs.settings import Settings
from earlyexit.runs.tables import TEXT_WIDTH
from earlyexit.runs.workers import JOBS
from earlyexit.study import COLUMNS, ROWS, Study

pytestmark = pytest.mark.slow
NOTEBOOKS = [path.stem for path in discover(project())]
WRITES = re.compile(r"\*\*Writes\*\*.*")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A project with the notebooks and nothing else, after one run."""
    place = project(tmp_path_factory.mktemp("series"))
    shutil.copytree(project().notebooks, place.notebooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # models this small gain nothing from a second thread
        patch.setenv(JOBS, "2")  # as a run on two cores; all other tests train in one process
        assert runner.run(Settings("smoke"), root=place.root) == NOTEBOOKS
    return place


def outputs_of(place, name):
    executed = nbformat.read(place.executed("smoke", name), as_version=4)
    return [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]


def test_the_series_is_fresh_after_its_run(series):
    steps = runner.plan(Settings("smoke"), root=series.root).steps
    assert [(step.notebook, step.reasons) for step in steps] == [(n, []) for n in NOTEBOOKS]
    assert not list(series.build.glob("*/*.failed.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_writes_what_it_announces(series, name):
    source = nbformat.read(series.notebooks / f"{name}.ipynb", as_version=4)
    (announced,) = WRITES.findall(source.cells[0].source)
    kinds = {"results": set(), "figures": set()}
    for path in published(series, "smoke", name).files:
        kinds[path.split("/")[0]].add(path.split("/")[-1].split(".")[0])
    tables, _, figures = announced.partition("figure")
    assert set(re.findall(r"`(\w+)`", tables)) <= kinds["results"]
    said = set(re.findall(r"`(\w+)(?:\.json)?`", announced))
    assert said == kinds["results"] | kinds["figures"]
    assert set(re.findall(r"`(\w+)`", figures)) >= kinds["figures"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_numbers_and_complains_of_nothing(series, name):
    outputs = outputs_of(series, name)
    said = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    assert said and not [text for text in said if re.search(r"\b(nan|inf|None)\b", text)]
    heard = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not [text for text in heard if "Warning" in text]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_each_figure_once_and_small_tables(series, name):
    outputs = outputs_of(series, name)
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    figures = [p for p in published(series, "smoke", name).files if p.endswith(".png")]
    assert len(images) == len(figures)
    pages = (BeautifulSoup(o.get("data", {}).get("text/html", ""), "html.parser") for o in outputs)
    for table in (table for page in pages for table in page.select("table.dataframe")):
        rows = [row.find_all("td") for row in table.select("tbody tr")]
        assert len(rows) <= ROWS and max(map(len, rows)) <= COLUMNS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_latex_table_fits_a_page(series, name):
    texts = [p for p in published(series, "smoke", name).files if p.endswith(".tex")]
    assert texts
    for path in texts:
        assert width((series.root / path).read_text("utf-8")) <= TEXT_WIDTH, path


def test_every_result_names_its_command_text_and_machine(series):
    records = [record for record in all_published(series) if record.label == "smoke"]
    assert {record.notebook for record in records} == set(NOTEBOOKS)
    for record in records:
        assert record.command.startswith("python -m earlyexit run --profile smoke")
        assert record.hardware["cpu"] and record.versions["torch"]
        assert record.files and all(file.text_hash for file in record.files.values())


def test_published_weights_stand_in_for_a_training(series, tmp_path, monkeypatch):
    for folder in ("notebooks", "results", ".cache/corpus"):
        shutil.copytree(series.root / folder, tmp_path / folder)
    seen = []
    for root in (series.root, tmp_path):
        monkeypatch.setenv("EARLYEXIT_HOME", str(root))
        seen.append(Study("02_calibration", {"profile": "smoke"}).model(0))
    assert not (tmp_path / ".cache/models").exists()
    trained, published = seen
    assert published.model.fingerprint() == trained.model.fingerprint()
    assert published.model_hash == trained.model_hash  # so that traces are shared
    with pytest.raises(NotTrained, match="run 01_build first"):  # another recipe
        Study("02_calibration", {"profile": "smoke", "overrides": {"epochs": 9.0}}).model(0)
