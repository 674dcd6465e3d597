"""Tables of a trace say what the trace says, and name each setting in a column of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from earlyexit.calibration.trace import best_within
from earlyexit.evaluation import curves
from earlyexit.evaluation.compare import stack
from earlyexit.evaluation.rivals import coin_shares
from earlyexit.exits.policy import ExitPolicy

EPSILON = 0.3


def test_exits_side_by_side(subject):
    table = curves.exit_quality(subject.test)
    assert table["exit"].tolist() == [0, 1, 2] and "criterion" not in table
    np.testing.assert_allclose(table["kl"], subject.test.kl.mean(axis=0))
    np.testing.assert_allclose(table["perplexity"], subject.test.static()["perplexity"])


def test_a_threshold_column_holds_thresholds_only(subject):
    table = curves.signal_curves(subject.test)
    settings = table.groupby("criterion", sort=False)[["threshold", "exit_layer", "price"]].count()
    assert list(settings.index[-3:]) == ["static", "oracle (kl)", "oracle (nll)"]
    assert settings.loc["static"].tolist() == [0, 3, 0]
    assert settings.loc["oracle (kl)"].tolist() == [0, 0, 60]
    swept = settings.loc[subject.test.criteria]
    assert (swept["threshold"] > 0).all() and not swept[["exit_layer", "price"]].any(axis=None)
    assert not np.isinf(table.select_dtypes("number")).any(axis=None)
    some = table[table["criterion"] == "gate"].dropna(subset="threshold").iloc[7]
    policy = ExitPolicy("gate", (some["threshold"],) * 2 + (0.0,))
    assert subject.test.evaluate(policy)["perplexity"] == pytest.approx(some["perplexity"])


def test_hindsight_is_the_best_within_epsilon_mean_over_seeds(subject):
    table = stack({s: curves.signal_curves(subject.test) for s in (0, 1)}, "seed")
    best = curves.best_in_hindsight(table, EPSILON)
    static = subject.test.static()
    within = static[static["quality_loss"] <= EPSILON]["speedup_layers"].max()
    assert best["static"] == pytest.approx(within)
    # Hindsight about the target is as good at each of its prices as any policy can be.
    assert best["oracle (nll)"] >= best["static"] - 1e-9


def test_calibrated_scores_judge_the_same_predictions(subject):
    before = subject.test
    after = replace(before, scores={k: 0.5 * v for k, v in before.scores.items()})
    table = curves.calibrated_curves(before, after)
    assert list(dict.fromkeys(table["criterion"]))[:2] == [
        "maximum probability, before", "maximum probability, after"
    ]  # fmt: skip
    for name in ("max_probability", "entropy"):
        rows = table[table["signal"] == name].groupby("calibration")
        first, second = (rows.get_group(when) for when in ("before", "after"))
        # Halved scores exit as before at halved thresholds.
        np.testing.assert_allclose(first["perplexity"], second["perplexity"], rtol=1e-6)
    static = table[table["signal"] == "static"]
    assert static["exit_layer"].tolist() == [0, 1, 2] and static["threshold"].isna().all()


def test_layer_equivalents_add_up_to_the_layers_executed(subject):
    table = curves.exit_distribution(subject.test, [0.2, 0.6])
    assert table["exit_layer"].tolist() == [0, 1, 2, 3] * 2
    assert table["layers_executed"].tolist() == [1, 2, 3, 3] * 2
    for threshold, rows in table.groupby("threshold"):
        found = subject.test.evaluate(ExitPolicy.constant(threshold, 3))
        exits = subject.test.exit_layers(ExitPolicy.constant(threshold, 3))
        assert rows["share"].sum() == pytest.approx(1)
        assert rows["layer_equivalents"].sum() == pytest.approx(found["layers"])
        assert rows["speedup_layers"].iloc[0] == pytest.approx(found["speedup_layers"])
        assert rows["average"].iloc[0] == pytest.approx(exits.mean())


def test_fitted_policies_stand_between_static_exit_and_oracle(subject):
    policies = curves.fit_all(subject.fit, ["max_probability", "gate"], [1e-12, EPSILON])
    kinds = [kind for name, epsilon, kind in policies if (name, epsilon) == ("gate", EPSILON)]
    assert kinds == ["global", "per_layer"]  # a gate's threshold does not decay
    assert ("max_probability", EPSILON, "decaying") in policies
    table = curves.policy_table(subject.fit, subject.test, policies)
    static, oracle = subject.fit.static(), subject.test.oracle("kl")
    for row in table.to_dict("records"):
        policy = policies[row["criterion"], row["epsilon"], row["thresholds"]]
        found = subject.test.evaluate(policy)
        assert row["speedup_layers"] == found["speedup_layers"]
        assert row["fit_speedup_layers"] == subject.fit.evaluate(policy)["speedup_layers"]
        within = static[static["quality_loss"] <= row["epsilon"]]
        layer = int(within.loc[within["speedup_layers"].idxmax(), "exit_layer"])
        assert row["static_speedup"] == pytest.approx(3 / (layer + 1))
        assert row["oracle_speedup"] == pytest.approx(best_within(oracle, row["epsilon"]))
        coin = coin_shares(static, subject.fit.full_nll + np.log1p(row["epsilon"]))
        assert row["coin_speedup"] == pytest.approx(3 / (coin @ [1, 2, 3]))
        gap = (row["speedup_layers"] - row["coin_speedup"]) / (
            row["oracle_speedup"] - row["coin_speedup"]
        )
        assert row["gap_closed"] == pytest.approx(gap, nan_ok=True)
