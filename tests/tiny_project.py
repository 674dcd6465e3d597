"""A project of two small notebooks, for tests of the machinery around the real ones."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import nbformat
from nbformat import v4

from earlyexit.runs.parameters import COMMON, Build, as_dict
from earlyexit.runs.paths import Project, project

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


# A study of its own text that trains in a moment.
LITTLE = (
    "corpus=folder corpus.vocab_size=200 output_head=linear exit_head=translator d_model=16"
    " n_layers=2 n_seq=16 bk_heads=2 max_train_tokens=1500 max_eval_tokens=500 gates.max_tokens=500"
    " gates.steps=20"
)
TRAIN = """\
from pathlib import Path
import pandas as pd
from earlyexit.study import Study
study = Study("01_build", globals())
if (asked := Path("../fail")).is_file() and asked.read_text() in study.label:
    raise ValueError("it was asked to fail")
last = {seed: study.build(seed).history["train_nll"].iloc[-1] for seed in study.seeds}
study.table(pd.DataFrame({"seed": last.keys(), "nll": last.values()}), "numbers", "Numbers");
"""
TIMED = """\
import pandas as pd
import torch
from earlyexit.cost.timing import interleaved_times
from earlyexit.runs.artifacts import Outputs, run_label
seconds = interleaved_times({"nothing": int}, torch.device("cpu"), repeats=2)["nothing"]
table = pd.DataFrame({"seed": 0, "seconds": seconds})
Outputs(run_label(profile, overrides, seeds), "02_timed", {}).table(table, "times", "Times")
"""


def write_texts(root: Path) -> Path:
    """A folder of a few small documents."""
    folder = root / "texts"
    folder.mkdir()
    for name, text in list(topics.items())[:40]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder


def write_training(root: Path) -> Project:
    """``01_build``, with the parameters of the real one, trains; ``02_timed`` reads the clock."""
    own = {name: value for name, value in as_dict(Build()).items() if name not in COMMON}
    extra = "".join(f"{name}: {type(value).__name__} = {value!r}\n" for name, value in own.items())
    write_notebook(root, "01_build", [TRAIN], extra=extra)
    write_notebook(root, "02_timed", [TIMED], needs=("01_build",))
    (root / "README.md").write_text("<!-- generated: status -->\n<!-- end -->\n")
    return project(root)
