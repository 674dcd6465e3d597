"""Digests change with what can change a result, and with nothing else."""

from __future__ import annotations

import ast
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import BUILD, write_notebook

from earlyexit.runs import digests
from earlyexit.runs.paths import PACKAGE, project

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.fixture
def package(tmp_path):
    """``pack``: a imports b in a function, b uses c; sub hands on d and e; style is a file."""
    files = {
        "__init__.py": "from pack.a import A\nfrom .lone import Lone as Alone\n",
        "a.py": "class A:\n    def f(self):\n        from pack.b import B\n        return B\n",
        "b.py": "import pack.c\nB = pack.c.C + 1\nother = pack.c.other\n",
        "c.py": "import warnings\n\nC, also = 1, 2\nother = 3\n",
        "lone.py": "Lone = 1\n",
        "loud.py": "import os\nos.environ['X'] = '1'\n\ndef quiet(os):\n    return os.path\n",
        "sub/__init__.py": "from .d import D\nfrom .e import E\nfrom .e import f as d\n",
        "sub/d.py": "from ..c import C\nfrom ..lone import Lone as lone\n\ndef D():\n    return C\n",
        "sub/e.py": "E = 'look.style'\nf = 2\n",
        "look.style": "red",
    }  # fmt: skip
    for name, source in files.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "pack"


def used(package, cell):
    """The package's definitions behind a notebook of one cell."""
    path = write_notebook(package.parent, "01_x", [cell])
    found = {name.removeprefix("pack/") for name in digests.of_notebook(path, package)}
    return {name.replace(".py", "") for name in found - {"code cells"}}


@pytest.mark.parametrize(
    ("cell", "definitions"),
    [
        ("from pack import A\nA()", {"a:A", "b:B", "c:C"}),
        ("from pack import A", set()),  # imported, not used
        ("from pack import Alone\nprint(Alone)", {"lone:Lone"}),
        ("from pack import b\nb.B", {"b:B", "c:C"}),
        ("from pack import c\nprint(c)", {"c:C", "c:also", "c:other"}),
        ("import pack.c as c\nc.C", {"c:C"}),
        ("import pack.c\nx = [pack.c.other for _ in 'ab']", {"c:other"}),
        ("def f():\n    from pack.sub import D\n    return D", {"sub/d:D", "c:C"}),
        ("from pack import sub\nsub.D", {"sub/d:D", "c:C"}),
        ("from pack import sub\nsub.d", {"sub/e:f"}),  # a name of the package hides its module
        ("from pack.sub.e import E\nE", {"sub/e:E", "look.style"}),
        ("from pack.loud import quiet\nquiet()", {"loud:quiet", "loud"}),
        ("from pack import loud\ndef f(loud):\n    return loud.quiet", set()),
        ("import pack\nprint(pack)", {"a:A", "b:B", "c:C", "lone:Lone"}),
        ("from pack import *", {"a:A", "b:B", "c:C", "lone:Lone"}),
        ("%matplotlib inline\nimport numpy\nfrom pack.lone import Lone\nLone", {"lone:Lone"}),
        ("import packaging\npackaging", set()),
    ],
)
def test_a_notebook_depends_on_the_definitions_that_it_uses(package, cell, definitions):
    assert used(package, cell) == definitions


def changed_by(package, file, old, new, *roots):
    """The keys of the closure of ``roots`` that one edit changes."""
    before, path = digests.of_code(*roots, package=package), package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    after = digests.of_code(*roots, package=package)
    path.write_text(text)
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_a_change_is_named_by_file_and_definition(package):
    def change(file, old, new):
        return changed_by(package, file, old, new, "pack.a.A")

    assert change("c.py", "C, also", '"""Now with a docstring."""\nC, also') == set()
    assert change("c.py", "other = 3", "other = 4") == set()
    assert change("lone.py", "1", "2") == set()
    assert change("c.py", "1, 2", "1, 3") == {"pack/c.py:C"}
    assert change("b.py", "+ 1", "+ 2") == {"pack/b.py:B"}
    with pytest.raises(LookupError, match=r"no definition pack\.a\.gone"):
        digests.of_code("pack.a.gone", package=package)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("def f(x):\n    'Adds.'\n\n    # one\n    return (x +\n            1)\n", True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(x: int):\n    return x + 1\n", False),
    ],
)
def test_words_and_layout_change_no_digest(package, other, same):
    plain = "def f(x):\n    return x + 1\n"
    (package / "a.py").write_text(plain)
    assert (changed_by(package, "a.py", plain, other, "pack.a.f") == set()) == same


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("'no'", "f'no {x}, {other()}'", True),
        ("'odd'", "'very odd', stacklevel=2", True),
        ("'even'", "f'{x} is even'", True),
        ("ValueError", "KeyError", False),
        ("x > 2", "x > 3", False),
        ("'a'", "'b'", False),  # a string that is used
    ],
)
def test_a_message_changes_no_result(package, old, new, same):
    source = """\
import warnings

def other():
    return 1

def f(x):
    if x > 2:
        raise ValueError('no')
    assert x % 2, 'even'
    warnings.warn('odd')
    return 'a'
"""
    (package / "a.py").write_text(source)
    assert (changed_by(package, "a.py", old, new, "pack.a.f") == set()) == same


