"""The notebooks tell a story: short cells, tables from evaluation/, sizes among the parameters."""

from __future__ import annotations

import ast
import re

import nbformat
import pytest

from earlyexit.runs.freshness import discover
from earlyexit.runs.paths import project

LONGEST_CELL, LONGEST_FUNCTION = 25, 5  # lines
PARAMETERS_ONLY = (0.05, 0.7)  # the ε and the threshold that the text speaks of
CELLS = [
    pytest.param(cell, id=f"{path.stem}-{cell.id}")
    for path in discover(project())
    for cell in nbformat.read(path, as_version=4).cells
    if cell.cell_type == "code"
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_short_and_leaves_tables_to_the_package(cell):
    assert len(cell.source.splitlines()) <= LONGEST_CELL
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION
        # A row is a dictionary; a loop that appends dictionaries builds a table by hand.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            appends = node.func.attr == "append"
            assert not (
                appends and any(isinstance(a, ast.Dict | ast.BinOp) and _row(a) for a in node.args)
            )


def _row(node: ast.expr) -> bool:
    return isinstance(node, ast.Dict) or (
        isinstance(node, ast.BinOp) and (_row(node.left) or _row(node.right))
    )


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_knows_no_test_and_no_size_of_its_own(cell):
    assert "smoke" not in cell.source and "rows.append" not in cell.source
    if "parameters" in cell.metadata.get("tags", []):
        return
    constants = [n.value for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Constant)]
    numbers = [value for value in constants if isinstance(value, float)]
    assert not set(numbers) & set(PARAMETERS_ONLY)
    told = " ".join(value for value in constants if isinstance(value, str))
    assert not re.search(r"(?<!\d)(5 %|0\.05|0\.7\b)", told)


@pytest.mark.parametrize("cell", CELLS)
def test_every_figure_and_brief_table_is_shown_where_it_is_made(cell):
    """As the last value of its cell, or by ``display``: nothing shows it a second time."""
    tree = ast.parse(cell.source)
    shown = [tree.body[-1].value] if isinstance(tree.body[-1], ast.Expr) else []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    shown += [a for c in calls if ast.unparse(c.func) == "display" for a in c.args]
    made = [c for c in calls if ast.unparse(c.func) in ("study.figure", "study.brief")]
    assert all(call in shown for call in made)


def test_the_control_finds_what_it_looks_for():
    rows = ast.parse("rows.append({'a': 1} | extra)").body[0].value
    assert _row(rows.args[0])
