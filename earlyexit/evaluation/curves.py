"""Tabulate what an exit trace contains: exits, thresholds, exit distributions, fitted policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from earlyexit.calibration.thresholds import Thresholds, Unreachable, fit_policy
from earlyexit.calibration.trace import ExitTrace, best_within
from earlyexit.evaluation.rivals import coin_shares
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed

LONG = 100  # points of a curve; of a longer one, every second point is kept
Kind = tuple[str, float, Thresholds]


def exit_quality(trace: ExitTrace) -> pd.DataFrame:
    """Tabulate the quality of each exit if all tokens leave there: ``ExitTrace.static`` and mean kl."""
    table = trace.static().rename(columns={"exit_layer": "exit"}).drop(columns="criterion")
    return table.assign(kl=trace.kl.mean(axis=0))


def signal_curves(trace: ExitTrace) -> pd.DataFrame:
    """Tabulate every threshold of every criterion, static exits and both oracles.

    Returns:
        Columns criterion, threshold, exit_layer and price (NaN where another is the setting, or where
        no score reaches the threshold), perplexity, quality_loss, layers, speedup_layers, agreement.
    """
    sweeps = [trace.sweep(name) for name in trace.criteria]
    parts = [sweep.iloc[::2] if len(sweep) > LONG else sweep for sweep in sweeps]
    parts += [trace.static(), trace.oracle("kl"), trace.oracle("nll")]
    return _finite(pd.concat(parts, ignore_index=True))


def calibrated_curves(
    before: ExitTrace, after: ExitTrace, criteria: Iterable[str] = ("max_probability", "entropy")
) -> pd.DataFrame:
    """Sweep the same predictions by their confidence before and after temperature scaling.

    Returns:
        As :func:`signal_curves`, with columns signal ("static" for static exits) and calibration
        ("before", "after", "none").
    """
    parts = []
    for name in criteria:
        for when, trace in (("before", before), ("after", after)):
            curve = replace(before, scores=trace.scores).sweep(name)
            label = f"{CRITERIA[name].label}, {when}"
            parts.append(curve.assign(criterion=label, signal=name, calibration=when))
    parts.append(before.static().assign(signal="static", calibration="none"))
    return _finite(pd.concat(parts, ignore_index=True))


def _finite(curves: pd.DataFrame) -> pd.DataFrame:
    return curves.replace([np.inf, -np.inf], np.nan).astype({"threshold": float})


def best_in_hindsight(curves: pd.DataFrame, epsilon: float) -> pd.Series:
    """Return each criterion's largest speedup in layers within ``epsilon``, averaged over the seeds.

    Args:
        curves: :func:`signal_curves` of several seeds, with a column seed.
    """
    within = curves[curves["quality_loss"] <= epsilon]
    best = within.groupby(["criterion", "seed"])["speedup_layers"].max()
    return best.groupby("criterion").mean()


def exit_distribution(trace: ExitTrace, thresholds: Iterable[float]) -> pd.DataFrame:
    """Tabulate at which exits tokens leave by maximum probability, and the layers this executes.

    Returns:
        One row per threshold and exit layer (n_layers: no early exit): threshold, exit_layer, share (of
        the tokens), average (mean exit layer), layers_executed, layer_equivalents (share × layers), and
        speedup_layers.
    """
    layers = np.arange(trace.n_layers + 1)
    executed = layers_executed(layers, trace.n_layers)
    parts = []
    for threshold in thresholds:
        exits = trace.exit_layers(ExitPolicy.constant(threshold, trace.n_layers))
        shares = trace.exit_distribution(exits)
        table = pd.DataFrame({"threshold": threshold, "exit_layer": layers, "share": shares})
        columns = {"average": exits.mean(), "layers_executed": executed}
        columns |= {"layer_equivalents": shares * executed}
        parts.append(table.assign(**columns, speedup_layers=trace.n_layers / (shares @ executed)))
    return pd.concat(parts, ignore_index=True)


def fit_all(
    trace: ExitTrace, criteria: Iterable[str], epsilons: Sequence[float]
) -> dict[Kind, ExitPolicy]:
    """Fit a policy of fewest layers per (criterion, ε, kind), or full depth if none saves.

    Args:
        trace: trace of the fit part.
    """
    policies = {}
    for criterion in criteria:
        kinds: tuple[Thresholds, ...] = ("global", "per_layer")
        kinds += ("decaying",) if CRITERIA[criterion].may_decay else ()
        for epsilon in epsilons:
            for kind in kinds:
                try:
                    policy = fit_policy(trace, criterion, epsilon, kind)
                except Unreachable:
                    policy = ExitPolicy.static(trace.n_layers, trace.n_layers)
                policies[criterion, epsilon, kind] = policy
    return policies


def policy_table(
    fit: ExitTrace, test: ExitTrace, policies: Mapping[Kind, ExitPolicy]
) -> pd.DataFrame:
    """Compare fitted policies on the test trace with the static exit and the oracle at the same ε.

    Args:
        fit: the trace that the policies were fitted on; the static exit is chosen on it, too.
        policies: the policies that :func:`fit_all` returns.

    Returns:
        Columns criterion, thresholds (their kind), epsilon, those of ``ExitTrace.evaluate``,
        fit_speedup_layers, static_speedup and static_loss, coin_speedup and coin_loss (of a coin between
        two static exits), oracle_speedup, and gap_closed: the share of the gap from the coin to the
        oracle that is closed, NaN if there is no gap.
    """
    static, static_test, oracle = fit.static(), test.static(), test.oracle("kl")
    rows = []
    for (criterion, epsilon, kind), policy in policies.items():
        within = static[static["quality_loss"] <= epsilon]
        cut = static_test.loc[within["speedup_layers"].idxmax()]
        coin = coin_shares(static, fit.full_nll + np.log1p(epsilon))
        floor = fit.n_layers / (coin @ static["layers"])
        top = best_within(oracle, epsilon)
        found = test.evaluate(policy)
        gap = (found["speedup_layers"] - floor) / (top - floor) if top > floor else np.nan
        rows.append(
            {"criterion": criterion, "thresholds": kind, "epsilon": epsilon}
            | found
            | {
                "fit_speedup_layers": fit.evaluate(policy)["speedup_layers"],
                "static_speedup": cut["speedup_layers"],
                "static_loss": cut["quality_loss"],
                "coin_speedup": floor,
                "coin_loss": np.expm1(coin @ np.log1p(static_test["quality_loss"])),
                "oracle_speedup": top,
                "gap_closed": gap,
            }
        )
    return pd.DataFrame(rows)
