"""What the project says about itself in several places agrees."""

from __future__ import annotations

import io
import json
import tokenize
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from earlyexit.runs import digests
from earlyexit.runs.paths import project

ROOT = project().root
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Without what pip must install by itself, for it would bring others.
EXTRAS = [lines for name, lines in PROJECT["optional-dependencies"].items() if name != "smollm"]
DECLARED = [
    requirement
    for requirement in map(Requirement, sum(EXTRAS, PROJECT["dependencies"]))
    if requirement.name != PROJECT["name"]
]
# What every notebook takes, and its annotation in the parameters cell.
COMMON = {
    "profile": "str",
    "seeds": "list",
    "data_dir": "str",
    "device": "str",
    "overrides": "dict",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_lock_has_every_declared_dependency():
    for requirement in DECLARED:
        version = locked()[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against {version} in the lock"
    assert not any("+" in version for version in locked().values())  # no local builds


def test_conda_declares_python_and_leaves_the_rest_to_pyproject():
    text = (ROOT / "environment.yml").read_text()
    environment = yaml.safe_load(text)
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, installed = environment["dependencies"]
    name, version = python.split("=")
    assert (name, pip) == ("python", "pip")
    assert f"{version}.0" in SpecifierSet(PROJECT["requires-python"])
    assert installed == {"pip": ["-c requirements.lock", '-e ".[dev]"']}
    (torch,) = (r.specifier for r in DECLARED if r.name == "torch")
    assert f"# - pytorch-gpu{str(torch)[1:]}\n" in text  # conda pins with one sign of equality


@each_notebook
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@each_notebook
def test_a_notebook_opens_with_its_question_and_its_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert "parameters" in cells[1]["metadata"].get("tags", [])
    declared = digests.notebook_parameters(path)
    assert {key: declared[key][0] for key in COMMON} == COMMON
    source = "".join(cells[1]["source"])
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    assert len(comments) >= len(declared), "each parameter is explained beside it"
