"""A run stops when its last token has left, so a fit may decide how deep the deepest token goes.

A few stragglers cost much: for them every token that has left is propagated through all deeper layers.
These fits therefore try every exit as the deepest, where all who are left leave, and keep the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from earlyexit.calibration.exit_costs import ExitCosts
from earlyexit.calibration.thresholds import (
    ROUNDING,
    Unreachable,
    fit_policy,
    fit_policy_to_cost,
)
from earlyexit.calibration.trace import ExitTrace
from earlyexit.exits.policy import ExitPolicy, known_criterion

FARTHEST = float(np.finfo(np.float32).max)  # stands for a bound that is infinite: JSON has no word
Fit = Callable[[ExitTrace, ExitCosts], ExitPolicy]  # of a trace that ends at the deepest exit


def fit_stopping_policy(
    trace: ExitTrace, criterion: str, epsilon: float, costs: Sequence[ExitCosts]
) -> ExitPolicy:
    """Return the cheapest policy whose quality loss on the trace is at most ``epsilon``.

    It is cheaper than full depth. An exit is tried as the deepest if all tokens might leave there
    within ε.

    Args:
        trace: a trace of the fit part, never of the test split.
        epsilon: tolerated quality loss ε > 0 (perplexity over full depth − 1).
        costs: for each exit, what leaving there or before costs if no token goes deeper; see
            :func:`earlyexit.cost.parts.stopping_costs`.

    Raises:
        ValueError, Unreachable: see :func:`earlyexit.calibration.thresholds.fit_policy`.
    """

    def fit(cut: ExitTrace, prices: ExitCosts) -> ExitPolicy:
        if cut is trace:
            return fit_policy(trace, criterion, epsilon, costs=prices)
        room = np.expm1(trace.full_nll + np.log1p(epsilon) - cut.full_nll)
        if room <= ROUNDING:
            raise Unreachable(f"exit {cut.n_layers - 1} itself loses more than {epsilon:.2%}")
        with suppress(Unreachable):
            return fit_policy(cut, criterion, float(room) - ROUNDING, costs=prices)
        return ExitPolicy.constant(known_criterion(criterion).never, cut.n_layers, criterion)

    found, whole = _each_deepest(trace, criterion, costs, fit), costs[-1].leaving[-1]
    # Full depth checks nothing: it may be the cheapest.
    kept = {p: spent for p, (_, spent) in found.items() if spent < whole}
    kept = {p: spent for p, spent in kept.items() if _loss(trace, p) <= epsilon}
    if not kept:
        return fit_policy(trace, criterion, epsilon, costs=costs[-1])  # says why there is none
    return min(kept, key=kept.__getitem__)


def fit_stopping_policy_to_cost(
    trace: ExitTrace, criterion: str, cost: float, costs: Sequence[ExitCosts]
) -> ExitPolicy:
    """Return the policy of least loss on the trace whose mean cost is at most ``cost``.

    Args:
        trace: a trace of the fit part, never of the test split.
        cost: cost per token, in the unit of ``costs``; see :func:`fit_stopping_policy`.

    Raises:
        ValueError, Unreachable: see :func:`earlyexit.calibration.thresholds.fit_policy_to_cost`.
    """

    def fit(cut: ExitTrace, prices: ExitCosts) -> ExitPolicy:
        if cut.n_layers > 1:
            return fit_policy_to_cost(cut, criterion, cost, prices)
        if prices.leaving[0] > cost:
            raise Unreachable(f"exit 0 costs {prices.leaving[0]:.4g}")
        return ExitPolicy.constant(known_criterion(criterion).never, 1, criterion)

    found = _each_deepest(trace, criterion, costs, fit)
    kept = {p: nll for p, (nll, spent) in found.items() if spent <= cost * (1 + ROUNDING)}
    if not kept:
        return fit_policy_to_cost(trace, criterion, cost, costs[-1])  # says why there is none
    return min(kept, key=kept.__getitem__)


def _each_deepest(
    trace: ExitTrace, criterion: str, costs: Sequence[ExitCosts], fit: Fit
) -> dict[ExitPolicy, tuple[float, float]]:
    """Fit a policy for each deepest exit: policy → its mean NLL and its mean cost on the trace."""
    found = {}
    for deepest, prices in enumerate(costs):
        cut = _until(trace, deepest)
        with suppress(Unreachable):
            policy = _stopping(fit(cut, prices), trace)
            exits = np.minimum(trace.exit_layers(policy), trace.n_layers - 1)
            if exits.max() > deepest:  # a token without a score there cannot leave there
                continue
            paid = prices.paid(policy)[exits] if len(exits) else np.zeros(0)
            nll = trace.nll[np.arange(trace.n_tokens), exits]
            found[policy] = float(nll.mean(dtype=np.float64)), float(paid.mean())
    return found


def _until(trace: ExitTrace, deepest: int) -> ExitTrace:
    """Return what a trace says of a model that ends with this exit."""
    if deepest == trace.n_layers - 1:
        return trace
    cut = {name: getattr(trace, name)[:, : deepest + 1] for name in ("nll", "kl", "prediction")}
    scores = {name: score[:, : deepest + 1] for name, score in trace.scores.items()}
    return replace(trace, **cut, scores=scores)


def _stopping(policy: ExitPolicy, trace: ExitTrace) -> ExitPolicy:
    """Return a policy of a trace's first exits for all of them: whoever is left leaves at the last."""
    beyond = trace.n_layers - len(policy.thresholds)
    if not beyond:
        return policy
    rule = policy.rule
    bound = rule.bounds[0] if rule.exit_above else rule.bounds[1]
    everyone = float(np.clip(bound, -FARTHEST, FARTHEST))
    thresholds = (*policy.thresholds[:-1], everyone, *[rule.never] * beyond)
    return replace(policy, thresholds=thresholds, model_hash=trace.model_hash)


def _loss(trace: ExitTrace, policy: ExitPolicy) -> float:
    return trace.evaluate(policy)["quality_loss"]
