"""Fitting: the epsilon is kept, brute force does no better, and the test split stays unseen."""

from itertools import product

import numpy as np
import pytest

from earlyexit.calibration.thresholds import Unreachable, fit_policy, fit_policy_to_cost, mean_cost
from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost.parts import exit_costs, policy_flops
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy

KINDS = ("global", "per_layer", "decaying")


def made_up_trace(split="fit", tokens=400, layers=4, seed=0) -> ExitTrace:
    """Deeper exits are better; the gate sees noisily how much each token would still gain."""
    rng = np.random.default_rng(seed)
    gain = rng.exponential(0.15, (tokens, layers - 1)) * (rng.random((tokens, layers - 1)) < 0.5)
    kl = np.concatenate([gain[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((tokens, 1))], axis=1)
    nll = (rng.exponential(3, (tokens, 1)) + kl).astype(np.float32)
    seen = (kl * np.exp(rng.normal(0, 0.3, kl.shape)) + 1e-3).astype(np.float32)
    return ExitTrace(
        split, np.arange(tokens) // 20, np.arange(tokens) % 20, np.zeros(tokens, int), nll, kl,
        np.zeros((tokens, layers), int), {"gate": seen, "agreement": np.exp(-seen)}, 20,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.2])
def test_keeps_to_the_epsilon_and_saves(kind, epsilon):
    trace = made_up_trace()
    policy = fit_policy(trace, "agreement", epsilon, kind)
    read = trace.evaluate(policy)
    assert read["quality_loss"] <= epsilon and read["layers"] < trace.n_layers


def test_per_layer_is_never_dearer_than_global():
    trace, costs = made_up_trace(), np.array([1.0, 2.5, 3.0, 6.0])
    for epsilon in (0.01, 0.05, 0.1):
        one, each = (fit_policy(trace, "gate", epsilon, k, costs) for k in KINDS[:2])
        assert mean_cost(trace, each, costs) <= mean_cost(trace, one, costs) + 1e-12


def test_comes_close_to_brute_force():
    trace = made_up_trace(tokens=120, layers=3)
    scores = trace.scores["gate"]
    grid = [np.append(np.quantile(scores[:, i], np.linspace(0, 1, 40)), -np.inf) for i in (0, 1)]
    best = min(
        read["layers"]
        for pair in product(*grid)
        if (read := trace.evaluate(ExitPolicy("gate", (*pair, -np.inf))))["quality_loss"] <= 0.05
    )
    assert trace.evaluate(fit_policy(trace, "gate", 0.05))["layers"] <= best + 0.03


def test_a_given_cost_is_kept_and_spent_well():
    trace, costs = made_up_trace(), np.array([1.0, 2.5, 3.0, 6.0])
    losses = []
    for cost in (1.0, 2.0, 4.0, 6.0):
        policy = fit_policy_to_cost(trace, "gate", cost, costs)
        assert mean_cost(trace, policy, costs) <= cost
        losses.append(trace.evaluate(policy)["quality_loss"])
    assert losses == sorted(losses, reverse=True) and losses[0] > 0.05 and losses[-1] <= 1e-9
    static = trace.static().set_index("exit_layer")["quality_loss"]
    assert losses[0] == pytest.approx(static[0])  # one unit buys exit 0 and nothing else
    with pytest.raises(Unreachable, match="exit 0 costs 1"):
        fit_policy_to_cost(trace, "gate", 0.9, costs)
    with pytest.raises(ValueError, match="test split"):
        fit_policy_to_cost(made_up_trace("test"), "gate", 2.0, costs)


def test_refusals():
    trace = made_up_trace()
    with pytest.raises(ValueError, match="test split"):
        fit_policy(made_up_trace("test"))
    for epsilon in (0.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="epsilon"):
            fit_policy(trace, "gate", epsilon)
    with pytest.raises(ValueError, match="costs"):
        fit_policy(trace, "gate", 0.05, costs=[1.0, 2.0])
    with pytest.raises(ValueError, match="decay"):
        fit_policy(trace, "gate", 0.05, "decaying")
    trace.nll[:, :-1] += 5  # early exits so bad that none can be used
    with pytest.raises(Unreachable, match="smallest loss"):
        fit_policy(trace, "gate", 1e-9)


def test_exit_costs_are_those_of_the_cost_table(make_model):
    model = make_model()
    for name in CRITERIA:
        costs = exit_costs(model, name)
        full = policy_flops(model, [0] * model.n_layers + [1], name)
        assert costs[-1] == full["total"] and (np.diff(costs) > 0).all(), name
