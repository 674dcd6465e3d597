"""Code that is timed tells a stopwatch where its parts end.

It calls ``mark = marker()`` once and ``mark("blocks")`` after each part; while no clock runs that
call does nothing. Every interval between two marks is booked once, so the parts add up to the total.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from earlyexit.devices import synchronize

PARTS = ("blocks", "check", "propagation", "gather/scatter", "head", "rest")
_running: ContextVar[PartClock | None] = ContextVar("running clock", default=None)


class PartClock:
    """A clock holds the seconds per part of what has been run under :func:`timed_parts`.

    Attributes:
        seconds: part → seconds; what no mark claims is "rest".
        total: seconds from start to stop.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.total = 0.0
        self._last = 0.0

    def mark(self, part: str, other: str | None = None, share: float = 1.0) -> None:
        """Book the time since the last mark: ``share`` of it on ``part``, the rest on ``other``."""
        synchronize(self.device)
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.total += elapsed
        self.seconds[part] += share * elapsed
        if other is not None:
            self.seconds[other] += (1 - share) * elapsed


def _nothing(part: str, other: str | None = None, share: float = 1.0) -> None:
    pass


def marker() -> Callable[..., None]:
    """Return :meth:`PartClock.mark` of the running clock, or a function that does nothing."""
    clock = _running.get()
    return clock.mark if clock is not None else _nothing


@contextmanager
def timed_parts(device: torch.device) -> Iterator[PartClock]:
    """Run a clock over the block; marks inside synchronise the device."""
    clock = PartClock(device)
    token = _running.set(clock)
    synchronize(device)
    clock._last = time.perf_counter()
    try:
        yield clock
        clock.mark("rest")
    finally:
        _running.reset(token)
