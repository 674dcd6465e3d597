"""An audit draws units again and again, and counts how often their certificate breaks its word."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from earlyexit.calibration.bounds import METHODS, binomial_interval, fixed_sequence, upper_bound
from earlyexit.calibration.power import at_means, drawn_p_values, power

PROCEDURES = ("last that passes", "first that fails (known bad)")

# True means of the audited candidates, over the level. The second is the hardest to refuse of those
# that must be; the first is so safe that even few units accept it, or the control would go unnoticed.
PATH = np.array([0.25, 1.0, 1.25])


def audit(
    losses: np.ndarray,
    epsilon: float,
    delta: float,
    n: int,
    trials: int,
    *,
    ceiling: float,
    group: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Count how often n drawn units certify a candidate whose true mean is not below the level.

    The units are the population; shifted, they are candidates with the means in ``PATH``. The
    known-bad control returns the first candidate that *fails*, an off-by-one found in published
    risk-control code; an audit that does not catch it is worth nothing.

    Args:
        losses: losses of units ``(units,)``, nats.
        epsilon, delta: tolerated quality loss, and the probability with which it may be broken.
        n, trials: number of units in a sample, and of samples.
        ceiling: B over log(1 + ε).
        group: so many units of a sample are one and the same; 1: they are independent.

    Returns:
        One row per procedure: group, n, ``violations``, ``trials``, ``rate`` with its exact 95 %
        interval ``low``, ``high``, ``refusals``, and ``power`` (NaN where it says nothing: for the
        control, and for units that are not independent).
    """
    level = math.log1p(epsilon)
    ceiling *= level
    pool = at_means(losses, PATH * level, ceiling)
    p_values = drawn_p_values(pool, level, ceiling, n, trials, group, seed)
    passed = np.array([fixed_sequence(p, delta) for p in p_values])
    found = power(losses, level, ceiling, delta, n) if group == 1 else math.nan
    rows = []
    for procedure, shift in zip(PROCEDURES, (0, 1), strict=True):
        chosen = np.minimum(passed + shift, len(PATH) - 1)
        violations = int(((chosen >= 0) & (PATH[chosen] >= 1)).sum())
        low, high = binomial_interval(violations, trials)
        rows.append(
            {
                "procedure": procedure,
                "group": group,
                "n": n,
                "violations": violations,
                "trials": trials,
                "rate": violations / trials,
                "low": low,
                "high": high,
                "refusals": int((chosen < 0).sum()),
                "power": math.nan if shift else found,
            }
        )
    return pd.DataFrame(rows)


def synthetic_units(n: int, epsilon: float, seed: int = 0) -> np.ndarray:
    """Draw losses ``(n,)`` of mean log(1 + ε) from a skewed law, a gamma of shape 2, in nats."""
    shape = 2.0  # standard deviation 0.71 of the mean
    return np.random.default_rng(seed).gamma(shape, math.log1p(epsilon) / shape, n)


def width_table(losses: np.ndarray, delta: float, ceiling: float) -> pd.DataFrame:
    """Bound one candidate's mean loss by every method: columns method, n, mean, bound.

    Args:
        ceiling: B in nats.
    """
    clipped = np.minimum(losses, ceiling)
    return pd.DataFrame(
        {
            "method": method,
            "n": len(clipped),
            "mean": clipped.mean(),
            "bound": upper_bound(clipped, delta, ceiling, method),
        }
        for method in METHODS
    )
