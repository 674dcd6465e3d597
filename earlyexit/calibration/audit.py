"""An audit resamples units, certifies, and counts how often the certificate breaks its word."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.stats import gamma

from earlyexit.calibration.bounds import (
    METHODS,
    betting_p_value,
    binomial_interval,
    fixed_sequence,
    upper_bound,
)
from earlyexit.calibration.certificate import CEILING

PROCEDURES = ("last that passes", "first that fails (known bad)")


def audit(
    losses: np.ndarray,
    risks: np.ndarray,
    epsilon: float,
    delta: float,
    n: int,
    trials: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Count how often resampled units certify a candidate whose true risk is too high.

    The known-bad control returns the first candidate that *fails*, an off-by-one found in published
    risk-control code; an audit that does not catch it is worth nothing.

    Args:
        losses: a pool of units ``(units, candidates)``, resampled with replacement.
        risks: true mean clipped loss of each candidate ``(candidates,)``.
        epsilon, delta: tolerated quality loss, and the probability with which it may be broken.
        n, trials: number of units in a sample, and of samples.

    Returns:
        One row per procedure: ``violations``, ``trials``, ``rate`` with its exact 95 % interval
        ``low``, ``high``, and ``refusals``.
    """
    level, ceiling = math.log1p(epsilon), CEILING * math.log1p(epsilon)
    pool = np.minimum(losses, ceiling)
    draws = np.random.default_rng(seed).integers(0, len(pool), (trials, n))
    passed = np.empty(trials, dtype=int)
    for trial, rows in enumerate(draws):
        passed[trial] = fixed_sequence(betting_p_value(pool[rows].T, level, ceiling), delta)
    rows = []
    for procedure, shift in zip(PROCEDURES, (0, 1), strict=True):
        chosen = np.minimum(passed + shift, len(risks) - 1)
        violations = int(((chosen >= 0) & (risks[chosen] > level)).sum())
        low, high = binomial_interval(violations, trials)
        rows.append(
            {
                "procedure": procedure,
                "n": n,
                "violations": violations,
                "trials": trials,
                "rate": violations / trials,
                "low": low,
                "high": high,
                "refusals": int((chosen < 0).sum()),
            }
        )
    return pd.DataFrame(rows)


def synthetic_units(
    n: int, epsilon: float, candidates: int = 12, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Make units with known risks, which rise through the level in the middle of the path.

    A unit has one difficulty, drawn from a skewed law with mean 1; its loss under a candidate is the
    candidate's risk times its difficulty, clipped at the ceiling.

    Returns:
        Losses ``(n, candidates)`` and true mean clipped losses ``(candidates,)``.
    """
    level, ceiling = math.log1p(epsilon), CEILING * math.log1p(epsilon)
    rng = np.random.default_rng(seed)
    shape = 2.0  # of a gamma law: standard deviation 0.71 of the mean
    difficulty = rng.gamma(shape, 1 / shape, n)
    aims = level * np.linspace(0.4, 1.6, candidates)
    losses = np.minimum(difficulty[:, None] * aims, ceiling)
    return losses, _clipped_gamma_mean(shape, aims, ceiling)


def _clipped_gamma_mean(shape: float, means: np.ndarray, ceiling: float) -> np.ndarray:
    """Return E min(X, B) of gamma variables of a shape and mean, in closed form."""
    edge = ceiling / means
    below = gamma.cdf(edge, shape + 1, scale=1 / shape)
    return means * below + ceiling * gamma.sf(edge, shape, scale=1 / shape)


def width_table(losses: np.ndarray, delta: float, ceiling: float) -> pd.DataFrame:
    """Bound one candidate's mean loss by every method: columns method, n, mean, bound."""
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
