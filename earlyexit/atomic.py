"""A file is written whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HOUR = 3600.0  # seconds


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces it when the block ends without error.

    Raises:
        OSError: writing failed (the disk is full, say), and the message names ``path``; the old file
            then stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a failed write does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, untouched: float = HOUR) -> None:
    """Remove the temporary files below a folder that killed processes left.

    Args:
        untouched: seconds for which nobody wrote to such a file. A process that is not running here may
            be writing on another machine that shares the folder, but none takes an hour over a file.
    """
    for path in folder.rglob(".*.tmp"):
        process = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            with suppress(FileNotFoundError):  # it was put in place, or another run removes it, too
                if time.time() - path.stat().st_mtime >= untouched:
                    path.unlink()
