"""Digests change with what can change a result, and with nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import BUILD, write_notebook

from earlyexit.runs import digests

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.fixture
def package(tmp_path):
    """``pack``: a imports b in a function, b imports c; sub re-exports d; lone is on its own."""
    files = {
        "__init__.py": "from pack.a import A\nfrom .lone import Lone as Alone\n",
        "a.py": "class A:\n    def f(self):\n        from pack.b import B\n        return B\n",
        "b.py": "import pack.c\nB = 1\n",
        "c.py": "C = 1\n",
        "lone.py": "Lone = 1\n",
        "sub/__init__.py": "from .d import D\nfrom .e import E\n",
        "sub/d.py": "from ..c import C\nD = C\n",
        "sub/e.py": "E = 1\n",
    }
    for name, source in files.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "pack"


def used(package, cell):
    """The package's files behind a notebook of one cell."""
    path = write_notebook(package.parent, "01_x", [cell])
    return {name.removeprefix("pack/") for name in digests.of_notebook(path, package)} - {
        "code cells"
    }


@pytest.mark.parametrize(
    ("cell", "files"),
    [
        ("from pack import A", {"a.py", "b.py", "c.py"}),
        ("from pack import Alone", {"lone.py"}),
        ("from pack import b", {"b.py", "c.py"}),
        ("import pack.c as c", {"c.py"}),
        ("def f():\n    from pack.sub import D", {"sub/d.py", "c.py"}),
        ("from pack.sub.e import E", {"sub/e.py"}),
        ("import pack", {"__init__.py", "a.py", "b.py", "c.py", "lone.py"}),
        ("from pack import *", {"__init__.py", "a.py", "b.py", "c.py", "lone.py"}),
        ("%matplotlib inline\nimport numpy\nfrom pack.lone import Lone", {"lone.py"}),
        ("import packaging", set()),
    ],
)
def test_a_notebook_depends_on_what_it_imports(package, cell, files):
    assert used(package, cell) == files


def test_a_module_digest_names_the_file_that_changed(package):
    before = digests.of_modules("pack.a", package=package)
    (package / "c.py").write_text('"""Now with a docstring."""\n\nC = 1  # why\n')
    (package / "lone.py").write_text("Lone = 2\n")
    assert digests.of_modules("pack.a", package=package) == before
    (package / "c.py").write_text("C = 2\n")
    after = digests.of_modules("pack.a", package=package)
    assert {name for name in before if before[name] != after[name]} == {"pack/c.py"}
    with pytest.raises(FileNotFoundError, match=r"pack\.gone"):
        digests.of_modules("pack.gone", package=package)


def test_source_digest_ignores_words_and_layout_only():
    plain = "def f(x):\n    return x + 1\n"
    told = 'def f(x):\n    """Adds."""\n\n    # one\n    return (x +\n            1)\n'
    assert digests.of_source(plain) == digests.of_source(told)
    assert digests.of_source(plain) != digests.of_source(plain.replace("1", "2"))
    # a string that is used is no docstring
    assert digests.of_source('x = "a"') != digests.of_source('x = "b"')


def test_notebook_digest_survives_saving_but_not_editing(tmp_path):
    path = write_notebook(tmp_path, "01_x", [BUILD], extra="rows: int = 3  # of the table\n")
    before = digests.of_notebook(path)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# Prose"))
    notebook.cells[-1].execution_count = 7
    notebook.cells[-1].source += "# said\n"
    nbformat.write(notebook, path)
    assert digests.of_notebook(path) == before
    assert digests.notebook_parameters(path)["rows"] == ("int", 3)
    notebook.cells[-1].source += "rows = 4\n"
    nbformat.write(notebook, path)
    changed = digests.of_notebook(path)
    assert {k for k in before if before[k] != changed[k]} == {"code cells"}


@pytest.mark.parametrize("line", ["n = 3", "n: int = f()", "n: int", "import os"])
def test_parameters_must_be_annotated_literals(tmp_path, line):
    path = write_notebook(tmp_path, "01_x", [], extra=line + "\n")
    with pytest.raises(ValueError, match="not an annotated literal"):
        digests.notebook_parameters(path)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), VALUES))
def test_object_digest_ignores_order(value):
    turned = dict(reversed(value.items()))
    assert digests.of_object(value) == digests.of_object(turned)


def test_object_digest_knows_dataclasses_and_refuses_the_rest():
    @dataclass
    class Config:
        width: int = 3
        seeds: tuple = (0, 1)

    assert digests.of_object(Config()) == digests.of_object({"seeds": [0, 1], "width": 3})
    assert digests.of_object(Config()) != digests.of_object(Config(4))
    with pytest.raises(TypeError, match="no digest of a set"):
        digests.of_object({"a": {1}})


def test_folder_digest_is_of_names_and_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    before = digests.of_files(tmp_path)
    (tmp_path / ".cache").write_text("hidden")
    assert digests.of_files(tmp_path) == before
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert digests.of_files(tmp_path) != before
