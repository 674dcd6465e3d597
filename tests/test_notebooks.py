"""The real notebooks on the smallest profile. Slow, because it is the whole series, really run."""

from __future__ import annotations

import re
import shutil

import nbformat
import papermill
import pytest
from bs4 import BeautifulSoup
from paper import width

from earlyexit import stages
from earlyexit.runs import cache, provenance, runner
from earlyexit.runs.cache import NotTrained
from earlyexit.runs.freshness import all_published, discover, published
from earlyexit.runs.paths import HOME_VARIABLE, PACKAGE, project
from earlyexit.runs.report import report
from earlyexit.runs.settings import Settings, resolve
from earlyexit.runs.tables import TEXT_WIDTH
from earlyexit.runs.workers import JOBS
from earlyexit.study import COLUMNS, ROWS, Study

pytestmark = pytest.mark.slow
NOTEBOOKS = [path.stem for path in discover(project())]
# One parameter each, with a value that leaves something out: no exit, no certificate, one size.
CHANGED = [
    ("01_build", {"seeds": (0, 1)}),
    ("01_build", {"sets": ("depths=[2]",)}),
    ("01_build", {"sets": ("model.n_layers=2",)}),
    ("02_calibration", {"sets": ("epsilon=0.000001",)}),
    ("03_threshold_sweep", {"sets": ("epsilons=[0.3]",)}),
    ("03_threshold_sweep", {"sets": ('recipes=["frozen"]',)}),
    ("04_speedup_breakdown", {"sets": ("epsilon=0.000001",)}),
    ("05_memory_profiling", {"sets": ("lengths=[64]",)}),
    ("06_guarantees", {"sets": ("epsilons=[0.00001]",)}),
    ("06_guarantees", {"sets": ("criterion=entropy",)}),
    ("07_combinations", {"sets": ("epsilon=0.000001",)}),
    ("08_study", {"sets": ('criteria=["entropy"]',)}),
    ("08_study", {"sets": ("epsilons=[0.000001]",)}),
    ("09_existing_models", {"sets": ("assisted_tokens=0",)}),
]
WRITES = re.compile(r"\*\*Writes\*\*.*")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A project with the notebooks and nothing else, after one run."""
    place = project(tmp_path_factory.mktemp("series"))
    shutil.copytree(project().notebooks, place.notebooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # models this small gain nothing from a second thread
        assert runner.run(Settings("smoke"), root=place.root) == NOTEBOOKS
    return place


def outputs_of(place, name):
    return outputs(nbformat.read(place.executed("smoke", name), as_version=4))


def is_picture(path):
    return path.endswith(".png")


def outputs(executed):
    return [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]


def assert_says_numbers(shown):
    said = [o.data["text/markdown"] for o in shown if "text/markdown" in o.get("data", {})]
    assert said and not [text for text in said if re.search(r"\b(nan|inf|None)\b", text)]


def assert_shows_figures_once_and_small_tables(shown, files):
    images = [o for o in shown if "image/png" in o.get("data", {})]
    assert len(images) == sum(map(is_picture, files))
    pages = (BeautifulSoup(o.get("data", {}).get("text/html", ""), "html.parser") for o in shown)
    for table in (table for page in pages for table in page.select("table.dataframe")):
        rows = [row.find_all("td") for row in table.select("tbody tr")]
        assert len(rows) <= ROWS and max(map(len, rows)) <= COLUMNS


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
    shown = outputs_of(series, name)
    assert_says_numbers(shown)
    heard = [o.text for o in shown if o.output_type == "stream" and o.name == "stderr"]
    assert not [text for text in heard if "Warning" in text]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_each_figure_once_and_small_tables(series, name):
    files = published(series, "smoke", name).files
    assert_shows_figures_once_and_small_tables(outputs_of(series, name), files)


def test_the_report_shows_each_figure_once(series):
    page = report("smoke", series.root).read_text("utf-8")
    files = [path for record in all_published(series) for path in record.files]
    assert page.count('<img alt="figure of the code above"') == sum(map(is_picture, files))


@pytest.mark.notebooks
@pytest.mark.parametrize(("name", "change"), CHANGED)
def test_a_notebook_survives_a_changed_parameter(series, monkeypatch, name, change):
    """By hand, as in JupyterLab, beside what the run published."""
    monkeypatch.setenv(HOME_VARIABLE, str(series.root))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.rmtree(series.build / "by-hand", ignore_errors=True)
    path = series.notebooks / f"{name}.ipynb"
    parameters = resolve(Settings("smoke", **change), [path]).parameters[name]
    options = {"kernel_name": "python3", "language": "python", "cwd": path.parent}
    shown = outputs(papermill.execute_notebook(path, None, parameters, **options))
    (record,) = provenance.read_records(next((series.build / "by-hand").iterdir()))
    assert record.notebook == name and record.command == "by hand"
    assert_says_numbers(shown)
    assert_shows_figures_once_and_small_tables(shown, record.files)


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


def test_the_stages_train_all_that_the_notebooks_do(series, tmp_path, monkeypatch):
    for folder in ("notebooks", ".cache"):  # no results, whose losses would do
        shutil.copytree(series.root / folder, tmp_path / folder)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv(JOBS, "1")
    trained = {path.stem for path in series.cache.glob("models/[!.]*")}
    read, asked = cache._cached_model, set()

    def asking(path, *rest):
        asked.add(path.stem)
        return read(path, *rest)

    monkeypatch.setattr(cache, "_cached_model", asking)
    for stage in stages.STAGES:
        stages.run(Settings("smoke"), stage)
    assert asked == trained


def test_published_weights_stand_in_for_a_training(series, tmp_path, monkeypatch):
    for folder in ("notebooks", "results", ".cache/corpus"):
        shutil.copytree(series.root / folder, tmp_path / folder)
    seen = []
    for root in (series.root, tmp_path):
        monkeypatch.setenv(HOME_VARIABLE, str(root))
        seen.append(Study("02_calibration", {"profile": "smoke"}).model(0))
    assert not (tmp_path / ".cache/models").exists()
    trained, published = seen
    assert published.model.fingerprint() == trained.model.fingerprint()
    assert published.model_hash == trained.model_hash  # so that traces are shared
    with pytest.raises(NotTrained, match="run 01_build first"):  # another recipe
        Study("02_calibration", {"profile": "smoke", "overrides": {"epochs": 9.0}}).model(0)
