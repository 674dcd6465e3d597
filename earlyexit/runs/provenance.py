"""A record says what a run of a notebook wrote, and where its numbers come from.

A run has one record, ``<notebook>.run.json``, written after all files that it lists. It holds no name
of a user, host or folder, because records are committed and published.
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import psutil
from pydantic import Field, TypeAdapter, ValidationError

from earlyexit.atomic import atomic_path
from earlyexit.runs import digests

log = logging.getLogger(__name__)
# Of new records; 3: without peak memory; 2: of models whose exits shared a head; 1: of the first layer.
FORMAT = 4
SUFFIX = ".run.json"

LIBRARIES = (
    "torch", "numpy", "numba", "pandas", "matplotlib", "datasets", "tokenizers", "papermill",
)  # fmt: skip
MADE = (":!results", ":!figures", ":!README.md")  # written by runs, so not a sign of dirty sources


@dataclass(frozen=True)
class File:
    """A file of a record, with its bytes' hash and the hash of the text behind its numbers."""

    kind: Literal["table", "figure", "document", "weights"]
    name: str
    caption: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    text_hash: str | None


@dataclass(frozen=True)
class Asked:
    """Profile, seeds and sets as ``run`` was asked for them; no profile: a run by hand."""

    profile: str = ""
    seeds: tuple[int, ...] = ()
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprint holds all that the results of a notebook depend on, part by part."""

    parameters: dict[str, Any]
    code: dict[str, str]
    inputs: dict[str, str | None]


@dataclass(frozen=True)
class Record:
    """A record of one run of a notebook.

    Attributes:
        files: path → file. A published path starts at the top of the project
            (``results/cpu/front.csv``), an unpublished one at the run's folder (``results/front.csv``).
        parameters: all parameters of the notebook.
        dirty: whether the sources differed from ``commit``.
        settings: what ``run`` was asked for.
        fingerprint: what the results depend on; None for a run by hand.
        seconds: duration of the run.
        work: FLOPs of its training; None if unknown.
        peak_mib: peak resident memory of its largest process; None if it was not recorded.
        note: remark for the reader.
    """

    notebook: str
    label: str
    run_id: str
    command: str
    parameters: dict[str, Any]
    commit: str | None
    dirty: bool | None
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    time: str
    files: dict[str, File] = field(default_factory=dict)
    settings: Asked = Asked()
    fingerprint: Fingerprint | None = None
    seconds: float | None = None
    work: float | None = None
    peak_mib: float | None = None
    note: str = ""
    format: Literal[1, 2, 3, 4] = FORMAT

    @property
    def is_old(self) -> bool:
        """Tell whether an earlier version made it, so that only its files can be compared."""
        return self.format < FORMAT

    @property
    def made_by(self) -> str:
        """Return in words which version made it."""
        return "an earlier version" if self.is_old else "this version"

    def unmatched(self, base: Path) -> list[str]:
        """Return which files below ``base`` differ from the record, each with what is wrong."""
        found = []
        for name, file in self.files.items():
            if not (base / name).is_file():
                found.append(f"{name} missing")
            elif digests.of_file(base / name) != file.sha256:
                found.append(f"{name} changed since its run")
        return found

    def write(self, folder: Path) -> None:
        """Write ``<notebook>.run.json`` into a folder."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        with atomic_path(folder / f"{self.notebook}{SUFFIX}") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


READER = TypeAdapter(Record)  # slow to make


def read_record(folder: Path, notebook: str, label: str = "") -> Record | None:
    """Return a notebook's record in a folder; None if it does not exist or cannot be used.

    Args:
        label: label that the record must be of; empty: any.
    """
    path = folder / f"{notebook}{SUFFIX}"
    if not path.is_file():
        return None
    try:
        record = READER.validate_json(path.read_bytes())
    except ValidationError as error:
        why = f"{error.error_count()} errors, the first: {error.errors()[0]['msg']}"
    except OSError as error:
        why = str(error)
    else:
        of = (record.label if label else "", record.notebook)
        if of == (label, notebook) and all(map(_is_inside, record.files)):
            return record
        why = f"it is of {record.label}/{record.notebook}, or lists files elsewhere"
    _warn(path, why)
    return None


def read_records(folder: Path, label: str = "") -> list[Record]:
    """Return all records in a folder that can be used; see :func:`read_record`."""
    names = [path.name.removesuffix(SUFFIX) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    return [record for name in names if (record := read_record(folder, name, label))]


def _is_inside(name: str) -> bool:
    """Tell whether a path of a record stays where results are written."""
    first, *rest = PurePosixPath(name).parts or [""]
    return first in ("results", "figures") and bool(rest) and ".." not in rest


@cache
def _warn(path: Path, why: str) -> None:
    """Warn once about each file."""
    log.warning("%s/%s is no record (%s): as if never run", path.parent.name, path.name, why)


def git_state(root: Path) -> dict[str, Any]:
    """Return ``commit``, and whether the sources are ``dirty``; both None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        changes = git("status", "--porcelain", "--", ".", *MADE)
        return {"commit": git("rev-parse", "--verify", "HEAD").strip(), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def hardware() -> dict[str, Any]:
    """Return processor, cores, usable logical cores, threads of torch, GiB of memory, GPU in use."""
    torch = sys.modules.get("torch")  # importing it only for this takes too long
    gpu = torch is not None and torch.cuda.is_available()
    affinity = getattr(psutil.Process(), "cpu_affinity", None)  # macOS has none
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "usable_cpus": len(affinity()) if affinity else psutil.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def without_paths(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with only the last name of ``data_dir`` (its content has a hash)."""
    data_dir = parameters.get("data_dir")
    return parameters | ({"data_dir": Path(data_dir).name} if data_dir else {})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
