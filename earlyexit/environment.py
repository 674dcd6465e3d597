"""What is set before torch and numba are loaded: threads that wait without spinning, a writable cache.

Two threads that spin while they wait are several times slower than one where a core is busy. And where
neither the package nor the home folder can be written (a container, say), numba refuses to compile
anything that it is to cache.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def writable(folder: Path) -> bool:
    """Tell whether files can be made in a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def prepare() -> None:
    """Set what the user has not set; compiled code is kept for this process alone if nowhere else."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    package = Path(__file__).parent
    candidates = (package / "nn" / "__pycache__", Path("~/.cache/numba").expanduser())
    if "NUMBA_CACHE_DIR" not in os.environ and not any(map(writable, candidates)):
        folder = tempfile.mkdtemp(prefix="earlyexit-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["NUMBA_CACHE_DIR"] = folder


prepare()
