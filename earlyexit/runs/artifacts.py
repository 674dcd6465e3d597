"""A notebook writes tables and figures, and a record of the run that wrote them.

The files go into a folder that git ignores; after each result the record is written again. ``run``
names that folder and publishes its files when the notebook has succeeded; a notebook opened by hand
writes into ``build/by-hand/<label>/``. A file that does not match its record is never read.
"""

from __future__ import annotations

import json
import os
import shlex
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from earlyexit.atomic import atomic_path
from earlyexit.cost.memory import MIB, largest_peak_bytes
from earlyexit.models.checkpoints import save_model
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs import digests, profiles, provenance, tables
from earlyexit.runs.paths import Project, project
from earlyexit.runs.provenance import File, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 200

# Environment variables that the runner sets for the notebooks it executes.
RUN_ID = "EARLYEXIT_RUN_ID"
LABEL = "EARLYEXIT_LABEL"
COMMAND = "EARLYEXIT_COMMAND"
FOLDER = "EARLYEXIT_FOLDER"
_BY_HAND = f"by-hand-{uuid.uuid4().hex[:12]}"  # one id for the life of a kernel


class MissingResult(FileNotFoundError):
    """A result does not exist, was not finished, or was changed since."""


def run_label(
    profile: str, overrides: dict[str, Any] | None = None, seeds: Sequence[int] = ()
) -> str:
    """Return the label that a notebook writes under: the runner's, or by hand the profile's."""
    return os.environ.get(LABEL) or profiles.label(profile, overrides, seeds)


