"""A policy is fitted on a trace of the fit part: to a tolerated quality loss ε, or to a cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from earlyexit.calibration.temperature import refuse_test
from earlyexit.calibration.trace import ExitTrace
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed

Thresholds = Literal["global", "per_layer", "decaying"]
SWEEPS = 4  # coordinate descent over the layers' thresholds settles within a few
DECAYS = (0.0, 1.0, 2.0, 4.0, 8.0)  # temperatures tried for decaying thresholds


class Unreachable(ValueError):
    """No policy of this criterion keeps to the limit; the message says what the best one does."""


def fit_policy(
    trace: ExitTrace,
    criterion: str = "gate",
    epsilon: float = 0.05,
    thresholds: Thresholds = "per_layer",
    costs: Sequence[float] | None = None,
) -> ExitPolicy:
    """Return the cheapest policy whose quality loss on the trace is at most ``epsilon``.

    Args:
        trace: a trace of the fit part, never of the test split.
        criterion: a key of ``CRITERIA``.
        epsilon: tolerated quality loss ε > 0 (perplexity over full depth − 1).
        thresholds: one ``"global"`` threshold, one ``"per_layer"`` (Lagrangian, coordinate descent),
            or one ``"decaying"`` with the position (CALM, eq. 5).
        costs: cost of leaving at exit 0 … L − 1, by default layers executed; see
            :func:`earlyexit.cost.parts.exit_costs`.

    Raises:
        ValueError: ε is not positive, the trace is of the test split, or costs have another length.
        Unreachable: only full depth keeps to ε.
    """
    refuse_test(trace.split)
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be > 0: it is the tolerated quality loss")
    costs = np.arange(1.0, trace.n_layers + 1) if costs is None else np.asarray(costs, dtype=float)
    if costs.shape != (trace.n_layers,):
        raise ValueError(f"{costs.size} costs for {trace.n_layers} exits")
    fit = {"global": _global, "per_layer": _per_layer, "decaying": _decaying}[thresholds]
    policy = fit(trace, criterion, epsilon, costs)
    if policy is None:
        cheapest = trace.sweep(criterion).query("layers < @trace.n_layers")["quality_loss"]
        least = f"{cheapest.min():.2%}" if len(cheapest) else "none"
        raise Unreachable(
            f"no policy of {criterion!r} leaves early within {epsilon:.2%} on the {trace.split} part;"
            f" the smallest loss of any that does is {least}: allow more, train the exits longer, or"
            " run full depth"
        )
    return policy


def fit_policy_to_cost(
    trace: ExitTrace, criterion: str, cost: float, costs: Sequence[float]
) -> ExitPolicy:
    """Return the policy of least loss on the trace whose mean cost is at most ``cost``.

    Its thresholds are per layer.

    Args:
        trace: a trace of the fit part, never of the test split.
        cost: cost per token, in the unit of ``costs``; see :func:`fit_policy`.

    Raises:
        ValueError: the trace is of the test split.
        Unreachable: even leaving at exit 0 costs more.
    """
    refuse_test(trace.split)
    costs = np.asarray(costs, dtype=float)

    def affordable(policy: ExitPolicy) -> bool:
        return mean_cost(trace, policy, costs) <= cost

    path = _path(trace, criterion, costs, lambda policy: not affordable(policy))
    found = [p for p in path if affordable(p)]
    if not found:
        raise Unreachable(
            f"no policy of {criterion!r} costs {cost:.4g} or less: exit 0 costs {costs[0]:.4g}"
        )
    return min(found, key=lambda p: trace.evaluate(p)["quality_loss"])


def mean_cost(trace: ExitTrace, policy: ExitPolicy, costs: np.ndarray) -> float:
    """Return the mean cost per token of a policy on the trace."""
    return float(costs[layers_executed(trace.exit_layers(policy), trace.n_layers) - 1].mean())


def _global(trace, criterion, epsilon, costs, decay: float = 0.0) -> ExitPolicy | None:
    rule, layers = CRITERIA[criterion], trace.n_layers
    scores = trace.score(criterion)[:, : layers - 1]
    grid = np.unique(np.quantile(scores, np.linspace(0, 1, 100 if decay else 400)))
    best, cheapest = None, costs[-1]
    if not decay:  # the sweep answers all thresholds at once; only the extremes are run through
        sweep = trace.sweep(criterion, grid)
        grid = sweep[sweep["quality_loss"] <= epsilon]["threshold"].to_numpy()
        grid = np.concatenate([grid[:3], grid[-3:]]) if len(grid) > 6 else grid
    for threshold in grid:
        policy = ExitPolicy(
            criterion, (float(threshold),) * (layers - 1) + (rule.never,), decay=decay
        )
        cost = mean_cost(trace, policy, costs)
        if cost < cheapest and trace.evaluate(policy)["quality_loss"] <= epsilon:
            best, cheapest = policy, cost
    return best


def _decaying(trace, criterion, epsilon, costs) -> ExitPolicy | None:
    fitted = (_global(trace, criterion, epsilon, costs, decay) for decay in DECAYS)
    return _cheapest(trace, fitted, costs)


def _per_layer(trace, criterion, epsilon, costs) -> ExitPolicy | None:
    """Return the cheapest on the path of prices that keeps to ε, or a global threshold."""

    def within(policy: ExitPolicy) -> bool:
        return trace.evaluate(policy)["quality_loss"] <= epsilon

    found = [p for p in _path(trace, criterion, costs, within) if within(p)]
    best = _cheapest(trace, [*found, _global(trace, criterion, epsilon, costs)], costs)
    return best if best and mean_cost(trace, best, costs) < costs[-1] else None


def _cheapest(trace, policies: Iterable[ExitPolicy | None], costs) -> ExitPolicy | None:
    found = (policy for policy in policies if policy is not None)
    return min(found, key=lambda policy: mean_cost(trace, policy, costs), default=None)


def _path(trace, criterion, costs, cheaper: Callable[[ExitPolicy], bool]) -> Iterator[ExitPolicy]:
    """Bisect over the price λ of a nat, and yield the policy that is best at each price.

    After each policy ``cheaper`` says whether the next one may spend less.
    """
    low, high = np.log10(costs[-1]) - 2, np.log10(costs[-1]) + 4
    policy = None
    for _ in range(18):
        middle = (low + high) / 2
        policy = _at_price(trace, criterion, 10**middle, costs, policy)
        yield policy
        low, high = (low, middle) if cheaper(policy) else (middle, high)


def _at_price(trace, criterion, price, costs, start=None) -> ExitPolicy:
    """Minimise mean cost + price · NLL over the thresholds, one layer at a time.

    With the other thresholds fixed, each token that reaches exit l gains or loses a known amount by
    leaving there; the best threshold is where the sorted gains sum to their maximum.
    """
    rule, layers = CRITERIA[criterion], trace.n_layers
    sign = 1.0 if rule.exit_above else -1.0
    scores = trace.score(criterion)
    value = costs + price * trace.nll.astype(np.float64)  # (T, L): what leaving at each exit costs
    thresholds = list(start.thresholds) if start else [rule.never] * layers
    rows = np.arange(trace.n_tokens)
    for _ in range(SWEEPS):
        before = list(thresholds)
        for layer in range(layers - 1):
            passed = rule.passes(scores, np.asarray(thresholds, dtype=scores.dtype))
            passed[:, layer], passed[:, -1] = False, True
            reaches = ~passed[:, :layer].any(axis=1)
            gain = value[rows, passed.argmax(axis=1)] - value[:, layer]
            score, gain = scores[reaches, layer], gain[reaches]
            order = np.argsort(-sign * score, kind="stable")
            total = np.cumsum(gain[order])
            ranked = score[order]
            ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], len(ranked) > 0))
            top = ends[total[ends].argmax()] if len(ends) else 0  # equal scores leave together
            leave = len(ends) and total[top] > 0
            thresholds[layer] = float(ranked[top]) if leave else rule.never
        if thresholds == before:
            break
    return ExitPolicy(criterion, tuple(thresholds))
