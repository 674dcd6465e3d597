"""A file is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files below a folder that killed processes left."""
    for path in folder.rglob(".*.tmp"):
        process = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)
