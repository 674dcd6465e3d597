"""The rivals of exits: smaller models trained alone on the same text, and exits that know nothing.

Smaller models of R depths answer for every cost in between: a coin decides which of two neighbours
scores a document, so that cost and expected loss lie on the line between theirs. That is the rival at
*equal cost*, and at *equal quality*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from earlyexit.calibration.bounds import paired_interval
from earlyexit.calibration.stopping import fit_stopping_policy_to_cost
from earlyexit.calibration.thresholds import Unreachable
from earlyexit.calibration.trace import ExitTrace, by_document
from earlyexit.cost.parts import policy_flops, stopping_costs
from earlyexit.evaluation.compare import SPEEDUPS, Candidate, over_seeds
from earlyexit.evaluation.depth import ALONE
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed

Alone = Mapping[int, pd.DataFrame]
COIN = "static, by coin"


def trained_alone(losses: pd.DataFrame, seed: int, split: str = "test") -> dict[int, pd.DataFrame]:
    """Return depth → losses by document of the models trained alone with a seed, by rising depth.

    Args:
        losses: the table ``depth_losses`` of notebook 01.
    """
    rows = losses[(losses["system"] == ALONE) & (losses["seed"] == seed)]
    rows = rows[rows["split"] == split]
    return {int(depth): part.sort_values("document") for depth, part in rows.groupby("layers")}


def perplexities(alone: Alone) -> dict[int, float]:
    """Return depth → perplexity of models trained alone."""
    means = {d: np.average(rows["nll"], weights=rows["tokens"]) for d, rows in alone.items()}
    return {depth: float(np.exp(mean)) for depth, mean in means.items()}


def shares_at(costs: np.ndarray, cost: float) -> np.ndarray:
    """Return the shares in which models must answer so that their mean cost is ``cost`` ``(R,)``.

    Args:
        costs: rising costs of the models ``(R,)``. Below the first it alone answers, above the last
            that one.
    """
    place = np.interp(cost, costs, np.arange(len(costs)))
    return np.maximum(0, 1 - np.abs(np.arange(len(costs)) - place))


def cost_of_quality(costs: np.ndarray, losses: np.ndarray, loss: float) -> float:
    """Return what models must cost to reach ``loss``: NaN if none is as good, the first's if all are.

    Args:
        costs: rising costs ``(R,)``; losses: mean NLL of each ``(R,)``.
    """
    best = np.minimum.accumulate(losses)  # a deeper model that is worse is never used
    if loss < best[-1]:
        return np.nan
    kept = np.append(True, np.diff(best) < 0)
    return float(np.interp(-loss, -best[kept], costs[kept]))


def exit_gaps(trace: ExitTrace, alone: Alone) -> pd.DataFrame:
    """Compare every exit with a model of its depth that was trained alone.

    Args:
        trace: over all tokens that ``alone`` is about.

    Returns:
        One row per exit with such a model: exit, perplexity, alone_perplexity, and the exit gap,
        difference: the perplexity over the model's, minus 1 (document mean), with its 95 % interval low
        to high, and p_value.
    """
    rows = []
    for exit_layer in range(trace.n_layers):
        if exit_layer + 1 not in alone:
            continue
        single = alone[exit_layer + 1]
        nll = trace.nll[:, exit_layer]
        gaps = by_document(nll, trace.document) - single["nll"].to_numpy()
        rows.append(
            {
                "exit": exit_layer,
                "perplexity": np.exp(nll.mean(dtype=float)),
                "alone_perplexity": perplexities({exit_layer + 1: single})[exit_layer + 1],
            }
            | _relative(gaps)
        )
    return pd.DataFrame(rows)


def _relative(gaps: np.ndarray) -> dict[str, float]:
    """Return the relative difference of perplexities with its 95 % interval, paired by document."""
    mean, half, p = paired_interval(gaps)
    ends = {"difference": mean, "low": mean - half, "high": mean + half}
    return {name: np.expm1(value) for name, value in ends.items()} | {"p_value": p}


def equal_cost(
    model: EarlyExitModel,
    fit: ExitTrace,
    test: ExitTrace,
    alone: Alone,
    costs: Mapping[int, float],
) -> pd.DataFrame:
    """Compare gates fitted to the FLOPs of each smaller model with that model.

    Args:
        fit, test: traces of the model with gates; thresholds are chosen on the first.
        alone: depth → losses by document of a smaller model over the tokens of ``test``.
        costs: depth → its FLOPs per token.

    Returns:
        One row per depth: depth, adaptive_layers, adaptive_cost (over the smaller model's; above 1 if
        no exit is as cheap), adaptive_perplexity, alone_perplexity, difference (document mean) with
        its 95 % interval low to high, and p_value.
    """
    rows, last, prices = [], model.n_layers - 1, stopping_costs(model, "gate")
    for depth, single in alone.items():
        try:
            policy = fit_stopping_policy_to_cost(fit, "gate", costs[depth], prices)
        except Unreachable:  # the smaller model is cheaper than the cheapest exit, the first
            policy = ExitPolicy.static(0, model.n_layers)
        exits = test.exit_layers(policy)
        spent = policy_flops(model, test.exit_distribution(exits), policy)["total"]
        reached = np.minimum(exits, last)
        nll = test.nll[np.arange(test.n_tokens), reached]
        gaps = by_document(nll, test.document) - single["nll"].to_numpy()
        rows.append(
            {
                "depth": depth,
                "adaptive_layers": reached.mean() + 1,
                "adaptive_cost": spent / costs[depth],
                "adaptive_perplexity": np.exp(nll.mean(dtype=float)),
                "alone_perplexity": perplexities({depth: single})[depth],
            }
            | _relative(gaps)
        )
    return pd.DataFrame(rows)


def random_exits(trace: ExitTrace, candidates: Iterable[Candidate], criterion: str) -> pd.DataFrame:
    """Read off what policies lose if the same shares of tokens leave, but tokens chosen at random.

    Returns:
        One row per candidate of the criterion: criterion ("random exits"), epsilon, perplexity,
        quality_loss, speedup_layers, exited_early, tokens.
    """
    static, rows = trace.static(), []
    for candidate in candidates:
        if candidate.criterion != criterion:
            continue
        shares = trace.exit_distribution(trace.exit_layers(candidate.policy))
        executed = layers_executed(np.arange(trace.n_layers + 1), trace.n_layers)
        nll = shares @ np.log(static["perplexity"].to_numpy())[executed - 1]
        rows.append(
            {
                "criterion": "random exits",
                "epsilon": candidate.value,
                "perplexity": np.exp(nll),
                "quality_loss": np.expm1(nll - trace.full_nll),
                "speedup_layers": trace.n_layers / (shares @ executed),
                "exited_early": 1 - shares[-2:].sum(),
                "tokens": trace.n_tokens,
            }
        )
    return pd.DataFrame(rows)


def coin_shares(static: pd.DataFrame, limit: float) -> np.ndarray:
    """Return the shares of documents that a coin sends to each exit so that their loss is ``limit``.

    It chooses between two neighbouring exits, at each of which all tokens leave ``(L,)``.

    Args:
        static: :meth:`ExitTrace.static` of the fit part.
        limit: NLL in nats, at least that of the best exit.
    """
    layers, nll = static["layers"].to_numpy(), np.log(static["perplexity"].to_numpy())
    return shares_at(layers, cost_of_quality(layers, nll, limit))


def coins(front: pd.DataFrame, fit: ExitTrace, epsilons: Sequence[float]) -> pd.DataFrame:
    """Read off what a coin between two static exits loses and saves, at the ε of fitted policies.

    Args:
        front: rows of one seed of :func:`earlyexit.evaluation.compare.compare`, static exits included.
        fit: trace of the fit part, on which the coin is chosen.

    Returns:
        One row per ε: criterion ("static, by coin"), epsilon, perplexity, quality_loss, twin_loss,
        tokens, the speedups, and exited_early.
    """
    exits = front[front["criterion"] == "static"].sort_values("exit_layer")
    full = exits["perplexity"].iloc[0] / (1 + exits["quality_loss"].iloc[0])
    twin = exits["perplexity"].iloc[0] / (1 + exits["twin_loss"].iloc[0])
    static, rows = fit.static(), []
    for epsilon in epsilons:
        shares = coin_shares(static, fit.full_nll + np.log1p(epsilon))
        perplexity = np.exp(shares @ np.log(np.append(exits["perplexity"], full)))
        speedups = {x: 1 / (shares @ (1 / np.append(exits[x], 1.0))) for x in SPEEDUPS}
        about = {"criterion": COIN, "epsilon": epsilon, "perplexity": perplexity}
        losses = {"quality_loss": perplexity / full - 1, "twin_loss": perplexity / twin - 1}
        rest = {"tokens": exits["tokens"].iloc[0], "exited_early": 1 - shares[-1]}
        rows.append(about | losses | speedups | rest)
    return pd.DataFrame(rows)


def rival_table(
    front: pd.DataFrame,
    axes: Mapping[str, str],
    alone: Alone,
    test: ExitTrace,
    candidates: Iterable[Candidate],
    criterion: str = "gate",
) -> pd.DataFrame:
    """Compare fitted policies, run for real, with smaller models at equal cost and equal quality.

    Args:
        front: rows of one seed of :func:`earlyexit.evaluation.compare.compare`, models trained alone
            included.
        axes: name of a cost → the column of the speedup that counts it.
        alone: depth → losses by document of these models, over the tokens of ``test``.
        test: trace from which the policies' losses by document are read.
        candidates: the policies of ``front``.

    Returns:
        One row per ε and cost: epsilon, cost, perplexity, speedup, rival_perplexity (at equal cost),
        difference (perplexity over it, minus 1) with its 95 % interval over documents, low to high,
        and rival_speedup (at equal quality; NaN: none is as good).
    """
    models, rows = front[front["criterion"] == ALONE], []
    policies = {c.value: c.policy for c in candidates if c.criterion == criterion}
    for axis, column in axes.items():
        ladder = models.sort_values(column, ascending=False)
        costs, losses = 1 / ladder[column].to_numpy(), np.log(ladder["perplexity"].to_numpy())
        of_models = np.stack([alone[int(depth)]["nll"].to_numpy() for depth in ladder["depth"]])
        tokens = alone[int(ladder["depth"].iloc[0])]["tokens"].to_numpy()
        for row in front[front["criterion"] == criterion].to_dict("records"):
            shares = shares_at(costs, 1 / row[column])
            rival = float(np.exp(shares @ losses))
            exits = np.minimum(test.exit_layers(policies[row["epsilon"]]), test.n_layers - 1)
            nll = by_document(test.nll[np.arange(test.n_tokens), exits], test.document)
            half = _half_width(nll - shares @ of_models, tokens)
            apart = np.log(row["perplexity"] / rival)
            rows.append(
                {
                    "epsilon": row["epsilon"],
                    "cost": axis,
                    "perplexity": row["perplexity"],
                    "speedup": row[column],
                    "rival_perplexity": rival,
                    "difference": np.expm1(apart),
                    "low": np.expm1(apart - half),
                    "high": np.expm1(apart + half),
                    "rival_speedup": 1 / cost_of_quality(costs, losses, np.log(row["perplexity"])),
                }
            )
    return pd.DataFrame(rows)


def over_alone(front: pd.DataFrame, criterion: str, column: str) -> pd.DataFrame:
    """Compare rows of a front with models trained alone, or mixtures of two of them, of equal cost.

    Args:
        front: rows of several seeds of :func:`earlyexit.evaluation.compare.compare`.
        criterion: whose rows, one per ε; column: the speedup that counts the cost.

    Returns:
        One row per seed and ε: seed, epsilon, difference (perplexity over that of the models, minus 1).
    """
    rows = []
    for seed, of_seed in front.groupby("seed"):
        ladder = of_seed[of_seed["criterion"] == ALONE].sort_values(column, ascending=False)
        costs, losses = 1 / ladder[column].to_numpy(), np.log(ladder["perplexity"].to_numpy())
        for row in of_seed[of_seed["criterion"] == criterion].to_dict("records"):
            apart = np.log(row["perplexity"]) - shares_at(costs, 1 / row[column]) @ losses
            rows.append({"seed": seed, "epsilon": row["epsilon"], "difference": np.expm1(apart)})
    return pd.DataFrame(rows)


def told(rows: pd.DataFrame) -> str:
    """Say how policies of one ε compare with models trained alone at one cost, over seeds.

    Args:
        rows: of :func:`rival_table`, with a column seed.
    """
    apart = over_seeds(rows, ["cost"], ["difference"]).iloc[0]
    seeds = f", {apart['low']:+.1%} to {apart['high']:+.1%} over seeds" if len(rows) > 1 else ""
    equal = rows["rival_speedup"].mean()
    return (
        f"at equal {apart['cost']} {apart['mean']:+.1%} in perplexity ({rows['low'].min():+.1%} to"
        f" {rows['high'].max():+.1%} over documents{seeds}), at equal quality"
        f" {rows['speedup'].mean():.2f}× beside"
        f" {'none that is as good' if np.isnan(equal) else f'{equal:.2f}×'}"
    )


def _half_width(gaps: np.ndarray, tokens: np.ndarray) -> float:
    """Return half the 95 % interval over documents of a mean in which each counts by its tokens.

    Documents are drawn with their lengths, so the mean is a ratio, linearised at its value.
    """
    mean = np.average(gaps, weights=tokens)
    return paired_interval(mean + (gaps - mean) * tokens / tokens.mean())[1]
