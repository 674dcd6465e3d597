"""The runner on a project of two notebooks: what runs, why, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import psutil
import pytest
from tiny_project import write_notebook, write_project

from earlyexit.__main__ import main
from earlyexit.runs import (
    artifacts,
    decoders,
    digests,
    execute,
    freshness,
    profiles,
    provenance,
    runner,
)
from earlyexit.runs.freshness import RunError
from earlyexit.runs.parameters import COMMON, ExistingModels, as_dict
from earlyexit.runs.paths import HOME_VARIABLE, PACKAGE, project
from earlyexit.runs.profiles import get_profile
from earlyexit.runs.provenance import FORMAT, Fingerprint, Record
from earlyexit.runs.settings import Settings, UsageError, resolve

SMOKE = Settings("smoke")
COMMAND = [sys.executable, "-m", "earlyexit", "run", "--profile", "smoke"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose series has run, although another ``python3`` kernel is registered first.

    Tests leave it as it was.
    """
    root = write_project(tmp_path_factory.mktemp("project"))
    other = tmp_path_factory.mktemp("jupyter")
    spec = other / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "?", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(other))
        assert runner.run(SMOKE, root=root) == ["01_build", "02_plot"]
    return root


def states(root, settings=SMOKE) -> list[str]:
    """How the results of each notebook stand, in words."""
    return [step.state for step in runner.plan(settings, root=root).steps]


def why(root, settings=SMOKE, only=()):
    """Notebook → reasons to run it."""
    return {step.notebook: step.reasons for step in runner.plan(settings, only, root).steps}


def environment(root):
    return os.environ | {HOME_VARIABLE: str(root), "PYTHONPATH": str(PACKAGE.parent)}


def assert_nothing_half_written(root):
    """What is there is whole, or refused by the one function that reads it."""
    with suppress(artifacts.MissingResult):
        assert list(artifacts.read_table("smoke", "numbers", root).x) == [0, 1, 2]
    for path in [*root.rglob("*.json"), *root.glob("build/*/[!.]*.ipynb")]:
        json.loads(path.read_text())


@pytest.mark.slow
def test_a_finished_series_is_fresh_and_says_where_it_ran(finished):
    assert why(finished) == {"01_build": [], "02_plot": []}
    assert runner.run(SMOKE, root=finished) == []
    executed = nbformat.read(finished / "build/smoke/01_build.ipynb", as_version=4)
    printed = [o.text.strip() for c in executed.cells for o in c.get("outputs", []) if "text" in o]
    assert printed == [sys.executable]
    record = freshness.published(project(finished), "smoke", "01_build")
    assert record.command == "python -m earlyexit run --profile smoke --only=01_build"
    assert record.parameters["rows"] == 3 and record.parameters["device"] == "auto"
    assert set(record.files) == {"results/smoke/numbers.csv", "results/smoke/numbers.tex"}
    assert record.hardware["cpu"] and record.seconds > 0
    assert not list(finished.rglob("*.tmp*")) and not list(finished.rglob("*.out"))
    assert not list(finished.rglob("by-hand"))


@pytest.mark.slow
def test_a_notebook_run_by_hand_publishes_nothing(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("results/**/*.*")}
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    notebook = tmp_path / "notebooks/01_build.ipynb"
    papermill.execute_notebook(
        notebook, None, {"rows": 5}, kernel_name="python3", language="python"
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("results/**/*.*")} == before
    assert why(tmp_path) == {"01_build": [], "02_plot": []}
    record = provenance.read_record(project(tmp_path).by_hand("smoke"), "01_build")
    assert record.parameters["rows"] == 5 and record.command == "by hand"
    assert len(artifacts.read_table("smoke", "numbers", tmp_path, by_hand=True)) == 5
    assert len(artifacts.read_table("smoke", "numbers", tmp_path)) == 3  # what is published


