"""A fingerprint tells which notebooks must run again, and earlier records how long that takes.

A notebook is fresh while its record matches: the parameters, the code, the inputs and the bytes of
every file are the same. It does not matter where it ran: published results are fresh in a clone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from earlyexit.runs import digests, profiles
from earlyexit.runs.paths import Project
from earlyexit.runs.profiles import Profile
from earlyexit.runs.provenance import Fingerprint, Record, read_record, read_records
from earlyexit.runs.settings import Resolved, UsageError

TEXT = "text in data_dir"

# The definitions of these modules only set parameters, which count by their values: a new profile
# changes no result of the others.
BY_VALUE = ("earlyexit/runs/profiles.py:", "earlyexit/runs/parameters.py:")

# Digests make no number, they tell what changed: a change of theirs shows in the digests themselves.
TELLS = "earlyexit/runs/digests.py:"

# Rough numbers of training tokens; those of a folder are unknown until its text is read.
TRAIN_TOKENS = {"sotu": 1_225_099, "wikitext-2": 2_088_628, "wikitext-103": 103_227_021}


class RunError(RuntimeError):
    """A run could not be completed; what was finished before stays valid."""


def discover(project: Project) -> list[Path]:
    """Return the notebooks of a project, ``NN_*.ipynb``, by number.

    Raises:
        UsageError: there are no notebooks.
    """
    found = sorted(project.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UsageError(f"no notebooks NN_*.ipynb in {project.notebooks}")
    return found


def needs(path: Path, notebooks: list[Path]) -> list[str]:
    """Return the notebooks whose tables this one reads, as its metadata declares.

    Raises:
        UsageError: one of them does not exist or does not come earlier, or the file is no notebook.
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


def published(project: Project, label: str, notebook: str) -> Record | None:
    """Return the record of a notebook's published run; None if none finished under this label."""
    return read_record(project.published(label), notebook, label)


def all_published(project: Project) -> list[Record]:
    """Return every published record of every label."""
    folders = sorted(project.results.glob("*/"))
    return [record for folder in folders for record in read_records(folder, folder.name)]


def fingerprint(
    project: Project, path: Path, resolved: Resolved, upstream: list[str]
) -> Fingerprint:
    """Return all that the results of a notebook depend on now.

    ``data_dir`` counts by the text it holds, not by its name.

    Raises:
        UsageError: a cell of the notebook does not parse.
    """
    values = resolved.parameters[path.stem]
    inputs = {
        name: tables_read(path, published(project, resolved.label, name)) for name in upstream
    }
    if values["data_dir"]:
        inputs[TEXT] = digests.of_files(Path(values["data_dir"]))
    own = {k: v for k, v in values.items() if k not in ("overrides", "data_dir")}
    sizes = profiles.values(resolved.profile) | {"seeds": list(resolved.seeds_of(path.stem))}
    parameters = json.loads(json.dumps(own | sizes))  # as they are read from a record
    try:
        code = digests.of_notebook(path)
    except SyntaxError as error:
        raise UsageError(f"{path.name}: {error}") from None
    code = {name: digest for name, digest in code.items() if not name.startswith(BY_VALUE)}
    return Fingerprint(parameters, code, inputs)


def reasons(project: Project, record: Record | None, current: Fingerprint) -> list[str]:
    """Return why a notebook must run, in words; empty if its results are fresh.

    Of a record that an earlier version made only the files are compared: that version's code is gone.
    """
    if record is None:
        return ["never run"]
    comparable = record.fingerprint and not record.is_old
    found = differences(record.fingerprint, current) if comparable else []
    return found + record.unmatched(project.root)


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints, part by part.

    Local text is compared only where the new fingerprint has it, and so is code: what is used no longer
    shows in what used it.
    """

    def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        return [key for key in before | after if before.get(key) != after.get(key)]

    inputs = {key: value for key, value in old.inputs.items() if key != TEXT or key in new.inputs}
    values, now = old.parameters, new.parameters
    found = [f"parameter {k}: {values.get(k)} -> {now.get(k)}" for k in changed(values, now)]
    code = [key for key in changed(old.code, new.code) if key in new.code]
    found += [f"{key} changed" for key in code if not key.startswith(TELLS)]
    return found + [f"input {key} changed" for key in changed(inputs, new.inputs)]


def tables_read(path: Path, record: Record | None) -> str | None:
    """Return the digest of another notebook's tables that this one reads.

    They are those that it names in cells which read tables, and that of the training, which tells the
    weights. None: the other was never run.
    """
    if record is None:
        return None
    read = "".join(cell for cell in digests.code_cells(path) if "read_table(" in cell)
    stems = {name: Path(name).stem for name in record.files if name.endswith(".csv")}
    used = [n for n, stem in stems.items() if stem == "training" or f'"{stem}"' in read]
    return digests.of_object({name: record.files[name].sha256 for name in used})


def training_work(profile: Profile, seeds: int) -> float | None:
    """Return the FLOPs of training, 6 × tokens × epochs × seeds × active parameters, or None.

    Per token, a layer of width D with top-k experts of hidden width 2 D multiplies by 4 k D²
    weights; a whole vocabulary head counts once for each exit that a step trains. None stands for an
    unknown number of tokens.
    """
    tokens = TRAIN_TOKENS.get(profile.corpus.name)
    if limit := profile.max_train_tokens:
        tokens = min(tokens or limit, limit)
    if tokens is None:
        return None
    model = profile.model
    layers = model.n_layers * 4 * model.top_k * model.d_model**2
    trained = {"all": model.n_layers, "one": 2, "tokens": 1}[profile.training.exit_sampling]
    heads = trained * model.vocab_size * model.d_model
    return 6.0 * tokens * profile.training.epochs * seeds * (layers + heads)


def minutes(
    notebook: str, label: str, work: float | None, records: Iterable[Record]
) -> tuple[float | None, str]:
    """Estimate the minutes of a notebook, and say from what.

    Args:
        label, work: label and :func:`training_work` of the run that is asked for.
        records: records of earlier runs, under any label.

    Returns:
        The last time under the same label (``"last run"``) if the work was the same. Else what other
        runs say, of this version where there are any: a time that every run takes, and one in
        proportion to the training work (``"rough"``). Else ``(None, "unknown")``.
    """
    known = [r for r in records if r.notebook == notebook and r.seconds]
    for record in known:
        if record.label == label and record.work == work:
            return record.seconds / 60, "last run"
    others = [r for r in known if r.work and work]
    others = [r for r in others if not r.is_old] or others
    if not others:
        return None, "unknown"
    largest = max(r.work for r in others)
    seconds = np.array([r.seconds for r in others])
    shares = np.array([r.work / largest for r in others])
    # Relative errors count, so that short runs have a say; one run alone is all in proportion.
    (slope, start), _ = nnls(np.c_[shares / seconds, 1 / seconds], np.ones(len(others)))
    return float(start + slope * work / largest) / 60, "rough"
