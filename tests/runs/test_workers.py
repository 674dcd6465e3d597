"""Trainings side by side give what one after the other gives, and end with who began them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from earlyexit.runs import workers

SLEEPERS = """
import sys, time
from pathlib import Path
from earlyexit.runs.workers import side_by_side

def sleep(started):
    Path(started).touch()
    time.sleep(60)

if __name__ == "__main__":
    side_by_side({path: (sleep, path) for path in sys.argv[1:]}, 2, 1)
"""


def test_calls_run_in_processes_of_the_threads_that_were_asked_for():
    calls = {0: (torch.get_num_threads,), 1: (os.getpid,), 2: (divmod, 7, 2)}
    done = workers.side_by_side(calls, 2, threads=3)
    assert list(done) == [0, 1, 2]
    assert (done[0], done[2]) == (3, (3, 1)) and done[1] != os.getpid()
    assert workers.side_by_side(calls, 1, threads=3)[1] == os.getpid()


def test_the_error_of_a_call_arrives():
    with pytest.raises(ValueError, match="no number"):
        workers.side_by_side({0: (int, "no number"), 1: (int, "1")}, 2, threads=1)


def test_the_number_of_processes_can_be_asked_for_and_is_checked(monkeypatch):
    monkeypatch.delenv(workers.JOBS, raising=False)
    assert 1 <= workers.usual_jobs(1) <= psutil.cpu_count()
    assert workers.usual_jobs(10_000) == 1
    monkeypatch.setenv(workers.JOBS, "3")
    assert workers.usual_jobs(1) == 3
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv(workers.JOBS, wrong)
        with pytest.raises(ValueError, match=f"{workers.JOBS}={wrong}"):
            workers.usual_jobs(1)


def test_processes_end_with_the_one_that_began_them(tmp_path):
    script, started = tmp_path / "sleepers.py", [tmp_path / "a", tmp_path / "b"]
    script.write_text(SLEEPERS)
    first = subprocess.Popen([sys.executable, script, *started])
    until = time.monotonic() + 60
    while not all(path.exists() for path in started):
        assert time.monotonic() < until, "the two processes did not begin"
        time.sleep(0.1)
    found = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    _, alive = psutil.wait_procs(found, timeout=10)
    assert len(found) >= 2 and not alive
