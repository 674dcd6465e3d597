"""Making the results of one notebook: execute it, keep what it wrote, sign the receipt."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
import zmq
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillException, PapermillExecutionError
from traitlets import default

from earlyexit.runs import artifacts, digests, estimates, provenance
from earlyexit.runs import freshness as receipts
from earlyexit.runs.freshness import RunError
from earlyexit.runs.paths import HOME_VARIABLE, PACKAGE, Project
from earlyexit.runs.settings import Resolved

# Each update of a bar is kept in the executed copy: one every few seconds is enough.
QUIET_BARS = {"TQDM_MININTERVAL": "5"}


class OwnKernel(AsyncKernelManager):
    """Starts ``python3`` as ``sys.executable``, whatever else is registered under that name."""

    @default("kernel_spec_manager")
    def _only_native_kernel(self) -> KernelSpecManager:
        return KernelSpecManager(parent=self, kernel_dirs=[])

    @default("transport_encryption")
    def _as_far_as_possible(self) -> str:
        return "auto" if zmq.has("curve") else "disabled"


def make(
    place: Project,
    path: Path,
    resolved: Resolved,
    command: str,
    fingerprint: dict[str, Any],
    title: str,
) -> None:
    """Run a notebook; what an earlier run wrote and this one did not is removed.

    Args:
        command: what is recorded as having asked for it.
        fingerprint: taken before the run: an edit during the run makes the result stale.
        title: stands before the progress bar.

    Raises:
        RunError: a cell raised, the kernel died, or nothing was written. The executed copy is kept
            as ``build/<label>/<notebook>.failed.ipynb``.
    """
    label, name, run_id = resolved.label, path.stem, uuid.uuid4().hex[:16]
    copy = receipts.executed_path(place, label, name)
    failed = copy.with_name(f"{name}.failed.ipynb")
    temporary = copy.with_name(f".{name}.tmp.ipynb")
    variables = {
        HOME_VARIABLE: str(place.root),
        artifacts.RUN_ID: run_id,
        artifacts.LABEL: label,
        artifacts.COMMAND: command,
    }
    started = time.monotonic()
    try:
        with _environment(variables):
            _execute(path, temporary, resolved.parameters[name], title)
        written = _written(place, label, name, run_id)
    except RunError as error:
        os.replace(temporary, failed)
        raise RunError(f"{error}; see {place.relative(failed)}") from error
    else:
        os.replace(temporary, copy)
        failed.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)

    outputs = [p for meta in written for p in (meta, *artifacts.described(meta, written[meta]))]
    receipt = {
        "notebook": name,
        "label": label,
        "run_id": run_id,
        "command": command,
        "settings": resolved.asked,
        "fingerprint": fingerprint,
        "outputs": {place.relative(p): digests.of_file(p) for p in outputs},
        "seconds": round(time.monotonic() - started, 1),
        "work": estimates.training_work(resolved.profile, len(resolved.seeds)),
        **provenance.git_state(place.root),
        "versions": provenance.versions(),
        "hardware": next(iter(written.values()))["hardware"],  # the kernel's: it knows the GPU
        "time": provenance.now(),
    }
    artifacts.write_json(receipts.receipt_path(place, label, name), receipt)


def _execute(path: Path, copy: Path, parameters: dict[str, Any], title: str) -> None:
    """Run a notebook from its own folder, as JupyterLab does, into an executed ``copy``.

    When this process dies, so does the kernel within a second (ipykernel watches its parent).
    """
    try:
        papermill.execute_notebook(
            path,
            copy,
            parameters,
            kernel_name="python3",
            language="python",
            kernel_manager_class=OwnKernel,
            cwd=path.parent,
            progress_bar={"desc": title},
            coalesce_streams=True,
        )
    except PapermillExecutionError as error:
        what = f"{error.ename}: {error.evalue}".splitlines()[0][:300]
        message = f"{path.stem} failed in cell In [{error.exec_count}]: {what}"
        raise RunError(message) from error
    except (PapermillException, RuntimeError) as error:  # DeadKernelError is a RuntimeError
        raise RunError(f"{path.stem} failed: {error}") from error


def _written(place: Project, label: str, name: str, run_id: str) -> dict[Path, dict[str, Any]]:
    """The certificates of this run; those of earlier runs of the notebook are removed.

    Raises:
        RunError: the run wrote nothing, or something that does not match its certificate.
    """
    own = {p: m for p, m in artifacts.certificates(label, place.root) if m["notebook"] == name}
    written = {p: m for p, m in own.items() if m["run_id"] == run_id}
    if not written:
        raise RunError(f"{name} ended without writing any table or figure")
    for certificate, meta in written.items():
        if not artifacts.is_whole(certificate, meta):
            raise RunError(f"{place.relative(certificate)} does not match the files it describes")
    for certificate in own.keys() - written.keys():
        certificate.unlink()  # first: what has no certificate is not read
        for file in artifacts.described(certificate, own[certificate]):
            file.unlink(missing_ok=True)
    return written


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The variables that the kernel inherits; it imports the package that is running now."""
    search = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    before = os.environ.copy()
    os.environ.update(QUIET_BARS | variables)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
