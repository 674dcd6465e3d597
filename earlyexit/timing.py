"""Measuring time and memory: interleaved, warmed up, synchronised."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from earlyexit.devices import synchronize


def interleaved_times(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 9,
) -> dict[str, np.ndarray]:
    """Seconds of each function ``(repeats,)``, called in turn so that drift hits all alike.

    Each is called once more, untimed, right before it is timed: caches are warm, as they are when one
    batch follows another, whatever ran before. The order is drawn anew in every round, so that none
    always follows the same neighbour.
    """
    _keep_freed_memory()
    names, order = list(functions), random.Random(0)
    seconds = {name: np.empty(repeats) for name in names}
    for repeat in range(repeats):
        for name in order.sample(names, len(names)):
            functions[name]()
            synchronize(device)
            start = time.perf_counter()
            functions[name]()
            synchronize(device)
            seconds[name][repeat] = time.perf_counter() - start
    return seconds


@cache
def _keep_freed_memory() -> None:
    """Keep glibc from handing freed tensors back to the kernel, for the rest of the process.

    Otherwise whether a run first has its pages mapped again, which can take as long as a small layer,
    depends on what ran before it.
    """
    if sys.platform == "linux":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # malloc.h
        if hasattr(libc, "mallopt"):
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(mmap_threshold, 2**25)  # the largest that is taken


def median_ratio(
    baseline: np.ndarray, other: np.ndarray, level: float = 0.9, draws: int = 1000
) -> tuple[float, float, float]:
    """Ratio of median times ``baseline / other`` with a bootstrap interval over repeats."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(baseline), (draws, len(baseline)))
    ratios = np.median(baseline[rows], axis=1) / np.median(other[rows], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(baseline) / np.median(other)), float(low), float(high)


def peak_tensor_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest sum of tensor storage alive at once during ``function``, beyond what was there before.

    On CUDA the allocator counts; on the CPU the profiler's record of allocations is replayed.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(alive.max(initial=0))


def peak_rss_bytes(function: Callable[..., object], *args) -> int:
    """Growth of the peak resident memory of a fresh process while it runs ``function(*args)``.

    ``function`` is called once with a first argument ``False`` (everything but the work to be measured)
    and once, in another process, with ``True``; the difference is returned. CPU only; the function
    must be importable.
    """
    idle, busy = (_child_peak(function, work, *args) for work in (False, True))
    return max(0, busy - idle)


def _child_peak(function, work: bool, *args) -> int:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(writer, function, work, *args))
    child.start()
    writer.close()
    try:
        peak = reader.recv()
    except EOFError:
        raise RuntimeError("the measured process ended without a result") from None
    finally:
        child.join()
    return peak


def _report_peak(writer, function, work: bool, *args) -> None:
    function(work, *args)
    writer.send(_own_peak())


def _own_peak() -> int:
    """Peak resident bytes of this process. ``ru_maxrss`` would start at the parent's."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
