"""Bounds: valid at the level, no tighter than possible, and as the published procedures say."""

import numpy as np
import pytest
from mapie.risk_control import control_fwer
from scipy import stats

from earlyexit.calibration.bounds import (
    METHODS,
    betting_p_value,
    binomial_interval,
    bootstrap_p_value,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    paired_interval,
    seed_interval,
    smallest_level,
    upper_bound,
)

CEILING, DELTA = 0.2, 0.1


def capital(x, level, ceiling, order):
    """The betting game, one bet after another, as the docstring tells it."""
    wealth, most = 1.0, 1.0
    seen = [0.0, 0.0]
    spread = (ceiling / 4) ** 2
    squares = 2 * spread
    for i in order:
        mean = sum(seen) / len(seen)
        edge = level - mean
        bet = min(max(edge / (spread + edge**2), 0), 0.9 / (ceiling - level))
        wealth *= 1 + bet * (level - x[i])
        most = max(most, wealth)
        seen.append(x[i])
        squares += (x[i] - sum(seen) / len(seen)) ** 2
        spread = squares / len(seen)
    return most


def test_betting_is_the_game_it_describes():
    x = np.random.default_rng(3).uniform(-0.1, 0.15, 25)
    order = np.random.default_rng(0).permutation(25)
    for level in (0.03, 0.1):
        expected = 1 / capital(x, level, CEILING, order)
        assert betting_p_value(x, level, CEILING) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_p_values_are_valid_at_the_level(n):
    """Under the hypothesis, p ≤ δ at most a share δ of the time (4 standard errors of slack)."""
    rng = np.random.default_rng(n)
    x = np.minimum(rng.gamma(1.0, 0.06, (3000, n)), CEILING)
    mean = 0.06 * stats.gamma.cdf(CEILING / 0.06, 2) + CEILING * stats.gamma.sf(CEILING / 0.06, 1)
    wrong = (betting_p_value(x, mean, CEILING) <= DELTA).mean()
    assert wrong <= DELTA + 4 * np.sqrt(DELTA * (1 - DELTA) / 3000)


def test_betting_beats_hoeffding_bentkus_and_neither_beats_the_possible():
    x = np.random.default_rng(0).normal(0.02, 0.02, 60).clip(max=CEILING)
    bounds = {method: upper_bound(x, DELTA, CEILING, method) for method in METHODS}
    assert x.mean() < bounds["betting"] < bounds["Hoeffding–Bentkus"]
    zeros = np.zeros(60)
    for method in ("betting", "Hoeffding–Bentkus"):
        assert upper_bound(zeros, DELTA, CEILING, method) >= smallest_level(60, DELTA, CEILING)


def test_upper_bound_is_where_the_test_stops_refusing():
    x = np.random.default_rng(1).uniform(0, 0.1, 80)
    for method, p_value in METHODS.items():
        bound = upper_bound(x, DELTA, CEILING, method)
        assert p_value(x, bound * 1.001, CEILING) <= DELTA < p_value(x, bound * 0.98, CEILING)


def test_hoeffding_bentkus_clips_and_scales():
    x = np.array([-1.0, 0.0, 0.1, 0.05])
    assert hoeffding_bentkus_p_value(x, 0.1, CEILING) == hoeffding_bentkus_p_value(
        x.clip(-CEILING, CEILING), 0.1, CEILING
    )
    assert 0 < bootstrap_p_value(np.full(30, 0.01), 0.05, CEILING) < 0.01


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.2, 0.01], [0.5, 0.0], [0.01, 0.02], [np.nan, 0.0]])
def test_fixed_sequence_is_the_textbook_procedure(p):
    index = fixed_sequence(np.array(p), 0.05)
    if not np.isnan(p).any():
        accepted = control_fwer(np.array(p), 0.05, "fixed_sequence")
        assert index == (max(accepted) if len(accepted) else -1)
    assert all(value <= 0.05 for value in p[: index + 1])
    assert index + 1 == len(p) or not p[index + 1] <= 0.05


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match="ceiling"):
        betting_p_value(np.array([0.1, np.nan]), 0.05, CEILING)
    with pytest.raises(ValueError, match="ceiling"):
        betting_p_value(np.array([0.1, 0.3]), 0.05, CEILING)
    with pytest.raises(ValueError, match="below the ceiling"):
        betting_p_value(np.array([0.1, 0.1]), 0.3, CEILING)


def test_intervals():
    low, high = binomial_interval(0, 100)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 100))
    x = np.random.default_rng(0).normal(1, 2, 50)
    mean, half, p = paired_interval(x)
    assert half == pytest.approx(stats.t.ppf(0.975, 49) * x.std(ddof=1) / np.sqrt(50))
    assert (p < 0.05) == (abs(mean) > half)


def test_an_interval_over_seeds_covers_and_one_seed_has_none():
    x = np.array([1.0, 2.0, 4.0])
    mean, low, high = seed_interval(x)
    half = stats.t.ppf(0.975, 2) * x.std(ddof=1) / np.sqrt(3)
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert seed_interval(x[:1])[0] == 1 and np.isnan(seed_interval(x[:1])[1:]).all()
    seeds = np.random.default_rng(0).normal(0, 1, (2000, 3))
    low, high = np.array([seed_interval(three)[1:] for three in seeds]).T
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(0.95, abs=0.02)
    inside = (seeds.min(axis=1) <= 0) & (seeds.max(axis=1) >= 0)
    assert inside.mean() == pytest.approx(0.75, abs=0.04), "the range of three is no 95 % interval"
