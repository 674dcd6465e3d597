"""Compare models whose exits were trained differently with twins without exits and shallow models."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from earlyexit.calibration.bounds import paired_interval
from earlyexit.calibration.thresholds import Unreachable, fit_policy_to_cost
from earlyexit.calibration.trace import ExitTrace, by_document
from earlyexit.cost.parts import exit_costs, policy_costs, policy_flops
from earlyexit.evaluation.compare import fitted_policy, run_row
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy


def against_twin(
    model: EarlyExitModel,
    fit: ExitTrace,
    test: ExitTrace,
    twin: ExitTrace,
    loader: Iterable,
    epsilon: float,
) -> pd.DataFrame:
    """Compare every exit of a model with gates, and the gates' savings, with a twin without exits.

    Args:
        fit, test: traces of the model; the gate policy is fitted to ``epsilon`` on ``fit``.
        twin: trace of the twin over the tokens of ``test``.
        loader: batches of the same tokens, for the real run.

    Returns:
        One row per exit: exit, perplexity; and the same in all rows: last_vs_twin (document mean) with
        half of its 95 % interval and p_value, gate_speedup_layers, gate_loss_own (against the same
        model at full depth), gate_loss_twin, left_behind: the relative increase of perplexity that the
        states of exited tokens cause in a real run, and real_loss_twin, the loss of that run.
    """
    try:
        policy = fitted_policy(model, fit, "gate", epsilon)
    except Unreachable:
        policy = ExitPolicy.static(model.n_layers, model.n_layers)
    traced, twin_nll = test.evaluate(policy), twin.nll[:, -1]
    real = run_row(model, policy, loader)
    mean, half, p = paired_interval(by_document(test.nll[:, -1] - twin_nll, test.document))
    return pd.DataFrame(
        {
            "exit": range(test.n_layers),
            "perplexity": test.static()["perplexity"],
            "last_vs_twin": np.expm1(mean),
            "last_vs_twin_half_interval": half,
            "p_value": p,
            "gate_speedup_layers": traced["speedup_layers"],
            "gate_loss_own": traced["quality_loss"],
            "gate_loss_twin": traced["perplexity"] / np.exp(twin.full_nll) - 1,
            "left_behind": real["perplexity"] / traced["perplexity"] - 1,
            "real_loss_twin": real["perplexity"] / np.exp(twin.full_nll) - 1,
        }
    )


def twin_row(twin: ExitTrace) -> pd.DataFrame:
    """Tabulate the twin's last exit, the only one that was trained: columns exit, perplexity."""
    return pd.DataFrame({"exit": [twin.n_layers - 1], "perplexity": [np.exp(twin.full_nll)]})


def equal_cost(
    model: EarlyExitModel,
    fit: ExitTrace,
    test: ExitTrace,
    shallow: EarlyExitModel,
    shallow_test: ExitTrace,
) -> pd.DataFrame:
    """Compare gates fitted to the cost of a shallow model at full depth with that model.

    Args:
        fit, test: traces of the model with gates.
        shallow_test: trace of the shallow model over the tokens of ``test``.

    Returns:
        One row: adaptive_layers, adaptive_cost (over the shallow model's; above 1 if no exit is as
        cheap), adaptive_perplexity, shallow_perplexity, difference (document mean) with its 95 %
        interval low to high, and p_value.
    """
    cost, last = exit_costs(shallow, "depth")[-1], model.n_layers - 1
    try:
        policy = fit_policy_to_cost(fit, "gate", cost, policy_costs(model, "gate"))
    except Unreachable:  # the shallow model is cheaper than the cheapest exit, the first
        policy = ExitPolicy.static(0, model.n_layers)
    exits = test.exit_layers(policy)
    spent = policy_flops(model, test.exit_distribution(exits), policy)["total"]
    reached = np.minimum(exits, last)
    nll, shallow_nll = test.nll[np.arange(test.n_tokens), reached], shallow_test.nll[:, -1]
    mean, half, p = paired_interval(by_document(nll - shallow_nll, test.document))
    row = {
        "adaptive_layers": reached.mean() + 1,
        "adaptive_cost": spent / cost,
        "adaptive_perplexity": np.exp(nll.mean(dtype=float)),
        "shallow_perplexity": np.exp(shallow_test.full_nll),
        "difference": np.expm1(mean),
        "low": np.expm1(mean - half),
        "high": np.expm1(mean + half),
        "p_value": p,
    }
    return pd.DataFrame([row])