@pytest.mark.parametrize("kind", ["def f(x):\n    return x\n", "class f:\n    x = 1\n"])
def test_a_decorator_that_only_checks_makes_nothing_stale(package, kind):
    (package / "a.py").write_text(f"from pack.c import other\n\n{kind}")
    checks = ["bounded(x=other)", "refused(ValueError, 'no')", "verified"]
    for decorator, same in [(c, True) for c in checks] + [("other", False), ("other(x=1)", False)]:
        bound = f"@{decorator}\n{kind}"
        assert (changed_by(package, "a.py", kind, bound, "pack.a.f") == set()) == same


def test_a_base_that_only_adds_to_the_contract_does_not_count(package):
    (package / "a.py").write_text(
        "def extra():\n    return 1\n\n"
        "class Contract:\n    def layer(self): ...\n\n"
        "class Adds(Contract):\n    def run(self):\n        return extra()\n\n"
        "class Overrides(Contract):\n    def layer(self): ...\n\n"
        "class Model(Adds, Overrides):\n    pass\n\n"
        "class Deeper(Model):\n    pass\n"
    )
    whole = set(digests.of_code("pack.a.Deeper", package=package))
    known = set(digests.of_code("pack.a.Deeper", contract="pack.a.Contract", package=package))
    assert whole - known == {"pack/a.py:Adds", "pack/a.py:extra"}


# ------------------------------------------------------------------ the package itself


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package and its notebooks, to be edited."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, root / "earlyexit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project().notebooks, root / "notebooks")
    return root / "earlyexit"


TRAINING = ("earlyexit.training.train.train", "earlyexit.models.EarlyExitLanguageModel")


def training_code(package):
    return digests.of_code(
        *TRAINING, contract="earlyexit.exits.protocol.ExitModel", package=package
    )


def edited(text, name):
    """A file with another statement in one of its definitions."""
    node = next(n for n in ast.parse(text).body if getattr(n, "name", "") == name)
    lines, last = text.splitlines(), node.body[-1]
    lines.insert(last.lineno - 1, " " * last.col_offset + "_unheard_of = 1")
    return "\n".join(lines)


def stale(copy, file, edit):
    """What one edit of the package changes: notebook → keys, and "training" → keys."""

    def now():
        books = sorted((copy.parent / "notebooks").glob("*.ipynb"))
        found = {path.stem: digests.of_notebook(path, copy) for path in books}
        return found | {"training": training_code(copy)}

    before, path = now(), copy / file
    text = path.read_text()
    changed = edit(text)
    assert changed != text
    path.write_text(changed)
    try:
        after = now()
    finally:
        path.write_text(text)
    changes = {
        key: {name for name in before[key] | after[key] if before[key].get(name) != after[key].get(name)}
        for key in before
    }  # fmt: skip
    return {key: names for key, names in changes.items() if names}


def test_editing_a_figure_makes_exactly_its_notebook_stale(copy):
    found = stale(copy, "figures/build.py", lambda text: edited(text, "leak"))
    assert found == {"01_build": {"earlyexit/figures/build.py:leak"}}


def test_a_message_of_the_text_reader_retrains_nothing(copy):
    def louder(text):
        return text.replace("raise ValueError(", "raise ValueError('!', ")

    assert stale(copy, "corpus/documents.py", louder) == {}


def test_a_training_depends_on_neither_the_text_reader_nor_running_with_exits():
    files = {name.partition(":")[0].removeprefix("earlyexit/") for name in training_code(PACKAGE)}
    assert {
        "models/resnet_bk.py",
        "training/losses.py",
        "nn/bk_core.py",
        "corpus/windows.py",
    } <= files
    assert not {"corpus/load.py", "exits/execution.py", "exits/policy.py", "exits/api.py"} & files
    assert not [
        file for file in files if file.startswith(("calibration", "runs", "figures", "cost"))
    ]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("training/optimizer.py", "factor"),
        ("nn/bk_core.py", "BKCore"),
        ("corpus/windows.py", "windows"),
        ("models/resnet_bk.py", "EarlyExitLanguageModel"),
    ],
)
def test_a_training_depends_on_its_model_and_data(copy, file, name):
    found = stale(copy, file, lambda text: edited(text, name))
    assert found["training"] == {f"earlyexit/{file}:{name}"}


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


def test_threads_make_syntax_trees_one_after_another(monkeypatch):
    parse, busy, together = ast.parse, threading.Semaphore(0), []

    def counted(*given, **options):
        together.append(busy.acquire(blocking=False))
        busy.release()
        time.sleep(0.002)  # the others arrive
        try:
            return parse(*given, **options)
        finally:
            busy.acquire()

    monkeypatch.setattr(ast, "parse", counted)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(digests._tree, ["a = 1"] * 20))
    assert together == [False] * 20


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
