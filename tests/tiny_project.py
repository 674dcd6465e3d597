"""A project of two small notebooks, for tests of the machinery around the real ones."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import v4

PARAMETERS = """\
profile: str = "smoke"  # table of sizes
seeds: list = []  # empty: the profile's
data_dir: str = ""  # folder with local text
device: str = "auto"  # auto, cpu or cuda
overrides: dict = {}  # profile fields to change
"""
BUILD = """\
import sys
import pandas as pd
from earlyexit.runs.artifacts import Outputs, run_label
out = Outputs(run_label(profile, overrides), "01_build", {"seeds": seeds, "rows": rows})
print(sys.executable)
"""
NUMBERS = """\
table = pd.DataFrame({"seed": 0, "x": range(rows)})
out.table(table, "numbers", "Numbers")
"""
PLOT = """\
import matplotlib.pyplot as plt
from earlyexit.runs.artifacts import Outputs, read_table, run_label
label = run_label(profile, overrides)
fig, ax = plt.subplots()
ax.plot(read_table(label, "numbers", by_hand=True).x)
Outputs(label, "02_plot", {}).figure(fig, "line", "A line");
"""


def write_notebook(
    root: Path, name: str, cells: list[str], needs: tuple[str, ...] = (), extra: str = ""
) -> Path:
    """A notebook with the usual parameters cell, plus ``extra`` lines in it."""
    parameters = v4.new_code_cell(PARAMETERS + extra, metadata={"tags": ["parameters"]})
    notebook = v4.new_notebook(cells=[parameters, *map(v4.new_code_cell, cells)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    if needs:
        notebook.metadata.earlyexit = {"needs": list(needs)}
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def write_project(root: Path) -> Path:
    """``01_build`` writes a table of ``rows`` numbers, ``02_plot`` draws it."""
    write_notebook(root, "01_build", [BUILD, NUMBERS], extra="rows: int = 3  # of the table\n")
    write_notebook(root, "02_plot", [PLOT], needs=("01_build",))
    (root / "README.md").write_text("<!-- generated: status -->\n<!-- end -->\n")
    return root
