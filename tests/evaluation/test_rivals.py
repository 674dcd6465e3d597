"""Smaller models answer for every cost between theirs, and random exits know nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from earlyexit.calibration.trace import by_document
from earlyexit.cost.parts import exit_costs
from earlyexit.evaluation.compare import Candidate, fitted_policy
from earlyexit.evaluation.depth import ALONE, losses_by_document
from earlyexit.evaluation.rivals import (
    coin_shares,
    coins,
    cost_of_quality,
    equal_cost,
    exit_gaps,
    over_alone,
    perplexities,
    random_exits,
    rival_table,
    shares_at,
    told,
    trained_alone,
)
from earlyexit.exits.policy import ExitPolicy

EPSILON = 0.3
COSTS, LOSSES = np.array([1.0, 2.0, 4.0]), np.array([5.0, 4.0, 3.0])


@pytest.fixture(scope="module")
def alone(make_model, corpus):
    """Models of one and two layers, and their losses on the test split."""
    models = {depth: make_model(seed=1, n_layers=depth, gate_hidden=None) for depth in (1, 2)}
    split = corpus.splits["test"]
    losses = {
        d: losses_by_document(model, split, corpus.eos_id).assign(system=ALONE, layers=d, seed=7)
        for d, model in models.items()
    }
    return models, trained_alone(pd.concat(losses.values()), seed=7)


@pytest.mark.parametrize("cost", [1.0, 1.25, 2.0, 3.5, 4.0])
def test_neighbours_mix_to_the_cost_that_is_asked_for(cost):
    shares = shares_at(COSTS, cost)
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all()
    assert shares @ COSTS == pytest.approx(cost)
    assert (shares > 0).sum() <= 2
    assert cost_of_quality(COSTS, LOSSES, shares @ LOSSES) == pytest.approx(cost)


def test_beyond_the_ladder_its_ends_answer():
    assert shares_at(COSTS, 0.5).tolist() == [1, 0, 0]
    assert shares_at(COSTS, 9.0).tolist() == [0, 0, 1]
    assert cost_of_quality(COSTS, LOSSES, 6.0) == 1
    assert math.isnan(cost_of_quality(COSTS, LOSSES, 2.9))


def test_a_deeper_model_that_is_worse_is_not_used():
    assert cost_of_quality(COSTS, np.array([5.0, 3.0, 4.0]), 3.0) == 2


def test_gaps_of_exits_are_paired_by_document(subject, alone):
    gaps = exit_gaps(subject.test, alone[1])
    assert gaps["exit"].tolist() == [0, 1]
    for row in gaps.itertuples():
        nll = alone[1][row.exit + 1]
        own = by_document(subject.test.nll[:, row.exit], subject.test.document)
        assert row.difference == pytest.approx(np.expm1((own - nll["nll"]).mean()))
        assert row.alone_perplexity == perplexities(alone[1])[row.exit + 1]
    assert (gaps["low"] <= gaps["difference"]).all() and (gaps["difference"] <= gaps["high"]).all()


def test_gates_are_fitted_to_the_cost_of_the_smaller_model(subject, alone):
    models, losses = alone
    costs = {depth: exit_costs(model, "depth")[-1] for depth, model in models.items()}
    rows = equal_cost(subject.model, subject.fit, subject.test, losses, costs).set_index("depth")
    assert exit_costs(subject.model, "gate")[0] < costs[2]  # so that some exit is affordable
    assert rows.loc[2, "adaptive_cost"] < 1.1 and 1 <= rows.loc[2, "adaptive_layers"] <= 3
    assert (rows["low"] <= rows["difference"]).all() and (rows["difference"] <= rows["high"]).all()
    assert rows["alone_perplexity"].to_dict() == perplexities(losses)


def test_where_no_exit_is_as_cheap_the_first_stands_in(subject, alone):
    row = equal_cost(subject.model, subject.fit, subject.test, {1: alone[1][1]}, {1: 1.0}).iloc[0]
    assert row["adaptive_layers"] == 1 and row["adaptive_cost"] > 1
    first = subject.test.static()["perplexity"].iloc[0]
    assert row["adaptive_perplexity"] == pytest.approx(first)


def test_random_exits_lose_what_random_tokens_lose(subject):
    """Truth: the scores are dealt out to other tokens, again and again."""
    trace, policy = subject.test, fitted_policy(subject.model, subject.fit, "gate", EPSILON)
    candidates = [Candidate("gate", "epsilon", EPSILON, policy), Candidate(
        "static", "exit_layer", 0, ExitPolicy.static(0, 3))]  # fmt: skip
    row = random_exits(trace, candidates, "gate").iloc[0]
    exits, rng = trace.exit_layers(policy), np.random.default_rng(0)
    dealt = [trace.read_out(rng.permutation(exits)) for _ in range(200)]
    assert row["speedup_layers"] == pytest.approx(dealt[0]["speedup_layers"])
    nll = np.log([d["perplexity"] for d in dealt])
    assert np.log(row["perplexity"]) == pytest.approx(nll.mean(), abs=4 * nll.std() / 200**0.5)


def test_rivals_of_a_policy_cost_as_much_or_are_as_good(subject, alone):
    front = pd.DataFrame(
        {
            "criterion": ["gate", ALONE, ALONE],
            "epsilon": [0.05, np.nan, np.nan],
            "depth": [np.nan, 1, 2],
            "perplexity": [100.0, 121.0, 81.0],
            "speedup_time": [4 / 3, 2.0, 1.0],
        }
    )
    first = Candidate("gate", "epsilon", 0.05, ExitPolicy.static(0, 3))
    about = {"time": "speedup_time"}, alone[1], subject.test, [first]
    row = rival_table(front, *about).iloc[0]
    assert row["rival_perplexity"] == pytest.approx((121 * 81) ** 0.5)  # costs 0.5 and 1: 0.75
    assert row["difference"] == pytest.approx(100 / 99 - 1)
    front["seed"] = 7
    (same,) = over_alone(front, "gate", "speedup_time").to_dict("records")
    assert same == pytest.approx({"seed": 7, "epsilon": 0.05, "difference": row["difference"]})
    share = np.log(121 / 100) / np.log(121 / 81)
    assert row["rival_speedup"] == pytest.approx(1 / (0.5 + 0.5 * share))
    own = by_document(subject.test.nll[:, 0], subject.test.document)
    gaps = own - (alone[1][1]["nll"].to_numpy() + alone[1][2]["nll"].to_numpy()) / 2
    half = (np.log1p(row["high"]) - np.log1p(row["low"])) / 2
    tokens = alone[1][1]["tokens"].to_numpy()
    rng, draws = np.random.default_rng(0), []
    for _ in range(4000):  # truth: documents drawn again
        drawn = rng.integers(0, len(gaps), len(gaps))
        draws.append(np.average(gaps[drawn], weights=tokens[drawn]))
    t = stats.t.ppf(0.975, len(gaps) - 1)
    assert half == pytest.approx(t * np.std(draws), rel=0.35)  # few documents, and n against n − 1


def test_a_coin_between_two_exits_loses_what_is_allowed(subject):
    static = subject.test.static()
    front = static.assign(
        twin_loss=static["quality_loss"] + 0.1, tokens=9, speedup_flops=static["speedup_layers"],
        **dict.fromkeys(["speedup_time", "speedup_time_low", "speedup_time_high"], 1.5),
    ).iloc[:-1]  # fmt: skip
    fit = replace(subject.test, split="fit")  # the coin is read where it was chosen
    best = static["quality_loss"].clip(upper=0).min()
    losses = [0.3 * static["quality_loss"].max(), 0.9 * static["quality_loss"].max()]
    for row in coins(front, fit, losses).itertuples():
        assert best <= row.quality_loss == pytest.approx(row.epsilon)
        shares = coin_shares(static, fit.full_nll + np.log1p(row.epsilon))
        assert shares.sum() == pytest.approx(1) and (shares > 0).sum() <= 2
        assert row.speedup_layers == pytest.approx(3 / (shares @ [1, 2, 3]))
        assert row.exited_early == pytest.approx(1 - shares[-1])
        whole = 1 / ((1 - shares[-1]) / 1.5 + shares[-1])  # full depth takes as long as itself
        assert row.speedup_time == pytest.approx(whole)


def test_what_is_told_of_rivals_has_both_intervals():
    row = {"cost": "time", "difference": 0.01, "low": -0.02, "high": 0.04, "speedup": 1.5}
    one = pd.DataFrame([row | {"rival_speedup": np.nan, "seed": 0}])
    said = told(one)
    assert "at equal time +1.0% in perplexity (-2.0% to +4.0% over documents)" in said
    assert said.endswith("1.50× beside none that is as good")
    three = pd.concat([one.assign(seed=k, rival_speedup=1.25) for k in range(3)])
    assert "+1.0% to +1.0% over seeds), at equal quality 1.50× beside 1.25×" in told(three)
