"""What is kept is verified when it is used again; if it was damaged, it is made again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from earlyexit.atomic import atomic_path
from earlyexit.runs import digests

log = logging.getLogger(__name__)
Keep = Callable[..., Path]


def verified(keep: Keep) -> Keep:
    """Decorate a function that returns a file or folder, which it makes if it is not there.

    Beside it lies its digest, written when it is first returned: ``<name>.sha256``. It makes no number,
    so that digests of code leave it out; see :mod:`earlyexit.runs.digests`.
    """

    @wraps(keep)
    def checked(*args, **named) -> Path:
        path = keep(*args, **named)
        told = path.with_name(f"{path.name}.sha256")
        if told.is_file() and told.read_text() != _digest(path):
            log.warning("%s is not as it was kept, and is made again", path.name)
            remove = shutil.rmtree if path.is_dir() else Path.unlink
            remove(path)
            told.unlink()
            path = keep(*args, **named)
        if not told.is_file():
            with atomic_path(told) as temporary:
                temporary.write_text(_digest(path))
        return path

    return checked


def _digest(path: Path) -> str:
    """Return the digest of the bytes and of the name, so that no entry takes another's place."""
    content = digests.of_files(path) if path.is_dir() else digests.of_file(path)
    return digests.of_object({path.name: content})
