"""Tests decide whether the mean of a bounded loss lies below a level.

A unit (a document, say) has one loss x ≤ B. A test's p-value is for the hypothesis "the mean is above
the level", so a small one certifies the level; the upper bound is the smallest level that is certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np

PRIOR = 2.0  # units that the first bets pretend to have seen
SAFE = 0.9  # largest bet as a share of what could lose everything on one unit


def betting_p_value(x: np.ndarray, level: np.ndarray | float, ceiling: float, seed: int = 0):
    """Return a variance-adaptive p-value by betting (Waudby-Smith & Ramdas 2024, §B.2, aGRAPA).

    Capital grows by 1 + λ_i (level − x_i); the bet λ_i depends on earlier units only and keeps every
    factor positive, so under the hypothesis capital is a supermartingale, and one over its maximum is a
    p-value (Ville). Losses need a ceiling only: very negative ones help. The seed fixes a random order
    of the units.

    Args:
        x: losses ``(…, n)``, each ≤ ``ceiling``; leading dimensions are independent problems.
        level: one level, or several ``(levels,)``.
        ceiling: B.

    Returns:
        p-values ``(…,)``, or ``(…, levels)``.

    Raises:
        ValueError: a loss is NaN or above the ceiling, or a level is not below it.
    """
    x, levels = np.asarray(x, dtype=float), np.atleast_1d(np.asarray(level, dtype=float))
    if np.isnan(x).any() or (x > ceiling + 1e-12).any():
        raise ValueError(f"losses must be numbers ≤ the ceiling {ceiling}")
    if (levels >= ceiling).any():
        raise ValueError(f"levels must lie below the ceiling {ceiling}")
    order = np.random.default_rng(seed).permutation(x.shape[-1])
    flat = np.ascontiguousarray(x[..., order].reshape(-1, x.shape[-1]))
    p = np.exp(-_most_log_capital(flat, levels, ceiling)).reshape(*x.shape[:-1], len(levels))
    return p if np.ndim(level) else p[..., 0]


@numba.njit(cache=True, nogil=True)
def _most_log_capital(x, levels, ceiling):
    """Return the largest log capital on the way through the units, ≥ 0: ``(problems, levels)``."""
    out = np.zeros((len(x), len(levels)))
    for problem in range(len(x)):
        for k in range(len(levels)):
            # PRIOR units of prior: mean 0, spread B/4. Losses are small against the ceiling.
            level, mean, total = levels[k], 0.0, 0.0
            squares = PRIOR * (ceiling / 4) ** 2
            spread, most, log_capital = squares / PRIOR, SAFE / (ceiling - levels[k]), 0.0
            for i in range(x.shape[1]):
                edge = level - mean
                bet = min(max(edge / (spread + edge * edge), 0.0), most)
                log_capital += math.log1p(bet * (level - x[problem, i]))
                out[problem, k] = max(out[problem, k], log_capital)
                total += x[problem, i]
                mean = total / (i + 1 + PRIOR)
                squares += (x[problem, i] - mean) ** 2
                spread = squares / (i + 1 + PRIOR)
    return out


def hoeffding_bentkus_p_value(x: np.ndarray, level: float, ceiling: float) -> float:
    """Return the Hoeffding–Bentkus p-value (Bates et al. 2021, Prop. 8), losses clipped to [−B, B]."""
    # Loads scikit-learn, which nothing else here needs.
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    scaled = (np.clip(x, -ceiling, ceiling) + ceiling) / (2 * ceiling)
    alpha = np.array([(level + ceiling) / (2 * ceiling)])
    p = compute_hoeffding_bentkus_p_value(np.array([scaled.mean()]), len(scaled), alpha)
    return float(np.ravel(p)[0])


def bootstrap_p_value(x: np.ndarray, level: float, ceiling: float, draws: int = 2000) -> float:
    """Return the share of bootstrap means ≥ the level, a p-value that is **asymptotic** only."""
    del ceiling
    rng = np.random.default_rng(0)
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(axis=1)
    return float((1 + (means >= level).sum()) / (1 + draws))


METHODS: dict[str, Callable[[np.ndarray, float, float], float]] = {
    "betting": betting_p_value,
    "Hoeffding–Bentkus": hoeffding_bentkus_p_value,
    "bootstrap (asymptotic)": bootstrap_p_value,
}


def upper_bound(x: np.ndarray, delta: float, ceiling: float, method: str = "betting") -> float:
    """Return the smallest level ≥ −B that the test certifies at δ; B where it certifies none."""
    if method == "betting":
        levels = np.linspace(max(float(x.mean()), -ceiling), ceiling, 2001)
        refused = np.flatnonzero(betting_p_value(x, levels[:-1], ceiling) > delta)
        return float(levels[refused[-1] + 1 if refused.size else 0])
    low, high = float(np.clip(x.mean(), -ceiling, ceiling)), ceiling
    for _ in range(40):
        middle = (low + high) / 2
        if METHODS[method](x, middle, ceiling) <= delta:
            high = middle
        else:
            low = middle
    return high


def smallest_level(n: int, delta: float, ceiling: float) -> float:
    """Return B (1 − δ^{1/n}), the least that a valid test can certify if no loss is negative.

    A loss that is B with probability level/B, otherwise 0, shows only zeros in n units with
    probability (1 − level/B)ⁿ.
    """
    return ceiling * (1 - delta ** (1 / n))


def fixed_sequence(p_values: np.ndarray, delta: float) -> int:
    """Return the index of the last candidate that fixed-sequence testing accepts, −1 for none.

    Candidates are ordered from safest to riskiest beforehand; each is tested at δ until one fails, so
    the probability of accepting any that should not be is at most δ (Angelopoulos et al. 2021, LTT).
    """
    failed = np.flatnonzero(~(np.asarray(p_values) <= delta))
    return int(failed[0]) - 1 if failed.size else len(p_values) - 1


def paired_interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of paired differences, half its t interval, and the two-sided p-value."""
    from scipy import stats  # as slow to import as a quarter of all else, and rarely needed

    result = stats.ttest_1samp(differences, 0.0)
    low, _ = result.confidence_interval(level)
    mean = float(np.mean(differences))
    return mean, mean - float(low), float(result.pvalue)


def seed_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean over seeds, and the ends of its t interval, NaN with fewer than two seeds.

    Seeds are the unit: documents, however many, say nothing of what another training would give.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    mean, half, _ = paired_interval(values, level)
    return mean, mean - half, mean + half


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper & Pearson 1934)."""
    from scipy import stats

    result = stats.binomtest(successes, trials).proportion_ci(level, method="exact")
    return float(result.low), float(result.high)
