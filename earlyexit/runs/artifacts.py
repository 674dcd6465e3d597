"""Tables and figures with a birth certificate.

A table is ``results/<label>/<name>.csv`` and ``.tex``, a figure ``figures/<label>/<name>.pdf`` and
``.png``. Beside each stands ``<name>.meta.json``, written last, with the hashes of those files and
where they come from. What has no matching certificate was never finished and is not read.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from earlyexit.atomic import atomic_path
from earlyexit.runs import digests, profiles, provenance
from earlyexit.runs.paths import Project, project

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from earlyexit.models.resnet_bk import EarlyExitLanguageModel


COLUMN, DOUBLE = 3.4, 7.0  # inches: the width of a paper's column, and of its page


PNG_DPI = 200


# What the runner tells the notebooks it executes.
RUN_ID = "EARLYEXIT_RUN_ID"


LABEL = "EARLYEXIT_LABEL"


COMMAND = "EARLYEXIT_COMMAND"


_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


class MissingResult(FileNotFoundError):
    """A result that has not been made, was not finished, or was changed since."""


def run_label(
    profile: str, overrides: dict[str, Any] | None = None, seeds: Sequence[int] = ()
) -> str:
    """The label a notebook writes under: the runner's, or under JupyterLab the profile's."""
    return os.environ.get(LABEL) or profiles.label(profile, overrides, seeds)


class Outputs:
    """Writes the tables and figures of one notebook.

    Args:
        label: folder below ``results/`` and ``figures/``; see ``run_label``.
        notebook: name without suffix, such as ``"03_threshold_sweep"``.
        parameters: what the notebook was run with.
        root: top of the project, by default this one.
    """

    def __init__(
        self,
        label: str,
        notebook: str,
        parameters: dict[str, Any],
        root: str | Path | None = None,
    ) -> None:
        self.project = project(root)
        self.label, self.notebook = label, notebook
        source = self.project.notebooks / f"{notebook}.ipynb"
        self.origin = {
            "label": label,
            "notebook": notebook,
            "command": os.environ.get(COMMAND, "interactive"),
            "run_id": os.environ.get(RUN_ID) or f"interactive-{uuid.uuid4().hex[:12]}",
            "parameters": provenance.without_paths(parameters),
            **provenance.git_state(self.project.root),
            "code": digests.of_object(digests.of_notebook(source)) if source.is_file() else None,
            "versions": provenance.versions(),
        }

    def table(
        self, df: pd.DataFrame, name: str, caption: str, text_hash: str | None = None
    ) -> pd.DataFrame:
        """Write a tidy table as CSV and LaTeX, and return it, to be shown.

        Raises:
            ValueError: no row, no ``seed`` column, columns that are not plain names, an infinite
                number, or a name that another notebook uses. NaN is allowed: it says that
                something could not be measured.
        """
        self._check_table(df, name)
        self._check_owner(self.project.results, name)
        folder = self.project.results / self.label
        csv, tex = folder / f"{name}.csv", folder / f"{name}.tex"
        with atomic_path(csv) as temporary:
            df.to_csv(temporary, index=False, lineterminator="\n")
        with atomic_path(tex) as temporary:
            temporary.write_text(_latex(df, name, caption), encoding="utf-8")
        self._certify("table", name, caption, text_hash, [csv, tex])
        return df

    def figure(self, fig: Figure, name: str, caption: str, text_hash: str | None = None) -> Figure:
        """Write a figure as PDF (TrueType fonts) and PNG, and return it, to be shown.

        Raises:
            ValueError: another notebook writes a figure of that name.
        """
        import matplotlib as mpl

        self._check_owner(self.project.figures, name)
        folder = self.project.figures / self.label
        pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
        with mpl.rc_context({"pdf.fonttype": 42}), atomic_path(pdf) as temporary:
            fig.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        with atomic_path(png) as temporary:
            fig.savefig(temporary, format="png", dpi=PNG_DPI)
        self._certify("figure", name, caption, text_hash, [pdf, png])
        return fig

    def document(
        self, text: str, name: str, caption: str, text_hash: str | None = None, suffix: str = "json"
    ) -> Path:
        """Write a JSON or Markdown file among the tables, or a page (``"html"``) among the figures.

        Returns:
            Its path.

        Raises:
            ValueError: another notebook writes a result of that name.
        """
        kind = self.project.figures if suffix == "html" else self.project.results
        self._check_owner(kind, name)
        path = kind / self.label / f"{name}.{suffix}"
        with atomic_path(path) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        self._certify("document", name, caption, text_hash, [path])
        return path

    def weights(
        self, model: EarlyExitLanguageModel, name: str, caption: str, about: dict, text_hash: str
    ) -> Path:
        """Write a model as safetensors among the tables; see ``checkpoints.save_model``.

        Raises:
            ValueError: another notebook writes a result of that name.
        """
        from earlyexit.models.checkpoints import save_model

        self._check_owner(self.project.results, name)
        path = self.project.results / self.label / f"{name}.safetensors"
        save_model(model, path, about)
        self._certify("weights", name, caption, text_hash, [path])
        return path

    def _check_owner(self, kind: Path, name: str) -> None:
        """Two notebooks that overwrite each other's results would never both be fresh."""
        certificate = kind / self.label / f"{name}.meta.json"
        owner = read_json(certificate)["notebook"] if certificate.is_file() else self.notebook
        if owner != self.notebook and (self.project.notebooks / f"{owner}.ipynb").is_file():
            raise ValueError(f"{self.project.relative(certificate)}: {owner} writes that name")

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
            if np.isinf(df[column].to_numpy(dtype=float, na_value=np.nan)).any():
                raise ValueError(f"table {name}: infinite value in column `{column}`")

    def _certify(
        self, kind: str, name: str, caption: str, text_hash: str | None, files: list[Path]
    ) -> None:
        certificate = {
            "kind": kind,
            "name": name,
            "caption": caption,
            "files": {path.name: digests.of_file(path) for path in files},
            "text_hash": text_hash,
            **self.origin,
            "hardware": provenance.hardware(),
            "time": provenance.now(),
        }
        write_json(files[0].with_name(f"{name}.meta.json"), certificate)


