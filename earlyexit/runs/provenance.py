"""What a number's birth certificate says about where it was made.

No user, host or folder name is recorded: certificates are committed and published.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    "torch", "numpy", "numba", "pandas", "matplotlib", "datasets", "tokenizers", "papermill",
)  # fmt: skip


MADE = (":!results", ":!figures", ":!README.md")  # a run writes these: they do not make it dirty


def git_state(root: Path) -> dict[str, Any]:
    """``commit``, and whether the sources are ``dirty``; both None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--", ".", *MADE)
    return {
        "commit": git("rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def versions() -> dict[str, str | None]:
    """Python's version and those of the libraries that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, physical and usable logical cores, threads of torch, memory in GiB, GPU if in use."""
    torch = sys.modules.get("torch")  # not worth importing for its own sake
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
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def without_paths(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as published: of ``data_dir`` only the last name (its content has a hash)."""
    data_dir = parameters.get("data_dir")
    return parameters | ({"data_dir": Path(data_dir).name} if data_dir else {})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
