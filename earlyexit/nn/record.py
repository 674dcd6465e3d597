"""Layers tell whoever listens about the batch that they run; nothing of it stays on a module.

A loss that needs more than the states, such as the balance of experts, runs the model in a context:
``with recorded(targets != IGNORE) as record``. Padded positions count in nothing that is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch.nn import functional as F

_listening: ContextVar[BatchRecord | None] = ContextVar("record of the batch", default=None)


class BatchRecord:
    """A record of one batch at full depth.

    Args:
        counted: which positions count ``(B, N)``, those that are no padding.

    Attributes:
        notes: name → what layers said, in the order in which they ran, with gradients.
    """

    def __init__(self, counted: Tensor):
        self.notes: dict[str, list[Tensor]] = defaultdict(list)
        self._counted = None if counted.all() else counted

    def counted(self, values: Tensor) -> Tensor:
        """Return the rows of values ``(T, …)`` that count ``(S, …)``, of one layer's T positions.

        A position of a coarser scale counts if one of its tokens does.
        """
        mask = self._counted
        if mask is None:
            return values
        while mask.numel() > len(values) and mask.shape[1] > 1:
            mask = F.pad(mask, (0, mask.shape[1] % 2)).unflatten(1, (-1, 2)).any(dim=-1)
        return values[mask.flatten()]


@contextmanager
def recorded(counted: Tensor) -> Iterator[BatchRecord]:
    """Listen to the layers that run in the block."""
    record = BatchRecord(counted)
    token = _listening.set(record)
    try:
        yield record
    finally:
        _listening.reset(token)


def listening() -> BatchRecord | None:
    """Return the record of the batch that runs, or None if nobody listens."""
    return _listening.get()