@pytest.mark.slow
def test_a_clone_takes_what_is_published_and_runs_nothing(finished, tmp_path):
    for folder in ("notebooks", "results", "figures"):
        shutil.copytree(finished / folder, tmp_path / folder)
    assert why(tmp_path) == {"01_build": [], "02_plot": []}
    assert runner.run(SMOKE, root=tmp_path) == []
    assert states(tmp_path) == ["published, not run here"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", ["truncated", "foreign", "no JSON", "deep", "another's", "elsewhere", "settings"]
)
def test_a_damaged_record_stops_nobody_else(finished, tmp_path, caplog, damage):
    for folder in ("notebooks", "results", "figures"):
        shutil.copytree(finished / folder, tmp_path / folder)
    path = tmp_path / "results/smoke/02_plot.run.json"
    text = path.read_bytes()
    changed = {
        "truncated": text[:-50],
        "foreign": b"[1]",
        "no JSON": b"\xff",
        "deep": b"[" * 10**5,
        "another's": path.with_name("01_build.run.json").read_bytes(),
        "elsewhere": text.replace(b"figures/smoke/line.pdf", b"results/../../line.pdf"),
        "settings": text.replace(b'"profile": "smoke",\n  "seeds"', b'"profile": 3,\n  "seeds"'),
    }
    assert changed[damage] != text
    path.write_bytes(changed[damage])
    assert why(tmp_path) == {"01_build": [], "02_plot": ["never run"]}
    assert [plan.label for plan in runner.status(root=tmp_path)] == ["smoke"]
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and said[0].startswith("smoke/02_plot.run.json is no record (")


@pytest.mark.slow
def test_a_flipped_bit_in_a_record_concerns_its_notebook_alone(finished, tmp_path):
    for folder in ("notebooks", "results", "figures"):
        shutil.copytree(finished / folder, tmp_path / folder)
    path, places = tmp_path / "results/smoke/02_plot.run.json", random.Random(0)
    whole = path.read_bytes()
    for _ in range(15):
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        assert why(tmp_path)["01_build"] == []
        assert [plan.label for plan in runner.status(root=tmp_path)] == ["smoke"]


@pytest.mark.slow
def test_what_an_earlier_version_made_is_kept_while_its_files_are_whole(
    finished, tmp_path, caplog, monkeypatch
):
    for folder in ("notebooks", "results", "figures"):
        shutil.copytree(finished / folder, tmp_path / folder)
    record = freshness.published(project(tmp_path), "smoke", "01_build")
    old = replace(record.fingerprint, code={"earlyexit/stages.py": "0"}, parameters={})
    replace(record, format=1, fingerprint=old).write(tmp_path / "results/smoke")
    assert why(tmp_path) == {"01_build": [], "02_plot": []}
    assert "by an earlier version" in runner.plan(SMOKE, root=tmp_path).steps[0].basis
    (tmp_path / "results/smoke/numbers.tex").unlink()
    assert why(tmp_path)["01_build"] == ["results/smoke/numbers.tex missing"]


@pytest.mark.slow
def test_status_names_what_is_stale_and_why(finished, monkeypatch):
    assert why(finished, Settings("smoke", seeds=(0, 1)))["01_build"] == ["never run"]
    assert states(finished, Settings("smoke", seeds=(0, 1))) == ["not run yet"] * 2
    assert states(finished) == ["fresh"] * 2
    assert why(finished, Settings("smoke", seeds=(0,))) == why(finished)
    csv = finished / "results/smoke/numbers.csv"
    before = csv.read_bytes()
    csv.write_bytes(before + b"0,9\n")
    assert why(finished) == {
        "01_build": ["results/smoke/numbers.csv changed since its run"],
        "02_plot": ["input 01_build will be made again"],
    }
    assert states(finished) == ["stale"] * 2
    csv.unlink()
    assert why(finished)["01_build"] == ["results/smoke/numbers.csv missing"]
    csv.write_bytes(before)

    record = finished / "results/smoke/02_plot.run.json"
    kept = record.read_text()
    changed = json.loads(kept)
    changed["fingerprint"]["code"]["earlyexit/runs/artifacts.py:Outputs"] = "other"
    changed["fingerprint"]["inputs"]["01_build"] = "other"
    record.write_text(json.dumps(changed))
    assert why(finished)["02_plot"] == [
        "earlyexit/runs/artifacts.py:Outputs changed",
        "input 01_build changed",
    ]
    record.write_text(kept)

    monkeypatch.setitem(
        profiles.PROFILES, "smoke", replace(get_profile("smoke", {"epochs": 9.0}), about="longer")
    )
    assert why(finished)["01_build"] == ["parameter epochs: 1.0 -> 9.0"]
    monkeypatch.undo()
    assert [plan.label for plan in runner.status(root=finished)] == ["smoke"]
    assert why(finished) == {"01_build": [], "02_plot": []}