def read_table(label: str, name: str, root: str | Path | None = None) -> pd.DataFrame:
    """A table whose bytes are those its notebook wrote.

    Raises:
        MissingResult: not made yet, half-written or changed by hand; names the notebook to run.
    """
    place = project(root)
    path = place.results / label / f"{name}.csv"
    what = place.relative(path)
    certificate = path.with_name(f"{name}.meta.json")
    if not (certificate.is_file() and path.is_file()):
        raise MissingResult(f"{what} is missing: {remedy(label, _producer(place, name))}")
    meta = read_json(certificate)
    if not is_whole(certificate, meta):
        raise MissingResult(
            f"{what} does not match its certificate (interrupted, or changed by hand): "
            f"{remedy(label, meta['notebook'])}"
        )
    return pd.read_csv(path)


def certificates(label: str, root: str | Path | None = None) -> Iterator[tuple[Path, dict]]:
    """Path and content of every ``.meta.json`` under a label."""
    place = project(root)
    for folder in (place.results / label, place.figures / label):
        for path in sorted(folder.glob("*.meta.json")):
            yield path, read_json(path)


def is_whole(certificate: Path, meta: dict[str, Any]) -> bool:
    """Whether every file a certificate describes is there, byte by byte."""
    files = zip(described(certificate, meta), meta["files"].values(), strict=True)
    return all(path.is_file() and digests.of_file(path) == digest for path, digest in files)


def described(certificate: Path, meta: dict[str, Any]) -> list[Path]:
    """The files a certificate describes."""
    return [certificate.with_name(file) for file in meta["files"]]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON atomically."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _latex(df: pd.DataFrame, name: str, caption: str) -> str:
    """A booktabs table; numbers with four significant digits, the CSV has them all."""
    floats = list(df.select_dtypes("floating"))
    style = df.reset_index(drop=True).style.format(escape="latex", na_rep="--")
    style = style.format("{:.4g}", subset=floats, na_rep="--") if floats else style
    style = style.format_index(escape="latex", axis="columns").hide(axis="index")
    return style.to_latex(
        hrules=True,
        caption=caption.translate(_TEX),
        label=f"tab:{name}",
        position_float="centering",
    )


def remedy(label: str, notebook: str | None) -> str:
    """The command that makes what is missing under a label, as part of a sentence."""
    profile, *changed = label.split("~")
    options = ["--profile", profile]
    for pair in changed:
        key, _, value = pair.partition("=")
        options += ["--seeds", *value.split(",")] if key == "seeds" else ["--set", pair]
    options += ["--only", notebook] if notebook else []
    return f"run `{shlex.join(['python', '-m', 'earlyexit', 'run', *options])}`"


def _producer(place: Project, name: str) -> str | None:
    """The notebook that calls ``.table(..., name, ...)``."""
    for path in sorted(place.notebooks.glob("*.ipynb")):
        for call in filter(lambda n: isinstance(n, ast.Call), digests.notebook_nodes(path)):
            arguments = [*call.args, *(k.value for k in call.keywords)]
            if getattr(call.func, "attr", "") == "table" and any(
                isinstance(a, ast.Constant) and a.value == name for a in arguments
            ):
                return path.stem
    return None
