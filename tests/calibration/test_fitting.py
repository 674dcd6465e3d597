"""Fitting: the limit is kept, no rival and no brute force does better, the test split stays unseen."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.calibration.stopping import fit_stopping_policy, fit_stopping_policy_to_cost
from earlyexit.calibration.thresholds import (
    ExitCosts,
    Unreachable,
    fit_policy,
    fit_policy_to_cost,
    mean_cost,
)
from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost.parts import exit_costs, policy_costs, policy_flops, stopping_costs
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


# ---------------------------------------------------------------------------- what the search must beat


def gated_trace(seed: int, layers: int, noise: float, tokens: int) -> ExitTrace:
    """Like a real trace: a deeper exit is worse for some tokens, and each gate is biased in its way."""
    rng = np.random.default_rng(seed)
    useful = rng.random((tokens, layers - 1)) < rng.uniform(0.2, 0.7, layers - 1)
    gain = rng.exponential(0.3, useful.shape) * useful + rng.normal(0, 0.1, useful.shape)
    ahead = np.pad(gain[:, ::-1].cumsum(axis=1)[:, ::-1], ((0, 0), (0, 1)))
    nll = (rng.exponential(4, (tokens, 1)) + ahead).astype(np.float32)
    blur = rng.normal(0, noise, ahead.shape) + rng.normal(0, 0.5, layers)
    gate = (np.exp(blur) * np.abs(ahead)).astype(np.float32)
    return ExitTrace(
        "fit", np.arange(tokens) // 20, np.arange(tokens) % 20, np.zeros(tokens, int), nll, ahead,
        np.zeros((tokens, layers), int), {"gate": gate, "agreement": np.exp(-gate)}, 20,
    )  # fmt: skip


def single_thresholds(trace: ExitTrace, costs: ExitCosts) -> np.ndarray:
    """Loss and cost of the gate with one threshold, run through one after another ``(n, 2)``."""
    values = np.unique(trace.scores["gate"][:, :-1])
    values = values[:: max(1, len(values) // 300)]
    policies = [ExitPolicy.constant(t, trace.n_layers, "gate") for t in values]
    policies = [replace(p, thresholds=(*p.thresholds[:-1], -np.inf)) for p in policies]
    return np.array([loss_and_cost(trace, p, costs) for p in policies])


def loss_and_cost(trace: ExitTrace, policy: ExitPolicy, costs: ExitCosts) -> tuple[float, float]:
    return trace.evaluate(policy)["quality_loss"], mean_cost(trace, policy, costs)


def mixtures(trace: ExitTrace, costs: ExitCosts) -> np.ndarray:
    """Expected loss and cost where a coin sends tokens to one of two exits, or all to one ``(n, 2)``.

    Every exit but the last is paid with its own check: thresholds cannot leave without one.
    """
    nll = trace.nll.mean(axis=0, dtype=float)
    paid = costs.leaving + costs.checks
    share, points = np.linspace(0, 1, 51), []
    for i, j in combinations(range(trace.n_layers), 2):
        stays = paid[j] + costs.checks[i] * (share > 0)  # who stays was checked at i, too
        spent = share * paid[i] + (1 - share) * stays
        loss = np.expm1(share * nll[i] + (1 - share) * nll[j] - trace.full_nll)
        points.append(np.stack([loss, spent], axis=1))
    return np.concatenate(points)


SETTINGS = {
    "seed": st.integers(0, 10_000),
    "layers": st.sampled_from([2, 3, 4, 6, 8]),
    "noise": st.floats(0, 1.5),
    "price": st.sampled_from([0.0, 0.02, 0.3]),
    "part": st.floats(0, 1),
}


@settings(max_examples=12, deadline=None)
@given(**SETTINGS)
def test_no_threshold_static_exit_or_coin_is_better_at_a_cost(seed, layers, noise, price, part):
    trace = gated_trace(seed, layers, noise, tokens=1500)
    costs = ExitCosts(np.arange(1.0, layers + 1), np.append([price] * (layers - 1), 0))
    rivals = np.concatenate([single_thresholds(trace, costs), mixtures(trace, costs)])
    cost = np.interp(part, [0, 1], [1 + price, layers])
    for budget in {cost, rivals[:, 1][rivals[:, 1] >= cost].min()}:  # also exactly a rival's
        policy = fit_policy_to_cost(trace, "gate", budget, costs)
        loss, spent = loss_and_cost(trace, policy, costs)
        assert spent <= budget
        within = rivals[:, 1] <= budget * (1 - 1e-9 * (budget > cost))  # but for rounding
        assert loss <= rivals[within, 0].min(initial=np.inf) + 1e-9


@settings(max_examples=12, deadline=None)
@given(**SETTINGS)
def test_no_threshold_static_exit_or_coin_is_cheaper_within_epsilon(
    seed, layers, noise, price, part
):
    trace = gated_trace(seed, layers, noise, tokens=1500)
    costs = ExitCosts(np.arange(1.0, layers + 1), np.append([price] * (layers - 1), 0))
    rivals = np.concatenate([single_thresholds(trace, costs), mixtures(trace, costs)])
    epsilon = 0.003 + 0.2 * part
    best = rivals[rivals[:, 0] <= epsilon, 1].min()
    try:
        policy = fit_policy(trace, "gate", epsilon, costs=costs)
    except Unreachable:
        assert best >= costs.leaving[-1]
        return
    loss, spent = loss_and_cost(trace, policy, costs)
    assert loss <= epsilon and spent <= best + 1e-9


@pytest.mark.slow
def test_a_coin_between_two_thresholds_is_rarely_better_and_never_by_much():
    """No threshold can follow the hull of a front that is not convex: what that costs, at most."""
    gains = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        layers, price = int(rng.choice([3, 4, 6])), rng.choice([0, 0.02, 0.3])
        trace = gated_trace(seed, layers, rng.uniform(0, 1.5), tokens=1500)
        costs = ExitCosts(np.arange(1.0, layers + 1), np.append([price] * (layers - 1), 0))
        statics = [loss_and_cost(trace, p, costs) for p in always(layers)]
        loss, cost = np.concatenate([single_thresholds(trace, costs), statics]).T
        budget = rng.uniform(1 + price, layers)
        within = cost <= budget
        share = (budget - cost[within, None]) / (cost[~within] - cost[within, None])
        coin = (1 - share) * np.log1p(loss[within, None]) + share * np.log1p(loss[~within])
        policy = fit_policy_to_cost(trace, "gate", budget, costs)
        gains.append(np.log1p(loss_and_cost(trace, policy, costs)[0]) - coin.min(initial=np.inf))
    assert np.mean(np.array(gains) > 1e-9) <= 0.2 and max(gains) < 0.005


def always(layers: int) -> list[ExitPolicy]:
    """Gates that let every token leave at one exit, checked there and nowhere else."""
    never = [-np.inf] * layers
    return [
        ExitPolicy("gate", (*never[:k], np.inf, *never[k + 1 :])) for k in range(layers - 1)
    ] + [ExitPolicy("gate", tuple(never))]


def test_a_single_threshold_is_the_best_of_all():
    trace, costs = gated_trace(3, 4, 0.5, 800), ExitCosts(np.arange(1.0, 5), np.array([0.1] * 4))
    for epsilon in (0.01, 0.05):
        policy = fit_policy(trace, "gate", epsilon, "global", costs)
        assert len(set(policy.thresholds[:-1])) == 1
        slow = [
            mean_cost(trace, p, costs)
            for t in np.unique(trace.scores["gate"][:, :-1])
            if trace.evaluate(p := ExitPolicy("gate", (t,) * 3 + (-np.inf,)))["quality_loss"]
            <= epsilon
        ]
        assert mean_cost(trace, policy, costs) == pytest.approx(min(slow), abs=1e-12)


def brute_force(trace: ExitTrace, costs: ExitCosts) -> np.ndarray:
    """Loss and cost of every choice of thresholds, no check among them ``(n, 2)``."""
    scores = trace.scores["gate"][:, :-1]
    every = np.array(list(product(*(np.append(-np.inf, np.unique(s)) for s in scores.T))))
    leaves = scores <= every[:, None]  # (n, tokens, layers − 1)
    exits = np.pad(leaves, ((0, 0), (0, 0), (0, 1)), constant_values=True).argmax(axis=2)
    loss = np.expm1(trace.nll[np.arange(len(scores)), exits].mean(axis=1) - trace.full_nll)
    checked = np.pad(every > -np.inf, ((0, 0), (0, 1)))
    paid = costs.leaving + np.cumsum(checked * costs.checks, axis=1)
    return np.stack([loss, np.take_along_axis(paid, exits, axis=1).mean(axis=1)], axis=1)


@pytest.mark.parametrize(("layers", "tokens"), [(2, 60), (3, 60), (4, 14)])
def test_finds_what_brute_force_finds(layers, tokens):
    """Both fits over all thresholds of a small trace; each check has its price, and may be skipped."""
    skipped = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        trace = gated_trace(seed, layers, rng.uniform(0, 1), tokens)
        prices = np.append(rng.choice([0, 0.02, 0.3], layers - 1), 0)
        costs = ExitCosts(np.cumsum(rng.uniform(0.5, 1.5, layers)), prices)
        loss, cost = brute_force(trace, costs).T
        for budget in np.quantile(cost, (0.2, 0.5, 0.8)) + 1e-9:  # a sum may round up
            policy = fit_policy_to_cost(trace, "gate", budget, costs)
            best = loss[cost <= budget].min()
            assert loss_and_cost(trace, policy, costs)[0] == pytest.approx(best, abs=1e-6)
        for epsilon in (0.02, 0.1):
            best = min(cost[loss <= epsilon].min(), costs.leaving[-1])
            try:
                policy = fit_policy(trace, "gate", epsilon, costs=costs)
            except Unreachable:
                assert best == pytest.approx(costs.leaving[-1])
                continue
            assert mean_cost(trace, policy, costs) == pytest.approx(best)
            skipped += not all(policy.checks(k) for k in range(layers - 1))
    assert skipped or layers == 2, "no check was too dear, so nothing was tried"


def test_a_check_that_does_not_pay_is_skipped():
    trace, layers = gated_trace(1, 4, 0.3, 2000), np.arange(1.0, 5)
    free = fit_policy(trace, "gate", 0.05, costs=layers)
    dear = ExitCosts(layers, np.array([0, 5.0, 0, 0]))
    policy = fit_policy(trace, "gate", 0.05, costs=dear)
    assert free.checks(1) and not policy.checks(1)
    assert mean_cost(trace, policy, dear) == mean_cost(trace, policy, layers)
    charged = ExitCosts(layers + np.cumsum(dear.checks), np.zeros(4))  # whether made or not
    assert mean_cost(trace, policy, charged) > 5
    with pytest.raises(Unreachable):  # full depth needs no check
        fit_policy(trace, "gate", 0.05, costs=ExitCosts(layers, np.array([5.0] * 3 + [0])))


def test_a_streak_pays_every_check():
    trace = gated_trace(1, 4, 0.3, 500)
    costs = ExitCosts(np.arange(1.0, 5), np.array([0.1, 0.2, 0.3, 0]))
    never = ExitPolicy.constant(np.inf, 4, "patience")
    assert mean_cost(trace, never, costs) == pytest.approx(4.6)
    policy = fit_policy_to_cost(trace, "patience", 3.8, costs)
    assert mean_cost(trace, policy, costs) <= 3.8


def test_a_gate_that_says_the_opposite_loses_to_a_coin():
    """A known-bad control: no threshold can be as good, so the rivals above do decide something."""
    trace, costs = gated_trace(2, 2, 0.0, 2000), ExitCosts.of([1.0, 2.0])
    ahead = trace.nll[:, :1] - trace.nll[:, 1:]
    wrong = replace(trace, scores={"gate": np.exp(-ahead).astype(np.float32) * np.ones((1, 2))})
    loss, _ = loss_and_cost(wrong, fit_policy_to_cost(wrong, "gate", 1.5, costs), costs)
    coins = mixtures(wrong, costs)
    assert loss > coins[coins[:, 1] <= 1.5, 0].min()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_costs_of_a_policy_are_those_of_its_run(make_model, criterion):
    """Leaving and checks, priced apart, add up to the account of any policy, skipped checks too."""
    model, rule, shares = make_model(), CRITERIA[criterion], np.array([0.5, 0.2, 0.0, 0.3])
    costs = policy_costs(model, criterion)
    for skipped in range(2):
        thresholds = [rule.never if k == skipped else rule.bounds[0] for k in range(2)]
        policy = ExitPolicy(criterion, (*thresholds, rule.never))
        spent = policy_flops(model, shares, policy, stops=False)["total"]
        assert costs.paid(policy) @ [0.5, 0.2, 0.3] == pytest.approx(spent)


def test_prices_belong_to_exits():
    with pytest.raises(ValueError, match="3 exits have 2 prices"):
        ExitCosts(np.ones(3), np.ones(2))


# ---------------------------------------------------------------------------- how deep a run goes


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("deepest", [0, 1, 2])
def test_stopping_costs_are_those_of_a_run_that_goes_no_deeper(make_model, criterion, deepest):
    model, rule = make_model(), CRITERIA[criterion]
    shares = np.array([[1, 0, 0], [0.7, 0.3, 0], [0.5, 0.2, 0.3]][deepest])
    checks = [rule.bounds[0]] * min(deepest + 1, 2)  # who is left at the deepest is checked there
    policy = ExitPolicy(criterion, (*checks, *[rule.never] * (3 - len(checks))))
    left = np.append(shares, 0.0) if deepest < 2 else np.append(shares[:2], [0.0, shares[2]])
    spent = policy_flops(model, left, policy)["total"]
    prices = stopping_costs(model, criterion)[deepest]
    assert prices.paid(policy) @ shares[: deepest + 1] == pytest.approx(spent)


def stopping_prices(layers: int, rng: np.random.Generator) -> list[ExitCosts]:
    """Prices of a made-up model in which a token that has left still costs a little in each layer."""
    cost, check, passed = rng.uniform(0.5, 1.5, layers), rng.choice([0, 0.02, 0.3]), 0.2
    found = []
    for deepest in range(layers):
        run = np.cumsum(cost[: deepest + 1]) + passed * np.arange(deepest, -1, -1)
        run[-1] += check * (deepest < layers - 1)
        found.append(ExitCosts(run, np.append([check] * deepest, 0.0)))
    return found


def cut(trace: ExitTrace, deepest: int) -> ExitTrace:
    scores = {"gate": trace.scores["gate"][:, : deepest + 1]}
    return replace(trace, nll=trace.nll[:, : deepest + 1], scores=scores)


def test_the_deepest_exit_is_found_by_brute_force_too():
    stops = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        trace, costs = gated_trace(seed, 3, rng.uniform(0, 1), 40), stopping_prices(3, rng)
        each = []  # loss against full depth and cost, of every policy for each deepest exit
        for deepest, prices in enumerate(costs):
            loss, cost = brute_force(part := cut(trace, deepest), prices).T
            loss = (1 + loss) * np.exp(part.full_nll - trace.full_nll) - 1
            each.append(np.stack([loss, cost], axis=1))
        whole = np.concatenate(each)
        for budget in np.quantile(whole[:, 1], (0.2, 0.5, 0.8)) + 1e-9:
            policy = fit_stopping_policy_to_cost(trace, "gate", budget, costs)
            best = whole[whole[:, 1] <= budget, 0].min()
            assert trace.evaluate(policy)["quality_loss"] == pytest.approx(best, abs=1e-6)
        for epsilon in (0.02, 0.1):
            policy = fit_stopping_policy(trace, "gate", epsilon, costs)
            exits = np.minimum(trace.exit_layers(policy), 2)
            may = [k for k, rows in enumerate(each) if rows[0, 0] <= epsilon or k == 2]
            best = min(each[k][each[k][:, 0] <= epsilon, 1].min() for k in may)
            spent = costs[exits.max()].paid(policy)[exits].mean()
            assert trace.evaluate(policy)["quality_loss"] <= epsilon
            assert spent == pytest.approx(best)
            stops += exits.max() < 2
    assert stops, "no run stopped early, so nothing was tried"


def test_a_straggler_does_not_keep_a_run_going(make_model):
    """One token in a thousand wants the last layer: for it alone, all others would be handed on."""
    trace = gated_trace(5, 3, 0.2, 2000)
    model = make_model()
    fitted = fit_policy(trace, "gate", 0.1, costs=policy_costs(model, "gate"))
    stopping = fit_stopping_policy(trace, "gate", 0.1, stopping_costs(model, "gate"))
    spent = [
        policy_flops(model, trace.exit_distribution(trace.exit_layers(policy)), policy)["total"]
        for policy in (fitted, stopping)
    ]
    assert spent[1] <= spent[0] * (1 + 1e-9)
    assert ExitPolicy.from_dict(stopping.to_dict()) == stopping  # JSON knows its thresholds


def test_stopping_fits_refuse_what_other_fits_refuse(make_model):
    costs = stopping_costs(make_model(), "gate")
    with pytest.raises(ValueError, match="test"):
        fit_stopping_policy(replace(gated_trace(1, 3, 0.2, 50), split="test"), "gate", 0.1, costs)
    trace = gated_trace(1, 3, 0.2, 50)
    with pytest.raises(Unreachable, match="costs ≤ 1"):
        fit_stopping_policy_to_cost(trace, "gate", 1.0, costs)
    with pytest.raises(ValueError, match="epsilon"):
        fit_stopping_policy(trace, "gate", -0.1, costs)


def test_a_policy_that_costs_more_than_full_depth_is_none():
    """Where checks are dear, even a run that stops early may be: full depth checks nothing."""
    trace, layers = gated_trace(1, 3, 0.2, 300), np.arange(1.0, 4)
    dear = [ExitCosts(layers[: k + 1] + 9.0 * (k < 2), np.append([9.0] * k, 0)) for k in range(3)]
    with pytest.raises(Unreachable, match="costs less than full depth"):
        fit_stopping_policy(trace, "gate", 0.3, dear)
    free = [ExitCosts.of(layers[: k + 1]) for k in range(3)]
    assert (trace.exit_layers(fit_stopping_policy(trace, "gate", 0.3, free)) < 2).any()
