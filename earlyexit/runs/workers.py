"""Trainings that do not need each other run side by side, one process each.

Every process has the threads of the profile, so how many there are changes the time and no number.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection
from typing import Any, TypeVar

import psutil
import torch
from tqdm.auto import tqdm

from earlyexit.runs.provenance import hardware

JOBS = "EARLYEXIT_JOBS"  # number of processes, instead of one for each usable core
MEMORY = 2 * 2**30  # bytes of free memory that a process must find
Key = TypeVar("Key", bound=Hashable)
Call = tuple[Callable[..., Any], *tuple[Any, ...]]


def usual_jobs(threads: int) -> int:
    """Return how many processes of that many threads fit the usable cores and the free memory.

    Raises:
        ValueError: the variable ``EARLYEXIT_JOBS`` is no number of at least 1.
    """
    if asked := os.environ.get(JOBS, ""):
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"{JOBS}={asked}: the number of processes must be at least 1")
        return int(asked)
    memory = psutil.virtual_memory().available // MEMORY
    return max(1, min(hardware()["usable_cpus"] // threads, memory))


def side_by_side(calls: Mapping[Key, Call], jobs: int, threads: int) -> dict[Key, Any]:
    """Return key → what its call, a function and its arguments, returns.

    Args:
        calls: they must be picklable, with what they return; with one job they run in this process.
        jobs: number of processes.
        threads: threads of torch in each.

    Raises:
        BrokenProcessPool: a process was killed.
        Exception: the first that a call raises; calls that have not begun are dropped.
    """
    jobs = min(jobs, len(calls))
    if jobs <= 1:
        return {key: function(*arguments) for key, (function, *arguments) in calls.items()}
    context = multiprocessing.get_context("spawn")  # forked threads of OpenMP would wait for ever
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads,))
    try:
        futures = {key: pool.submit(*call) for key, call in calls.items()}
        for future in tqdm(as_completed(futures.values()), "models", len(futures), mininterval=2):
            future.result()
        return {key: future.result() for key, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """Set up a process: its threads, and that it ends with the process that began it."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
