"""Every path of a project is built here, from its root and never from the working directory.

``notebooks/`` holds the sources; ``results/`` and ``figures/`` hold what ``run`` publishes and are
committed; ``.cache/`` (trained models, traces) and ``build/`` (executed notebooks, and what notebooks
opened by hand write) are ignored by git and may be deleted at any time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
HOME_VARIABLE = "EARLYEXIT_HOME"


@dataclass(frozen=True)
class Project:
    """The folders of a project and the names of the files in them; ``root`` is its top level."""

    root: Path
    notebooks = property(lambda self: self.root / "notebooks")
    results = property(lambda self: self.root / "results")
    figures = property(lambda self: self.root / "figures")
    cache = property(lambda self: self.root / ".cache")
    build = property(lambda self: self.root / "build")
    readme = property(lambda self: self.root / "README.md")

    def notebook(self, name: str) -> Path:
        """Return the source of a notebook."""
        return self.notebooks / f"{name}.ipynb"

    def executed(self, label: str, notebook: str) -> Path:
        """Return the executed copy of a notebook."""
        return self.build / label / f"{notebook}.ipynb"

    def published(self, label: str) -> Path:
        """Return the folder of a label's records and tables."""
        return self.results / label

    def by_hand(self, label: str) -> Path:
        """Return the folder into which notebooks opened by hand write ``results`` and ``figures``."""
        return self.build / "by-hand" / label

    def relative(self, path: Path) -> str:
        """Return ``path`` as records have it: from the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()


def project(root: str | Path | None = None) -> Project:
    """Return the project at ``root``; by default at ``$EARLYEXIT_HOME``, else around the package.

    Raises:
        FileNotFoundError: the package lies outside a project, and the variable is not set.
    """
    if root or (root := os.environ.get(HOME_VARIABLE)):
        return Project(Path(root).resolve())
    if not (PACKAGE.parent / "notebooks").is_dir():
        raise FileNotFoundError(
            f"no notebooks/ beside the package: install it editable (pip install -e .) "
            f"or name the project's folder in {HOME_VARIABLE}"
        )
    return Project(PACKAGE.parent)
