"""A policy is fitted on a trace of the fit part: to a tolerated quality loss ε, or to a cost.

Both fits are the same search, with loss and cost changing places: one of them is least while the other
keeps to a limit. A threshold is an index into a layer's distinct scores, 0 where nobody may leave (and
nothing is checked), so a histogram of the tokens' ranks answers for thousands of policies at once.
Where the front of thresholds is not convex, a coin between two policies can still be a little better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Literal, get_args

import numpy as np

from earlyexit.calibration.exit_costs import ExitCosts
from earlyexit.calibration.temperature import refuse_test
from earlyexit.calibration.trace import ExitTrace
from earlyexit.checked import real
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy, known_criterion
from earlyexit.exits.statistics import layers_executed

Thresholds = Literal["global", "per_layer", "decaying"]
DECAYS = (0.0, 1.0, 2.0, 4.0, 8.0)  # temperatures tried for decaying thresholds
PRICES = (-2, 4)  # decades of the price of a nat, over the cost of full depth
BISECTIONS = 16  # of this price
SWEEPS = 8  # over the layers; most descents settle within three
SPREAD = {2: 48, 3: 7}  # levels tried over a layer's range where so many layers move together
FEW = 16  # scores of a layer up to which all levels are tried, however many layers move
MANY = 10  # layers above which one start and pairs must do: there are too many triples
ROUNDING = 1e-12  # relative; the sums of the search and of the read-outs may differ by it


class Unreachable(ValueError):
    """No policy of this criterion keeps to the limit; the message says what the best one does."""


def fit_policy(
    trace: ExitTrace,
    criterion: str = "gate",
    epsilon: float = 0.05,
    thresholds: Thresholds = "per_layer",
    costs: ExitCosts | Sequence[float] | None = None,
) -> ExitPolicy:
    """Return the cheapest policy whose quality loss on the trace is at most ``epsilon``.

    Args:
        trace: a trace of the fit part, never of the test split.
        criterion: a key of ``CRITERIA``.
        epsilon: tolerated quality loss ε > 0 (perplexity over full depth − 1).
        thresholds: one ``"global"`` threshold, one ``"per_layer"``, or one ``"decaying"`` with the
            position (CALM, eq. 5). Only thresholds per layer can skip a check.
        costs: cost of leaving at exit 0 … L − 1, by default layers executed; with prices of checks
            from :func:`earlyexit.cost.parts.policy_costs`.

    Raises:
        TypeError: ε or a cost is no number.
        ValueError: ε is not positive, the trace is of the test split or does not hold the criterion, or
            costs have another length.
        Unreachable: no policy within ε is cheaper than full depth without checks.
    """
    _check(trace, criterion, thresholds)
    epsilon = real("epsilon", epsilon, above=0)
    costs = _checked_costs(trace, np.arange(1.0, trace.n_layers + 1) if costs is None else costs)
    limit = trace.full_nll + np.log1p(epsilon)

    def merit(limit: float) -> Merit:
        return lambda nll, cost: np.where(nll <= limit, cost, np.inf)

    def keeps(policy: ExitPolicy) -> bool:
        return trace.evaluate(policy)["quality_loss"] <= epsilon

    policy = _best(trace, criterion, thresholds, costs, limit, merit, keeps)
    if policy is None or not mean_cost(trace, policy, costs) < costs.leaving[-1]:
        cheapest = trace.sweep(criterion).query("layers < @trace.n_layers")["quality_loss"]
        least = f"{cheapest.min():.2%}" if len(cheapest) else "none"
        raise Unreachable(
            f"no policy of {criterion!r} costs less than full depth within {epsilon:.2%} on the"
            f" {trace.split} part; the smallest loss of any that leaves early is {least}: allow more,"
            " train the exits longer, or run full depth"
        )
    return policy


def fit_policy_to_cost(
    trace: ExitTrace, criterion: str, cost: float, costs: ExitCosts | Sequence[float]
) -> ExitPolicy:
    """Return the policy of least loss on the trace whose mean cost is at most ``cost``.

    Its thresholds are per layer. Where all tokens leave at one exit, its check is still paid.

    Args:
        trace: a trace of the fit part, never of the test split.
        cost: cost per token, in the unit of ``costs``; see :func:`fit_policy`.

    Raises:
        ValueError: the trace is of the test split, or costs have another length.
        Unreachable: even leaving at the cheapest exit costs more.
    """
    _check(trace, criterion, "per_layer")
    costs, cost = _checked_costs(trace, costs), real("cost", cost)

    def merit(limit: float) -> Merit:
        return lambda nll, spent: np.where(spent <= limit, nll, np.inf)

    def keeps(policy: ExitPolicy) -> bool:
        return mean_cost(trace, policy, costs) <= cost

    if policy := _best(trace, criterion, "per_layer", costs, cost, merit, keeps):
        return policy
    least = costs.leaving[0] + costs.checks[0]
    raise Unreachable(f"no policy of {criterion!r} costs ≤ {cost:.4g}: exit 0 costs {least:.4g}")


def mean_cost(trace: ExitTrace, policy: ExitPolicy, costs: ExitCosts | Sequence[float]) -> float:
    """Return the mean cost per token of a policy on the trace."""
    executed = layers_executed(trace.exit_layers(policy), trace.n_layers)
    shares = np.bincount(executed - 1, minlength=trace.n_layers) / trace.n_tokens
    return float(shares @ ExitCosts.of(costs).paid(policy))  # exact where all leave at one exit


def _check(trace: ExitTrace, criterion: str, thresholds: str) -> None:
    """Raise ValueError unless a policy can be fitted so."""
    refuse_test(trace.split)
    known_criterion(criterion)
    if thresholds not in get_args(Thresholds):
        raise ValueError(f"{thresholds=}: must be {' or '.join(map(repr, get_args(Thresholds)))}")
    if thresholds == "decaying" and not known_criterion(criterion).may_decay:
        raise ValueError(
            f"thresholds of {criterion!r} cannot decay: choose 'global' or 'per_layer'"
        )
    if trace.n_layers < 2:
        raise Unreachable("a model of one layer has no exit before its last: nothing to fit")


def _checked_costs(trace: ExitTrace, costs: ExitCosts | Sequence[float]) -> ExitCosts:
    costs = ExitCosts.of(costs)
    if costs.leaving.shape != (trace.n_layers,):
        raise ValueError(f"{costs.leaving.size} costs for {trace.n_layers} exits")
    return costs


# ---------------------------------------------------------------------------- search

# What is minimised, given arrays of the mean NLL and the mean cost of many policies.
Merit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _best(trace, criterion, thresholds, costs, limit, merit, keeps) -> ExitPolicy | None:
    """Return the policy of least ``merit(limit)`` that really keeps to the limit, if there is one."""
    decays = {"global": (0.0,), "decaying": DECAYS}
    for slack in (ROUNDING, -ROUNDING):
        now = merit(limit + slack * abs(limit))
        if thresholds == "per_layer":
            policy = _per_layer(trace, criterion, costs, now)
        else:
            policy = _one_threshold(trace, criterion, costs, now, decays[thresholds])
        if policy is not None and keeps(policy):
            return replace(policy, model_hash=trace.model_hash)
    return None


def _one_threshold(trace, criterion, costs, merit: Merit, decays) -> ExitPolicy | None:
    found = [_Table(trace, criterion, costs, decay).one_threshold(merit) for decay in decays]
    return min(found, key=lambda pair: pair[0])[1]


def _per_layer(trace, criterion, costs, merit: Merit) -> ExitPolicy | None:
    """Descend from the best static exit or single threshold, and from both neighbours on the hull."""
    table = _Table(trace, criterion, costs)
    _, single = table.one_threshold(merit)
    simple = [*table.statics(), *([] if single is None else [table.levels(single)])]
    best = partial(min, key=lambda levels: table.score(levels, merit))
    starts, moved = [best(simple), *table.around(merit)], 3
    if trace.n_layers > MANY:
        starts, moved = [best(starts)], 2
    found = [table.descend(start, merit, moved) for start in starts]
    score, levels = min(found, key=lambda pair: pair[0])
    return table.policy(levels) if np.isfinite(score) else None


class _Table:
    """The trace as ranks: what T tokens lose and cost under any thresholds of one criterion.

    ``levels`` ``(L − 1,)`` are a policy: k lets the k best distinct scores of a layer leave, 0 none.

    Attributes:
        ranks: of a token's score among the layer's distinct scores, 1 the best ``(T, L − 1)``; a
            missing score comes after all of them.
        values: the distinct scores of each layer, best first.
        nll: NLL in nats ``(T, L)``.
    """

    def __init__(self, trace: ExitTrace, criterion: str, costs: ExitCosts, decay: float = 0.0):
        self.criterion, self.rule, self.decay = criterion, CRITERIA[criterion], decay
        self.sign = 1.0 if self.rule.exit_above else -1.0
        scores = trace.score(criterion)[:, :-1]
        if decay:  # score ≥ 0.9 λ + 0.1 exp(−τ t / N), solved for λ
            falling = np.exp(-decay * trace.position / trace.n_seq)[:, None]
            scores = (scores - 0.1 * falling) / 0.9
        self.scores, self.nll = scores, np.asfortranarray(trace.nll, dtype=np.float64)
        early = np.arange(trace.n_layers) < trace.n_layers - 1  # a check at the last saves nothing
        checks = costs.checks * early
        self.leaving = costs.leaving + np.cumsum(checks * self.rule.streak)  # a streak never skips
        self.checks = checks * (not self.rule.streak)
        self.values, ranks = [], []
        for column in scores.T:
            values, rank = self._ranked(column)
            self.values.append(values)
            ranks.append(rank)
        self.ranks = np.array(ranks, dtype=np.int64).reshape(-1, len(scores)).T

    def _ranked(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, index = np.unique(-self.sign * scores, return_inverse=True)
        known = values[~np.isnan(values)]
        return -self.sign * known, index.reshape(scores.shape) + 1

    def policy(self, levels: np.ndarray) -> ExitPolicy:
        """Return the policy of these levels."""
        thresholds = [
            values[level - 1] if level else self.rule.never
            for values, level in zip(self.values, levels, strict=True)
        ]
        return ExitPolicy(self.criterion, (*thresholds, self.rule.never))

    def levels(self, policy: ExitPolicy) -> np.ndarray:
        """Return the levels by which the same tokens leave."""
        pairs = zip(self.values, policy.thresholds, strict=False)
        return np.array([int(self.rule.passes(v, np.asarray(t, v.dtype)).sum()) for v, t in pairs])

    def statics(self) -> list[np.ndarray]:
        """Return the levels by which all tokens leave at one exit, for each of them."""
        full = np.array([len(values) for values in self.values], dtype=int)
        return [*np.diag(full), np.zeros_like(full)]

    def one_threshold(self, merit: Merit) -> tuple[float, ExitPolicy | None]:
        """Return the best policy with the same threshold at every layer, and its merit.

        A token has left by exit l when its best score up to l passes: cumulative sums of what leaving
        at l rather than at l + 1 changes answer for all thresholds.
        """
        values, ranks = self._ranked(self.scores)
        best = np.minimum.accumulate(ranks, axis=1)
        paid = self.leaving + np.cumsum(self.checks)
        nll = np.full(len(values) + 1, self.nll[:, -1].sum())
        cost = np.full(len(values) + 1, len(ranks) * paid[-1])
        for layer, rank in enumerate(best.T):
            change = self.nll[:, layer] - self.nll[:, layer + 1]
            left = np.bincount(rank, minlength=len(nll) + 1)[: len(nll)]
            nll += np.bincount(rank, change, minlength=len(nll) + 1)[: len(nll)].cumsum()
            cost += left.cumsum() * (paid[layer] - paid[layer + 1])
        cost[0] = len(ranks) * self.leaving[-1]  # nobody may leave, so nobody is checked
        score = merit(nll / len(ranks), cost / len(ranks))
        low, high = self.rule.bounds
        score[1:][(values < low) | (values > high)] = np.inf
        top = int(score.argmin())
        if not np.isfinite(score[top]):
            return np.inf, None
        threshold = float(values[top - 1]) if top else self.rule.never
        if self.decay:  # rounding must not turn the token away that the threshold was made for
            threshold = max(threshold - ROUNDING, low)
        thresholds = (threshold,) * (len(paid) - 1) + (self.rule.never,)
        return float(score[top]), ExitPolicy(self.criterion, thresholds, decay=self.decay)

    def totals(self, levels, layers=(), grids=()) -> tuple[np.ndarray, np.ndarray]:
        """Return mean NLL and mean cost where ``layers`` take every combination of levels in ``grids``.

        The other layers keep their ``levels``. With f the exit at which those let a token leave, it
        leaves at the first of ``layers`` before f whose level reaches its rank: histograms of these
        ranks, summed up to each level or beyond it, count all combinations at once.

        Args:
            levels: of all layers ``(L − 1,)``.
            layers: the layers that vary, in order.
            grids: levels of each of them, ascending from 0.

        Returns:
            Two arrays with one axis per layer that varies.
        """
        tokens = len(self.nll)
        fixed = np.array(levels)
        fixed[list(layers)] = 0
        first = self.exits(fixed)
        paid = self.leaving + np.cumsum(self.checks * np.append(fixed > 0, False))
        nll_then, cost_then = self.nll[np.arange(tokens), first], paid[first]
        axes = [len(grid) for grid in grids]
        nll, cost = np.full(axes, nll_then.sum()), np.full(axes, cost_then.sum())
        place, cells = np.zeros(tokens, dtype=np.int64), []
        for axis, (layer, grid) in enumerate(zip(layers, grids, strict=True)):
            wide = [1] * (len(axes) - axis - 1)  # layers that a token has not reached yet
            rows = np.flatnonzero(first > layer)
            if self.checks[layer]:
                checked = (grid > 0).reshape(-1, *wide)
                reached = _counts(place[rows], [*cells, 1, *wide])
                cost += self.checks[layer] * checked * _beyond(reached, axis)
            cells.append(len(grid) + 1)
            level = np.zeros(len(self.values[layer]) + 2, dtype=np.int64)
            level[grid + 1] = 1
            place[rows] = place[rows] * cells[-1] + level.cumsum()[self.ranks[rows, layer]]
            upto = (*[slice(None)] * axis, slice(-1))
            moved = (nll, self.nll[rows, layer], nll_then), (cost, paid[layer], cost_then)
            for total, now, then in moved:
                gained = _counts(place[rows], [*cells, *wide], now - then[rows])
                total += _beyond(gained.cumsum(axis=axis)[upto], axis)
        return nll / tokens, cost / tokens

    def exits(self, levels: np.ndarray) -> np.ndarray:
        """Return where each token leaves ``(T,)``, L − 1 for all that run to the end."""
        first = np.full(len(self.nll), len(levels), dtype=np.int64)
        for layer in reversed(range(len(levels))):
            first[self.ranks[:, layer] <= levels[layer]] = layer
        return first

    def grid(self, layer: int, level: int, moved: int) -> np.ndarray:
        """Return levels to try: all of them, or some over the range and closer ones near ``level``."""
        top = len(self.values[layer])
        if moved == 1 or top <= FEW:
            return np.arange(top + 1)
        steps = 2 ** np.arange(0, int(top).bit_length(), moved - 1)
        spread = np.linspace(0, top, SPREAD[moved]).astype(int)
        tried = np.concatenate([spread, [level], level - steps, level + steps])
        return np.unique(tried[(tried >= 0) & (tried <= top)])

    def around(self, merit: Merit) -> list[np.ndarray]:
        """Return the levels that are best at a price of a nat, on both sides of the merit's limit.

        The price is bisected; at its lowest, all tokens leave as cheaply as they can.
        """
        low, high = np.log10(self.leaving[-1]) + np.array(PRICES)
        cheap, good = (self.at_price(price, self.statics()[-1]) for price in (low, high))
        cheap_keeps = self.score(cheap, merit) < np.inf
        sides = {cheap_keeps: cheap, self.score(good, merit) < np.inf: good}
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            levels = self.at_price(middle, good)
            keeps = self.score(levels, merit) < np.inf
            sides[keeps] = levels
            low, high = (middle, high) if keeps == cheap_keeps else (low, middle)
        return list(sides.values())

    def at_price(self, price: float, start: np.ndarray) -> np.ndarray:
        """Return the levels of least mean cost + 10^price · NLL, one layer moved at a time."""
        return self.descend(start, lambda nll, cost: cost + 10**price * nll, moved=1)[1]

    def score(self, levels: np.ndarray, merit: Merit) -> float:
        """Return the merit of one policy."""
        return float(merit(*self.totals(levels)))

    def descend(self, levels, merit: Merit, moved: int) -> tuple[float, np.ndarray]:
        """Move the thresholds of up to ``moved`` layers at a time until the merit no longer falls."""
        levels = np.array(levels)
        moves = [m for n in range(moved) for m in combinations(range(len(levels)), n + 1)]
        score = self.score(levels, merit)
        for _ in range(SWEEPS):
            before = score
            for layers in moves:
                grids = [self.grid(i, levels[i], len(layers)) for i in layers]
                scores = merit(*self.totals(levels, layers, grids))
                top = np.unravel_index(scores.argmin(), scores.shape)
                if scores[top] < score:
                    score = float(scores[top])
                    levels[list(layers)] = [g[i] for g, i in zip(grids, top, strict=True)]
            if not score < before - ROUNDING * abs(before):
                break
        return score, levels


def _counts(place: np.ndarray, shape: list[int], weights: np.ndarray | None = None) -> np.ndarray:
    """Count the tokens at each place of an array of this shape, or sum up their weights."""
    return np.bincount(place, weights, minlength=int(np.prod(shape))).reshape(shape)


def _beyond(counts: np.ndarray, axes: int) -> np.ndarray:
    """Sum over the cells after each one, along the first ``axes`` axes."""
    for axis in range(axes):
        after = np.flip(np.flip(counts, axis).cumsum(axis=axis), axis)
        counts = after[(*[slice(None)] * axis, slice(1, None))]
    return counts
