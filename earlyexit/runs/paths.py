"""Where things lie. Nothing else in the project builds a path from the working directory.

``notebooks/`` is the source; ``results/`` and ``figures/`` are what ``run`` has published, and
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
    """The folders and files of a project whose top level is ``root``."""

    root: Path
    notebooks = property(lambda self: self.root / "notebooks")
    results = property(lambda self: self.root / "results")
    figures = property(lambda self: self.root / "figures")
    cache = property(lambda self: self.root / ".cache")
    build = property(lambda self: self.root / "build")
    readme = property(lambda self: self.root / "README.md")

    def notebook(self, name: str) -> Path:
        """A notebook's source."""
        return self.notebooks / f"{name}.ipynb"

    def executed(self, label: str, notebook: str) -> Path:
        """The executed copy of a notebook."""
        return self.build / label / f"{notebook}.ipynb"

    def published(self, label: str) -> Path:
        """Where the records and tables of a label are."""
        return self.results / label

    def by_hand(self, label: str) -> Path:
        """What notebooks write that are opened by hand, with ``results`` and ``figures`` in it."""
        return self.build / "by-hand" / label

    def relative(self, path: Path) -> str:
        """``path`` as it is written in records: from the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()


def project(root: str | Path | None = None) -> Project:
    """The project at ``root``; by default at ``$EARLYEXIT_HOME``, else around the package.

    Raises:
        FileNotFoundError: the package lies outside its project and nothing says where that is.
    """
    if root or (root := os.environ.get(HOME_VARIABLE)):
        return Project(Path(root).resolve())
    if not (PACKAGE.parent / "notebooks").is_dir():
        raise FileNotFoundError(
            f"no notebooks/ beside the package: install it editable (pip install -e .) "
            f"or name the project's folder in {HOME_VARIABLE}"
        )
    return Project(PACKAGE.parent)
