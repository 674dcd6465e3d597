"""Power, the choice of a ceiling, and the audit with its known-bad control."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.calibration.audit import PROCEDURES, audit, synthetic_units
from earlyexit.calibration.bounds import betting_p_value
from earlyexit.calibration.power import (
    CEILINGS,
    HIDDEN,
    at_means,
    ceilings,
    chosen_ceiling,
    drawn_p_values,
    nearest_to_level,
    power,
)
from earlyexit.calibration.trace import ExitTrace
from earlyexit.calibration.unit_losses import traced_losses
from earlyexit.exits.policy import ExitPolicy

EPSILON, DELTA = 0.05, 0.05
LEVEL = math.log1p(EPSILON)


@settings(max_examples=40, deadline=None)
@given(
    losses=st.lists(st.floats(-2, 2), min_size=2, max_size=30),
    means=st.lists(st.floats(-1, 0.99), min_size=1, max_size=4),
)
def test_losses_get_the_means_that_are_asked_for(losses, means):
    found = at_means(np.array(losses), np.array(means), 1.0)
    assert found.mean(axis=0) == pytest.approx(means, abs=1e-9) and found.max() <= 1
    order = np.argsort(losses, kind="stable")
    assert (np.diff(found[order], axis=0) >= 0).all(), "units changed places"


def test_power_is_the_largest_mean_that_is_certified():
    """Losses that are all alike leave nothing to chance: one level separates what is certified."""
    for n, multiple in ((30, 4.0), (30, 2.0), (120, 4.0)):
        found = power(np.zeros(5), LEVEL, multiple * LEVEL, DELTA, n, trials=2)
        means = np.linspace(0, 0.999, 1000)
        passes = [
            betting_p_value(np.full(n, mean * LEVEL), LEVEL, multiple * LEVEL) <= DELTA
            for mean in means
        ]
        assert found == pytest.approx(means[passes].max(), abs=0.051)  # read at every tenth


def test_drawn_p_values_are_those_of_the_units_drawn():
    pool = np.random.default_rng(0).uniform(-0.1, 0.1, (40, 3))
    found = drawn_p_values(pool, LEVEL, 0.2, n=7, trials=5, group=3, seed=4)
    draws = np.random.default_rng(4).integers(0, 40, (5, 3))
    for p, (a, b, c) in zip(found, draws, strict=True):
        units = pool[[a, a, a, b, b, b, c]]
        assert p == pytest.approx(betting_p_value(units.T, LEVEL, 0.2))


@pytest.mark.parametrize("n", [30, 120])
def test_the_lowest_ceiling_that_hides_little_is_the_most_powerful(n):
    even, skewed = (
        np.random.default_rng(0).gamma(k, LEVEL / k, 400)[:, None] for k in (400.0, 1.0)
    )
    chosen = {}
    for name, losses in (("even", even), ("skewed", skewed)):
        table = ceilings(losses, EPSILON, DELTA, n)
        assert table["ceiling"].tolist() == list(CEILINGS) and table["chosen"].sum() == 1
        assert (table["hidden"].diff()[1:] <= 1e-12).all() and (table["n"] == n).all()
        row = table[table["chosen"]].iloc[0]
        assert row["hidden"] <= HIDDEN
        assert row["power"] == table[table["hidden"] <= HIDDEN]["power"].max()
        chosen[name] = chosen_ceiling(table)
    assert chosen["even"] < chosen["skewed"]


def test_where_every_ceiling_hides_the_highest_is_taken():
    losses = np.zeros((100, 1))
    losses[0] = 100 * LEVEL  # one document in a hundred loses everything
    assert chosen_ceiling(ceilings(losses, EPSILON, DELTA, 30)) == CEILINGS[-1]


def test_the_candidate_nearest_to_the_level_is_taken():
    losses = np.array([[0.01, 0.04, 0.2], [0.01, 0.06, 0.2]])
    assert nearest_to_level(losses, LEVEL).tolist() == [0.04, 0.06]


# ---------------------------------------------------------------------------- units of a trace


def traced(lengths) -> ExitTrace:
    tokens, rng = sum(lengths), np.random.default_rng(0)
    nll = rng.exponential(3, (tokens, 2))
    document = np.repeat(np.arange(len(lengths)) * 2 + 5, lengths)
    zeros = np.zeros(tokens, int)
    return ExitTrace("fit", document, zeros, zeros, nll, nll, zeros[:, None].repeat(2, 1), {}, 4)


def test_pieces_of_a_trace_stand_for_documents_cut_alike():
    trace, first = traced([10, 3, 4, 25]), ExitPolicy.static(0, 2)
    gap = trace.nll[:, 0] - trace.nll[:, 1]
    whole = np.split(gap, np.cumsum([10, 3, 4]))
    policies = [first, ExitPolicy.static(2, 2)]
    found = traced_losses(trace, policies, 0)
    np.testing.assert_allclose(found[:, 0], [part.mean() for part in whole])
    assert not found[:, 1].any(), "full depth has no gap to itself"
    pieces = [gap[:8], gap[10:13], gap[13:17], gap[17:25], gap[25:33], gap[33:41]]  # rests of 2, 1
    np.testing.assert_allclose(
        traced_losses(trace, policies, 8)[:, 0], [part.mean() for part in pieces]
    )
    one = replace(trace, document=np.zeros(42, int))
    assert len(traced_losses(one, policies, 4)) == 11, "a rest of half a piece is used"


# ---------------------------------------------------------------------------- audit


def rows(losses, n, **given):
    table = audit(losses, EPSILON, DELTA, n, 1000, **{"ceiling": 3.0, "seed": n} | given)
    return (table.set_index("procedure").loc[p] for p in PROCEDURES)


@pytest.mark.parametrize("n", [30, 48, 120, 500])
def test_audit_passes_the_certificate_and_catches_the_control(n):
    """Also with few units: one candidate loses just what is allowed, one far less."""
    good, bad = rows(synthetic_units(20_000, EPSILON), n)
    assert good["low"] <= DELTA, "the certificate breaks its word"
    assert good["violations"] > 0, "nothing is at the boundary"
    assert bad["low"] > 0.8, "the known-bad control goes unnoticed"
    assert 0.6 < good["power"] < 1 and math.isnan(bad["power"])


def test_units_that_are_alike_break_the_guarantee():
    """What a certificate assumes: with six documents each of which is the same, it fails its δ."""
    good, _ = rows(synthetic_units(20_000, EPSILON), 30, ceiling=4.0, group=6)
    assert good["low"] > DELTA and good["group"] == 6 and math.isnan(good["power"])


def test_a_test_that_is_too_sure_is_caught(monkeypatch):
    """Another known-bad control: p-values that are halved break δ at the boundary."""
    from earlyexit.calibration import power as module

    monkeypatch.setattr(module, "betting_p_value", lambda *a: betting_p_value(*a) / 4)
    good, _ = rows(synthetic_units(20_000, EPSILON), 120)
    assert good["low"] > DELTA


def test_power_grows_with_the_units():
    units = synthetic_units(2_000, EPSILON)
    found = [power(units, LEVEL, 3 * LEVEL, DELTA, n) for n in (15, 60, 240)]
    assert found == sorted(found) and found[-1] - found[0] > 0.2
