"""A token pays for the layers that it runs and for every check on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit.checked import brief
from earlyexit.exits.policy import ExitPolicy


@dataclass(frozen=True, eq=False)
class ExitCosts:
    """What a token pays, in one unit: for leaving at an exit, and for every check on the way.

    Attributes:
        leaving: cost per token of leaving at exit 0 … L − 1, without any check ``(L,)``.
        checks: price of the check after each layer ``(L,)``, of every token that reaches it; a policy
            that makes no check there does not pay it.

    Raises:
        TypeError: they are no numbers.
        ValueError: the two have different lengths, or a cost is negative or not finite.
    """

    leaving: np.ndarray
    checks: np.ndarray

    def __post_init__(self):
        for name in ("leaving", "checks"):
            object.__setattr__(self, name, _prices(name, getattr(self, name)))
        if self.leaving.shape != self.checks.shape:
            raise ValueError(f"{self.leaving.size} exits have {self.checks.size} prices of checks")

    @classmethod
    def of(cls, costs: ExitCosts | Sequence[float]) -> ExitCosts:
        """Return the costs; numbers ``(L,)`` are what leaving costs, and their checks are free."""
        if isinstance(costs, ExitCosts):
            return costs
        leaving = _prices("costs", costs)
        return cls(leaving, np.zeros_like(leaving))

    def paid(self, policy: ExitPolicy) -> np.ndarray:
        """Return the cost per token of leaving at each exit ``(L,)``, with the policy's checks."""
        checked = [policy.checks(layer) for layer in range(len(self.checks))]
        return self.leaving + np.cumsum(self.checks * checked)


def _prices(name: str, costs: object) -> np.ndarray:
    try:
        prices = np.asarray(costs, dtype=float)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={brief(costs)}: must be numbers, one per exit") from None
    if prices.ndim != 1 or not (np.isfinite(prices) & (prices >= 0)).all():
        raise ValueError(f"{name}={prices.tolist()}: must be a list of finite numbers ≥ 0")
    return prices
