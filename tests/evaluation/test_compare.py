"""A row of the comparison holds what the evaluator, the cost account and the trace say themselves."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from earlyexit.calibration.bounds import seed_interval
from earlyexit.calibration.thresholds import Unreachable, fit_policy
from earlyexit.cost.parts import exit_costs, policy_costs, policy_flops
from earlyexit.evaluation import compare as tables
from earlyexit.evaluation.compare import COLUMNS, SETTINGS, Candidate, compare
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy

EPSILON = 0.3


def test_a_row_is_a_real_run_with_three_speedups(subject, make_policy):
    model, batches = subject.model, subject.batches
    gate = make_policy(model, subject.batch[0], "gate")
    candidates = [
        *tables.original_thresholds([0.4], 3),
        *tables.static_exits(3),
        Candidate("gate", "epsilon", EPSILON, gate),
    ]
    alone = {1: 50.0, 3: 40.0}  # perplexities
    part = batches[:2]  # other tokens for one criterion, against full depth on the same
    loaders = dict.fromkeys(CRITERIA, batches) | {"max_probability": part}
    table = compare(model, candidates, loaders, subject.batch, 2, alone)
    assert tuple(table.columns) == COLUMNS
    assert list(table["criterion"]) == [
        "original's threshold", "static", "static", "gate", *["trained alone"] * 2
    ]  # fmt: skip
    evaluator = EarlyExitEvaluator(model, "cpu")
    policies = [c.policy for c in candidates]
    for row, policy in zip(table.to_dict("records"), policies, strict=False):
        read = loaders[policy.criterion]
        real, full = (evaluator.evaluate_policy(read, p) for p in (policy, None))
        shares = np.array(real["exit_distribution"]) / 100
        flops = policy_flops(model, shares, policy)["speedup_flops"]
        assert row["perplexity"] == pytest.approx(real["perplexity"])
        assert row["quality_loss"] == pytest.approx(real["perplexity"] / full["perplexity"] - 1)
        assert row["tokens"] == real["total_tokens"]
        assert row["speedup_layers"] == pytest.approx(real["speedup_estimate"])
        assert row["speedup_flops"] == pytest.approx(flops)
        assert row["exited_early"] == pytest.approx(shares[:2].sum())
    small, twin = table.iloc[-2], table.iloc[-1]
    assert small["perplexity"] == 50 and small["speedup_layers"] == 3
    assert small["quality_loss"] == pytest.approx(50 / math.exp(subject.test.full_nll) - 1)
    assert small["speedup_flops"] > 1 and twin["speedup_flops"] == 1
    assert table["twin_loss"].isna().tolist() == [True, *[False] * 5]  # the first is about a part
    assert table["twin_loss"].tolist()[1:] == pytest.approx((table["perplexity"] / 40 - 1)[1:])
    assert (table["speedup_time_low"] <= table["speedup_time_high"]).all()
    assert (table["speedup_time"] > 0).all()


def test_each_row_has_one_setting_in_the_column_of_its_kind(subject):
    model = subject.model
    candidates = [
        *tables.original_thresholds([0.7], 3),
        *tables.static_exits(3),
        *tables.fitted(model, subject.fit, ["gate"], [EPSILON]),
    ]
    table = pd.DataFrame([c.key for c in candidates])
    assert (table[list(SETTINGS[:3])].notna().sum(axis=1) == 1).all()
    assert table["threshold"].dropna().tolist() == [0.7]
    assert table["exit_layer"].dropna().tolist() == [0, 1]
    assert table["epsilon"].dropna().tolist() == [EPSILON]


def test_full_depth_against_itself_saves_nothing(subject, make_policy):
    policy = make_policy(subject.model, subject.batch[0], "gate")
    full, real = tables.run_rows(subject.model, [None, policy], subject.batches).to_dict("records")
    assert full["quality_loss"] == full["exited_early"] == 0
    assert full["speedup_layers"] == full["speedup_flops"] == 1
    assert real["quality_loss"] == pytest.approx(real["perplexity"] / full["perplexity"] - 1)
    assert math.isnan(tables.run_row(subject.model, None, subject.batches)["quality_loss"])


def test_policies_are_fitted_to_flops_and_left_out_where_unreachable(subject):
    model, trace = subject.model, subject.fit
    costs = policy_costs(model, "gate")
    assert tables.fitted_policy(model, trace, "gate", EPSILON) == fit_policy(
        trace, "gate", EPSILON, costs=costs
    )
    with pytest.raises(Unreachable):
        tables.fitted_policy(model, trace, "entropy", 1e-9)
    assert tables.fitted(model, trace, ["entropy"], [1e-9]) == []
    (kept,) = tables.fitted(model, trace, ["entropy"], [1e-9], tables.policy_within)
    assert (trace.exit_layers(kept.policy) == model.n_layers).all()  # nobody leaves early
    found = tables.fitted(model, trace, ["gate"], [EPSILON], tables.policy_within)
    assert found == tables.fitted(model, trace, ["gate"], [EPSILON], tables.stopping_policy)
    found = tables.fitted(model, trace, ["agreement", "gate"], [EPSILON, 2 * EPSILON])
    assert [(c.criterion, c.setting, c.value) for c in found] == [
        (name, "epsilon", epsilon)
        for name in ("agreement", "gate")
        for epsilon in (EPSILON, 2 * EPSILON)
    ]
    assert found[2].policy == tables.fitted_policy(model, trace, "gate", EPSILON)


def test_the_oracle_keeps_to_its_epsilon_and_leaves_no_policy_behind_it(subject):
    table = tables.oracle(subject.model, subject.test, [0.02, EPSILON])
    assert tuple(table.columns) == COLUMNS
    assert (table["quality_loss"] <= table["epsilon"]).all()
    assert table["speedup_layers"].is_monotonic_increasing
    assert table["speedup_time"].isna().all() and (table["tokens"] == subject.test.n_tokens).all()
    whole = exit_costs(subject.model, "depth")
    row = table.iloc[-1]
    assert 1 <= row["speedup_flops"] <= whole[-1] / whole[0]


def test_a_real_run_stands_beside_what_the_trace_says(subject, make_policy):
    model, x = subject.model, subject.batch[0]
    policies = {name: make_policy(model, x, name) for name in ("gate", "entropy")}
    table = tables.real_runs(
        model,
        policies,
        dict.fromkeys(policies, subject.test),
        dict.fromkeys(policies, subject.batches),
    ).set_index("criterion")
    for name, policy in policies.items():
        traced = subject.test.evaluate(policy)
        real = EarlyExitEvaluator(model, "cpu").evaluate_policy(subject.batches, policy)
        row = table.loc[name]
        assert row["trace_perplexity"] == pytest.approx(traced["perplexity"])
        assert row["real_perplexity"] == pytest.approx(real["perplexity"])
        assert row["trace_speedup_layers"] == pytest.approx(traced["speedup_layers"])
        assert row["real_speedup_layers"] == pytest.approx(real["speedup_estimate"])
        assert row["tokens"] == subject.test.n_tokens


def test_the_nearest_of_what_was_fitted():
    assert tables.nearest([0.01, 0.1], 0.05) == 0.01
    assert tables.nearest([0.01, 0.02, 0.05, 0.08], 0.05) == 0.05
    with pytest.raises(ValueError):
        tables.nearest([], 0.05)
    policies = [ExitPolicy.constant(t, 3, "gate") for t in (0.1, 0.2)]
    candidates = [
        Candidate("gate", "epsilon", epsilon, policy)
        for epsilon, policy in zip((0.01, 0.1), policies, strict=True)
    ]
    assert tables.nearest_policy(candidates, "gate", 0.09, 3) == policies[1]
    assert tables.nearest_policy(candidates, "entropy", 0.09, 3) == ExitPolicy.static(3, 3)


def test_tables_are_stacked_with_their_keys_first():
    one, two = pd.DataFrame({"x": [1, 2]}), pd.DataFrame({"x": [3], "y": [4.0]})
    found = tables.stack({(0, "a"): one, (1, "b"): two}, "seed", "name")
    assert list(found.columns) == ["seed", "name", "x", "y"]
    assert found["seed"].tolist() == [0, 0, 1] and found["name"].tolist() == ["a", "a", "b"]
    assert found.index.tolist() == [0, 1, 2] and found["y"].isna().sum() == 2
    assert tables.stack({0: one, 5: two}, "seed")["seed"].tolist() == [0, 0, 5]


def test_seeds_count_once_each():
    table = pd.DataFrame(
        {
            "seed": [0, 0, 1, 2, 0],
            "depth": [1, 1, 1, 1, 2],
            "x": [1.0, 3.0, 4.0, 3.0, 7.0],
            "y": [np.nan] * 5,
        }
    )
    found = tables.over_seeds(table, ["depth"], ["x", "y"]).set_index("depth")
    assert found["quantity"].tolist() == ["x", "x"], "y has no value"
    row = found.loc[1]
    assert (row["seeds"], row["least"], row["largest"]) == (3, 2.0, 4.0)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(seed_interval([2.0, 4.0, 3.0]))
    assert found.loc[2, "mean"] == 7 and np.isnan(found.loc[2, ["low", "high"]].astype(float)).all()
