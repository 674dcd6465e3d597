"""The commands that the README offers for runs of a reader's own, really run on the smallest profile."""

from __future__ import annotations

import re
import shlex
import shutil
from pydoc_data.topics import topics

import pytest

from earlyexit.__main__ import main
from earlyexit.runs.paths import HOME_VARIABLE, project

pytestmark = pytest.mark.slow
# Little text, and of the first notebook's side studies, which no command is about, one case each.
LITTLE = [
    "max_train_tokens=12000", "leak_tokens=2000", "memory_tokens=500", "depth_tokens=2000",
    "ablation_tokens=2000", "controls=[]", "depths=[3]", 'changes=["as it is"]',
]  # fmt: skip
LITTLE_SWEEP = ['recipes=["joint"]', "recipe_tokens=2000", "target_tokens=1000"]  # of the third


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project with the notebooks and nothing else; its commands share one cache."""
    place = project(tmp_path_factory.mktemp("commands"))
    shutil.copytree(project().notebooks, place.notebooks)
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of the reader's own."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in topics.items():
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder


def readme_commands() -> list[str]:
    """Those with settings, each once."""
    lines = re.findall(r"python -m earlyexit (run[^`#\n]*)", project().readme.read_text("utf-8"))
    return sorted({line.strip() for line in lines if "--set" in line or "--seeds" in line})


@pytest.mark.parametrize("line", readme_commands())
def test_the_readme_s_commands_run(place, texts, monkeypatch, line):
    """Where a command names no notebook, the first one."""
    monkeypatch.setenv(HOME_VARIABLE, str(place.root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [*shlex.split(line), "--profile", "smoke", "--set", *LITTLE]
    arguments += LITTLE_SWEEP if "03" in arguments else []
    if "--only" not in arguments:
        arguments += ["--only", "01"]
    arguments = [str(texts) if word == "DIR" else word for word in arguments]
    before = set(place.results.glob("*"))
    assert main(arguments) == 0
    (folder,) = set(place.results.glob("*")) - before
    assert folder.name.startswith("smoke~")
    assert list(folder.glob("*.run.json"))
