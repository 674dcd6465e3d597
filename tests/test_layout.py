"""The package's wings stand in one order, and a module imports only from its wing and those below.

Every import counts: at the top of a module, under ``TYPE_CHECKING``, and inside a function. The last is
allowed where the face would load what only a run or a drawing needs: in ``commands`` and ``explore``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from earlyexit.runs.paths import PACKAGE

ORDER = [
    *("environment", "atomic", "checked", "devices"),
    *("corpus", "nn", "exits", "models", "figures", "training", "calibration", "cost"),
    *("evaluation", "runs", "explore", "__init__", "study", "stages"),
    *("commands", "__main__"),
]
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FACE, LAZY = "earlyexit", ("commands", "explore")
HEAVY = {"matplotlib", "papermill"}


def wing(module: str) -> str:
    """``earlyexit.cost.timing`` → ``cost``; the face itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a module's syntax tree imports, and whether inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # ``from package import name``: the name is a module or lies in one.
            found = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for name in found:
            if name.split(".")[0] == FACE:
                yield name, id(node) in inside


@cache
def of_package() -> list[tuple[str, str, bool]]:
    """Every import within the package: which module, of which module, whether inside a function."""
    return [
        (module, *found)
        for module, path in MODULES.items()
        for found in imports(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_every_module_lies_in_a_wing():
    assert {wing(module) for module in MODULES} <= set(ORDER)


def test_imports_go_down():
    up = [
        f"{module} imports {imported}"
        for module, imported, _ in of_package()
        if ORDER.index(wing(imported)) > ORDER.index(wing(module))
    ]
    assert not up, "\n".join(up)


def test_imports_stand_at_the_top_of_their_module():
    hidden = [
        f"{module} imports {imported} in a function"
        for module, imported, inside in of_package()
        if inside and wing(module) not in LAZY
    ]
    assert not hidden, "\n".join(hidden)


def test_no_module_imports_itself_by_a_detour():
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, imported, _ in of_package():
        graph[module].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "inside"),
    [
        ("from earlyexit.study import Study", False),
        ("from earlyexit import study", False),
        ("import earlyexit.study", False),
        ("if TYPE_CHECKING:\n    from earlyexit.study import Study", False),
        ("class A:\n    def f(self):\n        from earlyexit.study import Study", True),
    ],
)
def test_no_import_is_overlooked(source, inside):
    assert list(imports(ast.parse(source))) == [("earlyexit.study", inside)]


@pytest.mark.slow
def test_the_face_loads_nothing_that_only_a_run_needs():
    script = "import sys, earlyexit; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "earlyexit" in loaded
    assert not HEAVY & set(loaded)


def test_the_tests_lie_in_folders_as_the_wings():
    here = Path(__file__).parent
    folders = {path.parent.name for path in here.glob("*/test_*.py")}
    assert folders <= set(ORDER)
