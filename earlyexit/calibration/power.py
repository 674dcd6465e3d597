"""Other units than those that certify tell what a certificate would find, and choose its ceiling.

A certificate bounds the mean of min(loss, B). With few units a low ceiling B certifies more; one that
is too low hides what units lose above it. Both are read off units of the fit part, whose losses stand
for those to come: nothing of the certification part is used but the number of its units.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from earlyexit.calibration.bounds import betting_p_value

CEILINGS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # B that are tried, in multiples of log(1 + ε)
HIDDEN = 0.01  # of the level: what a ceiling may hide of a mean loss that is just at the level
MEANS = (np.arange(10) + 0.5) / 10  # true means, over the level, at which power is read
BEYOND = 1e-9  # nats, against rounding
DRAWS = 200  # samples of units; the power, a mean over MEANS, is known to about 0.01


def at_means(losses: np.ndarray, means: np.ndarray, ceiling: float) -> np.ndarray:
    """Shift losses so that, clipped at the ceiling, they have given means.

    Args:
        losses: losses of units ``(units,)``, nats.
        means: means ``(candidates,)`` below the ceiling, nats.

    Returns:
        Clipped losses ``(units, candidates)``, whose means over the units are exact to rounding.
    """

    def miss(shift: float, mean: float) -> float:
        return float(np.minimum(losses + shift, ceiling).mean()) - mean

    # At the first end the mean is too low, as clipping lowers it; at the second no loss is below it.
    ends = [(mean - losses.mean() - BEYOND, mean - losses.min() + BEYOND) for mean in means]
    shifts = [
        brentq(miss, *pair, args=(m,), xtol=1e-15) for pair, m in zip(ends, means, strict=True)
    ]
    return np.minimum(losses[:, None] + np.array(shifts), ceiling)


def drawn_p_values(
    losses: np.ndarray,
    level: float,
    ceiling: float,
    n: int,
    trials: int,
    group: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Return the p-values ``(trials, candidates)`` of samples of n units, drawn with replacement.

    Args:
        losses: losses ``(units, candidates)``, each ≤ ``ceiling``; these units are the population.
        group: so many units of a sample in a row are one and the same, as documents are that depend
            on each other entirely; 1: units are independent.
    """
    shape = trials, math.ceil(n / group)
    draws = np.random.default_rng(seed).integers(0, len(losses), shape)
    rows = np.repeat(draws, group, axis=1)[:, :n]
    return np.stack([betting_p_value(losses[units].T, level, ceiling) for units in rows])


def power(
    losses: np.ndarray, level: float, ceiling: float, delta: float, n: int, trials: int = DRAWS
) -> float:
    """Return up to which share of the level n such units certify a true mean, on average.

    Where policies have means spread evenly from 0 to the level, it is also the share of them that is
    certified.

    Args:
        losses: losses of units ``(units,)``; they give the law of a loss around its mean.
        level, ceiling: log(1 + ε), and B, nats.
    """
    pool = at_means(losses, MEANS * level, ceiling)
    return float((drawn_p_values(pool, level, ceiling, n, trials) <= delta).mean())


def nearest_to_level(losses: np.ndarray, level: float) -> np.ndarray:
    """Return the losses ``(units,)`` of the candidate whose mean is nearest to the level."""
    return losses[:, np.abs(losses.mean(axis=0) - level).argmin()]


def ceilings(losses: np.ndarray, epsilon: float, delta: float, n: int) -> pd.DataFrame:
    """Tabulate what each ceiling would find and hide, and choose one, for a certificate on n units.

    The chosen one has the most power of those that hide at most ``HIDDEN``; of equals, the highest,
    which guarantees more. Where all hide more, the highest is chosen.

    Args:
        losses: losses of candidates on units of the fit part ``(units, candidates)``, nats.
        epsilon, delta: tolerated quality loss, and the probability with which it may be broken.
        n: number of units that will certify.

    Returns:
        Columns ceiling (B over log(1 + ε)), n, power, hidden (share of the level that clipping takes
        from a mean loss just at the level) and chosen.
    """
    level = math.log1p(epsilon)
    losses = nearest_to_level(losses, level)
    at_level = losses - losses.mean() + level
    rows = [
        {
            "ceiling": multiple,
            "n": n,
            "power": power(losses, level, multiple * level, delta, n),
            "hidden": 1 - np.minimum(at_level, multiple * level).mean() / level,
        }
        for multiple in CEILINGS
    ]
    table = pd.DataFrame(rows)
    allowed = table[table["hidden"] <= HIDDEN]
    best = allowed["power"][::-1].idxmax() if len(allowed) else table.index[-1]
    return table.assign(chosen=table.index == best)


def chosen_ceiling(table: pd.DataFrame) -> float:
    """Return the ceiling that :func:`ceilings` chose, in multiples of log(1 + ε)."""
    return float(table.loc[table["chosen"], "ceiling"].item())
