"""Receipts: what a finished notebook was made from and what it made.

``results/<label>/<notebook>.run.json`` is written when a run has succeeded, after everything else.
A notebook is fresh when its receipt still matches: same parameters, same code, same inputs, and
every output still there, byte by byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from earlyexit.runs import digests, profiles
from earlyexit.runs.artifacts import read_json
from earlyexit.runs.paths import Project
from earlyexit.runs.settings import Resolved, UsageError

TEXT = "text in data_dir"


class RunError(RuntimeError):
    """A run that could not be completed; what was finished before stays valid."""


def discover(project: Project) -> list[Path]:
    """The notebooks of a project, ``NN_*.ipynb``, by number.

    Raises:
        UsageError: there are none.
    """
    found = sorted(project.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UsageError(f"no notebooks NN_*.ipynb in {project.notebooks}")
    return found


def needs(path: Path, notebooks: list[Path]) -> list[str]:
    """The notebooks whose tables this one reads, as its metadata declares.

    Raises:
        UsageError: one of them does not exist or does not come earlier, or this is no notebook.
    """
    try:
        metadata = digests.read_notebook(path)["metadata"]
    except ValueError as error:
        raise UsageError(str(error)) from None
    names = list(metadata.get("earlyexit", {}).get("needs", []))
    earlier = [p.stem for p in notebooks if p.stem < path.stem]
    for name in names:
        if name not in earlier:
            raise UsageError(f"{path.stem} needs {name}, which is not an earlier notebook")
    return names


def receipt_path(project: Project, label: str, notebook: str) -> Path:
    return project.results / label / f"{notebook}.run.json"


def executed_path(project: Project, label: str, notebook: str) -> Path:
    return project.build / label / f"{notebook}.ipynb"


def read_receipt(project: Project, label: str, notebook: str) -> dict[str, Any] | None:
    """The receipt of a notebook, or None if it never finished under this label."""
    path = receipt_path(project, label, notebook)
    return read_json(path) if path.is_file() else None


def all_receipts(project: Project) -> list[dict[str, Any]]:
    """Every receipt of every label."""
    return [read_json(path) for path in sorted(project.results.glob("*/*.run.json"))]


def fingerprint(
    project: Project, path: Path, resolved: Resolved, upstream: list[str]
) -> dict[str, Any]:
    """All that the results of a notebook depend on, part by part.

    ``data_dir`` counts by the text it holds, not by its name. The profile counts by its values: a
    new profile changes ``profiles.py`` but no result of the others.

    Raises:
        UsageError: a cell of the notebook does not parse.
    """
    values = resolved.parameters[path.stem]
    inputs = {name: _tables(read_receipt(project, resolved.label, name)) for name in upstream}
    if values["data_dir"]:
        inputs[TEXT] = digests.of_files(Path(values["data_dir"]))
    own = {k: v for k, v in values.items() if k not in ("overrides", "data_dir")}
    sizes = profiles.values(resolved.profile) | {"seeds": list(resolved.seeds)}
    parameters = own | sizes
    parameters = json.loads(json.dumps(parameters))  # as a receipt will give them back
    try:
        code = digests.of_notebook(path)
    except SyntaxError as error:
        raise UsageError(f"{path.name}: {error}") from None
    code.pop("earlyexit/profiles.py", None)
    return {"parameters": parameters, "code": code, "inputs": inputs}


def reasons(
    project: Project, label: str, notebook: str, current: dict[str, Any], receipt: dict | None
) -> list[str]:
    """Why a notebook must run, in words; empty if its results are fresh."""
    if receipt is None:
        return ["never run"]
    found = differences(receipt["fingerprint"], current)
    for name, digest in receipt["outputs"].items():
        path = project.root / name
        if not path.is_file():
            found.append(f"{name} missing")
        elif digests.of_file(path) != digest:
            found.append(f"{name} changed since its run")
    # A clone has the published results but has run nothing: its first run makes its own.
    executed = executed_path(project, label, notebook)
    if not executed.is_file():
        found.append(f"not run here: no {project.relative(executed)}")
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, part by part.

    Local text is compared when it is given again; without it there is nothing to compare.
    """
    inputs = {
        key: old["inputs"][key] for key in old["inputs"] if key != TEXT or key in new["inputs"]
    }
    found = []
    for key, before, after in _changes(old["parameters"], new["parameters"]):
        found.append(f"parameter {key}: {before} -> {after}")
    found += [f"{key} changed" for key, *_ in _changes(old["code"], new["code"])]
    found += [f"input {key} changed" for key, *_ in _changes(inputs, new["inputs"])]
    return found


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs = ((key, old.get(key), new.get(key)) for key in old | new)
    return [(key, before, after) for key, before, after in pairs if before != after]


def _tables(receipt: dict[str, Any] | None) -> str | None:
    """Digest of the tables a notebook wrote: what another one can read of it."""
    if receipt is None:
        return None
    outputs = receipt["outputs"].items()
    return digests.of_object({name: digest for name, digest in outputs if name.endswith(".csv")})