@pytest.mark.slow
def test_a_run_makes_only_what_changed_and_removes_what_is_no_longer_made(tmp_path):
    root = write_project(tmp_path)
    cell = (
        "import pandas as pd\n"
        "from earlyexit.runs.artifacts import Outputs, run_label\n"
        "table = pd.DataFrame({'seed': [0], 'x': [1]})\n"
        "Outputs(run_label(profile, overrides), '01_build', {}).table(table, 'first', 'T')"
    )
    write_notebook(root, "01_build", [cell])
    assert runner.run(SMOKE, only=("1",), root=root) == ["01_build"]
    write_notebook(root, "01_build", [cell.replace("first", "second")])
    assert why(root, only=("01",)) == {"01_build": ["code cells changed"]}
    assert runner.run(SMOKE, only=("01_build",), root=root) == ["01_build"]
    names = {path.name for path in (root / "results/smoke").iterdir()}
    assert names == {"second.csv", "second.tex", "01_build.run.json"}


@pytest.mark.slow
def test_a_failed_notebook_is_kept_aside_and_the_cell_named(tmp_path, monkeypatch, capsys):
    root = write_project(tmp_path)
    write_notebook(root, "01_build", ["x = 1", "raise ValueError('no\\nluck')"])
    monkeypatch.setenv(HOME_VARIABLE, str(root))
    assert main(["run", "--profile", "smoke"]) == 1
    said = capsys.readouterr().err
    assert "01_build failed in cell In [4]: ValueError: no" in said
    assert "see build/smoke/01_build.failed.ipynb" in said
    assert [p.name for p in (root / "build/smoke").glob("*.ipynb")] == ["01_build.failed.ipynb"]
    assert not (root / "results").exists()

    write_notebook(root, "01_build", ["x = ("])
    with pytest.raises(UsageError, match=r"01_build\.ipynb: .*never closed"):
        runner.run(SMOKE, root=root)
    write_notebook(root, "01_build", ["import sys\nsys.exit(0)"])
    with pytest.raises(RunError, match="without writing any table or figure"):
        runner.run(SMOKE, root=root)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--profile", "huge"], "unknown profile 'huge'; choose one of smoke, cpu"),
        (["--set", "rowz=3"], "no such key; profile fields: corpus"),
        (["--set", "rows=3.5"], "rows=3.5: must be a whole number"),
        (["--set", "rows"], "expected key=value"),
        (["--set", "epochs=many"], "epochs='many': must be a number"),
        (["--set", "model.bk_heads=0"], "bk_heads=0: must be ≥ 1"),
        (["--set", "corpus=nope"], "name='nope': must be 'sotu', 'wikitext-2'"),
        (["--set", "corpus=folder"], "corpus 'folder' needs data_dir"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (["--set", "seeds=[1]"], "use --seeds"),
        (["--set", "overrides={}"], "name the profile's fields"),
        (["--only", "7"], "--only 7: no such notebook; 01_build, 02_plot"),
        (["--only", "02", "--set", "epochs=2"], "02_plot needs 01_build"),
        (["--data-dir", "nowhere"], "no folder nowhere"),
    ],
)
def test_wrong_usage_is_told_in_one_line_before_anything_runs(
    tmp_path, monkeypatch, capsys, arguments, complaint
):
    root = write_project(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(root))
    files = sorted(root.rglob("*"))
    assert main(["run", "--profile", "smoke", *arguments]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert sorted(root.rglob("*")) == files


@pytest.mark.parametrize("option", ["--dry-run", "--force"])
def test_text_that_cannot_be_had_is_told_before_anything_runs(
    tmp_path, monkeypatch, capsys, option
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    root = write_project(tmp_path / "project")
    monkeypatch.setenv(HOME_VARIABLE, str(root))
    files = sorted(root.rglob("*"))
    assert main(["run", "--profile", "wikitext2", option]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("earlyexit: --data-dir: cannot load wikitext-2-v1")
        and said.count("\n") == 1
    )
    assert sorted(root.rglob("*")) == files
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("train", "valid", "test"):
        (texts / f"{name}.txt").write_text(" \n = A = \n \n b \n \n = C = \n \n d \n")
    local = ["--data-dir", str(texts), "--set", "certify_articles=0"]
    assert main(["run", "--profile", "wikitext2", *local, "--dry-run"]) == 0


def test_local_text_counts_by_its_content(tmp_path):
    place = project(write_project(tmp_path / "project"))
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one")
    path = freshness.discover(place)[0]

    def now(data_dir):
        settings = Settings("smoke", sets=("corpus=folder",), data_dir=data_dir and str(data_dir))
        resolved = resolve(settings, [path])
        return freshness.fingerprint(place, path, resolved, [])

    first = now(text)
    assert str(tmp_path) not in repr(first)
    text = text.rename(tmp_path / "elsewhere")
    assert freshness.differences(first, now(text)) == []
    assert freshness.differences(first, now(None)) == []
    (text / "a.txt").write_text("two")
    assert freshness.differences(first, now(text)) == ["input text in data_dir changed"]


def test_what_tells_changes_is_no_change_itself():
    before = {"earlyexit/runs/digests.py:of_code": "1", "earlyexit/study.py:Study": "2"}
    after = {"earlyexit/runs/digests.py:of_code": "3", "earlyexit/study.py:Study": "4"}
    first, then = (Fingerprint({}, code, {}) for code in (before, after))
    assert freshness.differences(first, then) == ["earlyexit/study.py:Study changed"]


def test_the_estimate_is_the_last_time_or_scaled_by_work():
    def record(label, seconds, work):
        plain = ("", "", {}, None, None, {}, {}, "")
        return Record("01", label, *plain, seconds=seconds, work=work)

    known = [record("cpu", 120, 4.0), record("smoke", 6, 0.1)]
    assert freshness.minutes("01", "cpu", 4.0, known) == (2.0, "last run")
    alone = freshness.minutes("01", "wikitext2", 40.0, known[:1])
    assert alone == (pytest.approx(20.0), "rough")
    assert freshness.minutes("01", "cpu~corpus=folder", None, known) == (None, "unknown")
    assert freshness.minutes("02", "cpu", 4.0, known) == (None, "unknown")
    profile = get_profile("cpu")
    assert freshness.training_work(profile, 3) == 3 * freshness.training_work(profile, 1)
    assert freshness.training_work(get_profile("cpu", {"corpus": "folder"}, "text"), 1) is None


def test_only_one_run_writes_a_notebook_s_results(tmp_path):
    root = write_project(tmp_path)
    with (
        runner._only_writer(project(root), "smoke", "02_plot"),
        pytest.raises(RunError, match="another run is writing smoke/02_plot"),
    ):
        runner.run(SMOKE, root=root)


@pytest.mark.slow
def test_killed_while_publishing_the_notebook_runs_again(finished, tmp_path, monkeypatch):
    """After each file that was put in its place, and before the record."""
    for folder in ("notebooks", "results", "figures"):
        shutil.copytree(finished / folder, tmp_path / folder)
    place = project(tmp_path)
    before = freshness.published(place, "smoke", "01_build")
    folder = tmp_path / "build/smoke/01_build.out"
    for killed_after in range(3):
        (folder / "results").mkdir(parents=True, exist_ok=True)
        files = {}
        for name, file in before.files.items():
            new = folder / "results" / name.rpartition("/")[2]
            new.write_text(f"seed,x\n0,{killed_after}\n")
            digest = digests.of_file(new)
            files[f"results/{new.name}"] = replace(file, sha256=digest)
        copies = iter(range(killed_after))

        def copy(source, target, copies=copies):
            next(copies)  # StopIteration: killed
            Path(target).write_bytes(Path(source).read_bytes())

        monkeypatch.setattr(execute.shutil, "copyfile", copy)
        if killed_after < 2:
            with pytest.raises(StopIteration):
                execute.publish(place, replace(before, files=files), folder)
            why_now = why(tmp_path)["01_build"]
            assert bool(why_now) == (killed_after > 0)
            assert freshness.published(place, "smoke", "01_build") == before
        else:
            execute.publish(place, replace(before, files=files), folder)
            assert list(artifacts.read_table("smoke", "numbers", tmp_path).x) == [2]
            assert why(tmp_path)["02_plot"] == ["input 01_build changed"]


@pytest.mark.parametrize("asked", [0.05, 0.4, 1.0, 9.0, 30.0])
def test_the_estimate_is_within_a_factor_of_one_and_a_half(asked):
    """Of a time that every run takes, and one in proportion to its work, each run ±15 % off."""
    noise = random.Random(0)

    def seconds(work):
        return 25 + 300 * work

    def record(work, seconds, version=FORMAT):
        plain = ("", "", {}, None, None, {}, {}, "")
        return Record("01", f"{work}", *plain, seconds=seconds, work=work, format=version)

    known = [record(w, seconds(w) * noise.uniform(0.85, 1.15)) for w in (0.1, 3.0, 12.0)]
    slow = [record(w, 10 * seconds(w), version=1) for w in (0.2, 5.0)]  # of an earlier version
    found, basis = freshness.minutes("01", "asked", asked, [*slow, *known])
    assert basis == "rough" and 1 / 1.5 < 60 * found / seconds(asked) < 1.5
    distorted, _ = freshness.minutes("01", "asked", asked, slow)  # where nothing else is known
    assert 60 * distorted == pytest.approx(10 * seconds(asked))


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_completes(tmp_path):
    """SIGKILL at seeded moments of the series, SIGINT at last; then a run to the end."""
    root = write_project(tmp_path)
    moments = random.Random(0)
    for _ in range(3):
        started = subprocess.Popen(COMMAND, env=environment(root), stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(1.5, 6.0))
        kernels = psutil.Process(started.pid).children(recursive=True)
        started.kill()  # the system releases its lock
        started.wait()
        assert not psutil.wait_procs(kernels, timeout=10)[1]  # they watch their parent
        assert_nothing_half_written(root)
    copy = root / "build/smoke/.01_build.tmp.ipynb"
    copy.unlink(missing_ok=True)  # of a killed run
    started = subprocess.Popen(
        [*COMMAND, "--force"],
        env=environment(root),
        stderr=subprocess.PIPE,
        # A shell's background job passes on that it ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not copy.exists():
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert b"interrupted" in started.communicate(timeout=30)[1]
    assert started.returncode == 130
    assert_nothing_half_written(root)
    assert not copy.exists()
    for left in root.rglob(".*.tmp"):
        os.utime(left, (0, 0))  # as after an hour
    assert subprocess.run(COMMAND, env=environment(root), check=False).returncode == 0
    assert why(root) == {"01_build": [], "02_plot": []}
    assert not list(root.rglob("*.tmp*"))


def test_a_notebook_of_existing_models_is_left_out_where_transformers_is_not(
    tmp_path, monkeypatch, caplog, capsys
):
    """It is said before anything runs; one that was asked for by name stops the run at once."""
    write_project(tmp_path)
    own = {name: value for name, value in as_dict(ExistingModels()).items() if name not in COMMON}
    extra = "".join(f"{name}: {type(value).__name__} = {value!r}\n" for name, value in own.items())
    write_notebook(tmp_path, "09_existing_models", ["raise ValueError"], extra=extra)
    monkeypatch.setattr(decoders, "find_spec", lambda name: None)
    ran = []
    monkeypatch.setattr(runner, "execute", lambda place, path, *others: ran.append(path.stem))
    assert states(tmp_path) == ["not run yet", "not run yet", "left out"]
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert main(["run", "--profile", "smoke", "--dry-run"]) == 0
    assert "09_existing_models     left out" in (said := capsys.readouterr().out)
    assert "pip install -e '.[hf]'" in said and "to do: 2 of 3" in said
    for force in ([], ["--force"]):
        ran.clear()
        assert main(["run", "--profile", "smoke", *force]) == 0
        assert ran == ["01_build", "02_plot"]
        assert "09_existing_models is left out: existing models need transformers" in caplog.text
    assert main(["run", "--profile", "smoke", "--only", "01", "09"]) == 2
    assert "09_existing_models: existing models need" in capsys.readouterr().err
    assert ran == ["01_build", "02_plot"]


def test_another_notebook_s_table_counts_where_it_is_read(tmp_path):
    """And the training, which tells the weights, always; a name outside a cell that reads does not."""
    cells = ['x = "costs"', 'study.read_table("depth")']
    path = tmp_path / "03_read.ipynb"
    path.write_text(
        json.dumps({"cells": [{"cell_type": "code", "source": c, "metadata": {}} for c in cells]})
    )

    def digest(**tables):
        files = {f"results/cpu/{name}.csv": SimpleNamespace(sha256=s) for name, s in tables.items()}
        return freshness.tables_read(path, SimpleNamespace(files=files))

    known = {"training": "a", "depth": "b", "costs": "c"}
    assert digest(**known) == digest(**known | {"costs": "other"})
    assert digest(**known) != digest(**known | {"depth": "other"})
    assert digest(**known) != digest(**known | {"training": "other"})
    assert freshness.tables_read(path, None) is None
