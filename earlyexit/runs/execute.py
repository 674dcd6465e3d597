"""A notebook is executed, and then what it wrote is published."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import papermill
import zmq
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillException, PapermillExecutionError
from traitlets import default

from earlyexit.atomic import atomic_path
from earlyexit.runs import artifacts, freshness, provenance
from earlyexit.runs.freshness import RunError
from earlyexit.runs.paths import HOME_VARIABLE, PACKAGE, Project
from earlyexit.runs.provenance import Fingerprint, Record
from earlyexit.runs.settings import Resolved

# The executed copy keeps every update of a progress bar: one in five seconds is enough.
QUIET_BARS = {"TQDM_MININTERVAL": "5"}
KERNEL_LOG = "EARLYEXIT_KERNEL_LOG"
ONE_EACH = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class OwnKernel(AsyncKernelManager):
    """A kernel manager that starts ``sys.executable``, whatever ``python3`` is registered.

    What the kernel writes beside the notebook's outputs (the profiler, ipykernel) goes to a file.
    """

    async def start_kernel(self, **options) -> None:
        with open(os.environ[KERNEL_LOG], "ab") as log:
            await super().start_kernel(stdout=log, stderr=log, **options)

    @default("kernel_spec_manager")
    def _only_native_kernel(self) -> KernelSpecManager:
        return KernelSpecManager(parent=self, kernel_dirs=[])

    @default("transport_encryption")
    def _as_far_as_possible(self) -> str:
        return "auto" if zmq.has("curve") else "disabled"


def execute(
    project: Project,
    path: Path,
    resolved: Resolved,
    command: str,
    fingerprint: Fingerprint,
    title: str,
) -> None:
    """Run a notebook and publish what it wrote.

    Args:
        command: command line that the record names.
        fingerprint: taken before the run, so that an edit during the run makes the result stale.
        title: text before the progress bar.

    Raises:
        RunError: a cell raised, the kernel died, or nothing was written. The executed copy is kept
            as ``build/<label>/<notebook>.failed.ipynb``.
    """
    label, name = resolved.label, path.stem
    copy = project.executed(label, name)
    failed = copy.with_name(f"{name}.failed.ipynb")
    temporary = copy.with_name(f".{name}.tmp.ipynb")
    folder = copy.with_name(f"{name}.out")
    log = copy.with_name(f"{name}.log")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    log.unlink(missing_ok=True)
    variables = {variable: str(resolved.profile.threads) for variable in ONE_EACH} | {
        KERNEL_LOG: str(log),
        HOME_VARIABLE: str(project.root),
        artifacts.RUN_ID: uuid.uuid4().hex[:16],
        artifacts.LABEL: label,
        artifacts.COMMAND: command,
        artifacts.FOLDER: str(folder),
    }
    started, git_state = time.monotonic(), provenance.git_state(project.root)
    try:
        with _environment(variables):
            _execute(path, temporary, resolved.parameters[name], title)
        written = provenance.read_record(folder, name)
        if written is None or not written.files:
            raise RunError(f"{name} ended without writing any table or figure")
        if wrong := written.unmatched(folder):
            raise RunError(f"{name}: {'; '.join(wrong)}")
    except RunError as error:
        kept = log
        if temporary.is_file():  # the kernel may have died before a cell ran
            os.replace(temporary, kept := failed)
        raise RunError(f"{error}; see {project.relative(kept)}") from error
    else:
        os.replace(temporary, copy)
        failed.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        record = replace(
            written,
            parameters=provenance.without_paths(resolved.parameters[name]),
            settings=resolved.asked,
            fingerprint=fingerprint,
            seconds=round(time.monotonic() - started, 1),
            work=freshness.training_work(resolved.profile, len(resolved.seeds)),
            **git_state,
        )
        publish(project, record, folder)
    finally:
        temporary.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def publish(project: Project, record: Record, folder: Path) -> None:
    """Put the files of a run among the results and figures of its label, and the record last.

    Files that only an earlier run of the notebook wrote are removed. If the process is killed before
    the record is written, the earlier record no longer matches, and the notebook runs again.
    """
    before = freshness.published(project, record.label, record.notebook)
    files = {}
    for name, file in record.files.items():
        top, _, rest = name.partition("/")
        files[f"{top}/{record.label}/{rest}"] = file
        with atomic_path(project.root / top / record.label / rest) as temporary:
            shutil.copyfile(folder / name, temporary)
    for name in (before.files if before else {}).keys() - files.keys():
        (project.root / name).unlink(missing_ok=True)
    replace(record, files=files).write(project.published(record.label))


def _execute(path: Path, copy: Path, parameters: dict[str, Any], title: str) -> None:
    """Run a notebook from its own folder, as JupyterLab does, into an executed ``copy``.

    If this process is killed, the kernel ends within a second (ipykernel watches its parent).
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


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set the variables that the kernel inherits; it imports the package that runs now.

    Jupyter's and IPython's own files go into a folder of the moment: a home folder may not be writable,
    and a user's start-up files must not decide a result.
    """
    search = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    before = os.environ.copy()
    with tempfile.TemporaryDirectory(prefix="earlyexit-", ignore_cleanup_errors=True) as own:
        os.environ.update(QUIET_BARS | variables)
        os.environ |= {"IPYTHONDIR": own, "JUPYTER_RUNTIME_DIR": own}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