class Outputs:
    """The writer of one notebook's tables and figures.

    Every method that writes raises ValueError if another notebook writes a result of that name.

    Args:
        label: folder of the results; see ``run_label``.
        notebook: name without suffix, such as ``"03_threshold_sweep"``.
        parameters: all that the notebook was run with.
        root: top of the project, by default this one.

    Attributes:
        folder: folder whose ``results/`` and ``figures/`` are written.
        record: record of what was written so far.
    """

    def __init__(
        self,
        label: str,
        notebook: str,
        parameters: dict[str, Any],
        root: str | Path | None = None,
    ) -> None:
        self.project = project(root)
        self.folder = Path(os.environ.get(FOLDER) or self.project.by_hand(label))
        self._shown: dict[str, tuple] = {}
        self.record = Record(
            notebook,
            label,
            run_id=os.environ.get(RUN_ID, _BY_HAND),
            command=os.environ.get(COMMAND, "by hand"),
            parameters=provenance.without_paths(parameters),
            **provenance.git_state(self.project.root),
            versions=provenance.versions(),
            hardware=provenance.hardware(),
            time=provenance.now(),
        )

    def table(
        self,
        df: pd.DataFrame,
        name: str,
        caption: str,
        text_hash: str | None = None,
        by: Sequence[str] | None = None,
        of: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Write a tidy table whole as CSV, and what matters of it as LaTeX, and return it.

        Args:
            by, of: columns that matter; see :func:`earlyexit.runs.tables.brief`.

        Raises:
            ValueError: the table has no rows, no ``seed`` column, columns that are not plain names, or
                an infinite number. NaN is allowed: it marks what could not be measured.
        """
        self._check_table(df, name)
        self._shown[name] = (df, by, of)
        csv = df.to_csv(index=False, lineterminator="\n")
        writers = {f"results/{name}.csv": _text(csv)}
        if latex := tables.latex(df, name, caption, by, of):
            writers[f"results/{name}.tex"] = _text(latex)
        self._write("table", name, caption, text_hash, writers)
        return df

    def brief(self, name: str) -> pd.DataFrame:
        """Return what matters of a table that was written here, as texts.

        Raises:
            KeyError: no table of that name was written.
        """
        return tables.brief(*self._shown[name])

    def figure(self, drawn: Any, name: str, caption: str, text_hash: str | None = None) -> Figure:
        """Write a figure as PDF (TrueType fonts) and PNG, and return it, so that a notebook shows it.

        It is closed then: a notebook would show an open one once more at the end of its cell.

        Args:
            drawn: a figure, or its axes, or an array of them.
        """
        import matplotlib as mpl
        import matplotlib.pyplot as plt

        fig = np.ravel(np.asarray(drawn, dtype=object))[0].get_figure(root=True)

        def pdf(path: Path) -> None:
            with mpl.rc_context({"pdf.fonttype": 42}):
                fig.savefig(path, format="pdf", metadata={"CreationDate": None})

        writers = {
            f"figures/{name}.pdf": pdf,
            f"figures/{name}.png": lambda path: fig.savefig(path, format="png", dpi=PNG_DPI),
        }
        self._write("figure", name, caption, text_hash, writers)
        plt.close(fig)
        return fig

    def document(
        self, text: str, name: str, caption: str, text_hash: str | None = None, suffix: str = "json"
    ) -> Path:
        """Write a JSON or Markdown file among the tables, or a page (``"html"``) among the figures.

        Returns:
            The path of the file.
        """
        file = f"{'figures' if suffix == 'html' else 'results'}/{name}.{suffix}"
        writers = {file: _text(text.rstrip("\n") + "\n")}
        return self._write("document", name, caption, text_hash, writers)

    def weights(
        self, model: EarlyExitLanguageModel, name: str, caption: str, about: dict, text_hash: str
    ) -> Path:
        """Write a model as safetensors among the tables; see ``checkpoints.save_model``."""
        file = f"results/{name}.safetensors"
        writers = {file: lambda path: save_model(model, path, about)}
        return self._write("weights", name, caption, text_hash, writers)

    def _write(
        self,
        kind: str,
        name: str,
        caption: str,
        text_hash: str | None,
        writers: dict[str, Callable[[Path], Any]],
    ) -> Path:
        """Write each file through its function, then the record; return the first path."""
        self._check_owner(next(iter(writers)).split("/")[0], name)
        written = {}
        for file, write in writers.items():
            with atomic_path(self.folder / file) as temporary:
                write(temporary)
            digest = digests.of_file(self.folder / file)
            written[file] = File(kind, name, caption, digest, text_hash)
        self.record = replace(
            self.record,
            files=self._files_so_far() | written,
            hardware=provenance.hardware(),  # torch is loaded by now and names a GPU in use
            time=provenance.now(),
            peak_mib=round(largest_peak_bytes() / MIB, 1),
        )
        self.record.write(self.folder)
        return self.folder / next(iter(writers))

    def _files_so_far(self) -> dict[str, File]:
        """Return the files of this run; remove those of an earlier run by hand."""
        before = provenance.read_record(self.folder, self.record.notebook)
        if before is None:
            return {}
        if (before.run_id, before.parameters) == (self.record.run_id, self.record.parameters):
            return before.files
        for file in before.files:
            (self.folder / file).unlink(missing_ok=True)
        return {}

    def _check_owner(self, top: str, name: str) -> None:
        """Raise ValueError if another notebook owns the name: the two would never both be fresh."""
        folders = {self.folder, self.project.published(self.record.label)}
        for other in (record for folder in folders for record in provenance.read_records(folder)):
            owns = any(f.name == name and p.split("/")[0] == top for p, f in other.files.items())
            exists = (self.project.notebooks / f"{other.notebook}.ipynb").is_file()
            if owns and exists and other.notebook != self.record.notebook:
                where = f"{top}/{self.record.label}/{name}"
                raise ValueError(f"{where}: {other.notebook} writes that name")

    @staticmethod
    def _check_table(df: pd.DataFrame, name: str) -> None:
        if df.empty:
            raise ValueError(f"table {name}: no rows")
        if "seed" not in df.columns:
            raise ValueError(f"table {name}: no column `seed`, only {', '.join(map(str, df))}")
        if not all(isinstance(column, str) for column in df.columns):
            raise ValueError(f"table {name}: columns must be plain names, not {list(df.columns)}")
        if df.columns.duplicated().any():
            raise ValueError(f"table {name}: two columns have one name")
        for column in df.select_dtypes("number"):
            if df[column].isin([np.inf, -np.inf]).any():
                raise ValueError(f"table {name}: infinite value in column `{column}`")


def _text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content, encoding="utf-8", newline="\n")


def read_table(
    label: str, name: str, root: str | Path | None = None, by_hand: bool = False
) -> pd.DataFrame:
    """Read a table that a notebook wrote; arguments and errors as of :func:`result_path`."""
    return pd.read_csv(result_path(label, f"{name}.csv", root, by_hand))


def result_path(
    label: str, file: str, root: str | Path | None = None, by_hand: bool = False
) -> Path:
    """Return the path of a file of ``results/`` that is as its notebook wrote it.

    Args:
        by_hand: take a file that was written by hand, where there is one, before the published one.
            A notebook that ``run`` executes never does.

    Raises:
        MissingResult: the file does not exist, is half-written or was changed by hand; the message
            names the notebook to run.
    """
    place = project(root)
    hand, published = place.by_hand(label), place.published(label)
    asked = by_hand and FOLDER not in os.environ
    places = [(hand, hand, f"results/{file}")] if asked else []
    published_name = f"results/{label}/{file}"
    for folder, base, name in [*places, (published, place.root, published_name)]:
        owner = owner_of(name, folder)
        if owner and not replace(owner, files={name: owner.files[name]}).unmatched(base):
            return base / name
    if owner and (published / file).is_file():
        what = "does not match its record (interrupted, or changed by hand)"
    else:
        what = "is missing"
    maker = owner.notebook if owner else _producer(place, file.partition(".")[0])
    raise MissingResult(f"{published_name} {what}: {remedy(label, maker)}")


def owner_of(file: str, folder: Path) -> Record | None:
    """Return the record in a folder that lists a file, or None."""
    return next((r for r in provenance.read_records(folder) if file in r.files), None)


def remedy(label: str, notebook: str | None) -> str:
    """Return the command that makes what is missing under a label, as part of a sentence."""
    profile, *changed = label.split("~")
    options = ["--profile", profile]
    if any("=" not in pair for pair in changed):  # the label was too long and ends in a digest
        return f"run it with the settings in the records of results/{label}"
    for pair in changed:
        key, _, value = pair.partition("=")
        options += ["--seeds", *value.split(",")] if key == "seeds" else ["--set", pair]
    options += ["--only", notebook] if notebook else []
    return f"run `{shlex.join(['python', '-m', 'earlyexit', 'run', *options])}`"


def _producer(place: Project, name: str) -> str | None:
    """Return the first notebook that names a table: its writer comes before its readers."""
    quoted = json.dumps(f'"{name}"')[1:-1]  # as it is escaped in a notebook's JSON
    paths = sorted(place.notebooks.glob("*.ipynb"))
    return next((p.stem for p in paths if quoted in p.read_text("utf-8")), None)
