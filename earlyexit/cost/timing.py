"""Measure times that are interleaved, warmed up and synchronised, and compare them."""

from __future__ import annotations

import ctypes
import random
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from functools import cache

import numpy as np
import torch

from earlyexit.devices import synchronize

INTERVAL = ("speedup_time", "low", "high")  # columns of a ratio of times and its interval


def interleaved_times(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 9,
) -> dict[str, np.ndarray]:
    """Measure the seconds of each function ``(repeats,)``, interleaved so that drift affects all alike.

    Each is called untimed right before it is timed, so that caches are warm, as between batches. Every
    round has a new random order, so that no function always follows the same one.
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
    """Keep glibc from returning freed memory to the kernel, for the rest of the process.

    Otherwise a run may first have to map its pages again, depending on what ran before it, and this
    can take as long as a small layer.
    """
    if sys.platform == "linux":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # malloc.h
        if hasattr(libc, "mallopt"):
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(mmap_threshold, 2**25)  # the largest value that is accepted


def median_ratio(
    baseline: np.ndarray, other: np.ndarray, level: float = 0.9, draws: int = 1000
) -> tuple[float, float, float]:
    """Return the ratio of median times ``baseline / other`` and its bootstrap interval over repeats."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(baseline), (draws, len(baseline)))
    ratios = np.median(baseline[rows], axis=1) / np.median(other[rows], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(baseline) / np.median(other)), float(low), float(high)


def time_columns(baseline: np.ndarray, other: np.ndarray, *names: str) -> dict[str, float]:
    """Return :func:`median_ratio` as columns of a table.

    Args:
        names: the names of the ratio and of the two ends of its interval; or the first of them, to
            which _low and _high are added (default ``speedup_time``).
    """
    if len(names) < 3:
        (name,) = names or ("speedup_time",)
        names = (name, f"{name}_low", f"{name}_high")
    return dict(zip(names, median_ratio(baseline, other), strict=True))


def median_ms(seconds: Mapping[Hashable, np.ndarray]) -> dict[Hashable, float]:
    """Return the median milliseconds of each run of :func:`interleaved_times`."""
    return {name: 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
