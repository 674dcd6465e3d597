"""Systems that combine ACT, several scales, a sparse BK-Core and exits, as tidy tables.

What a single run costs and saves is measured in :mod:`earlyexit.evaluation.systems`. Models are given by
the name of their system; a table of several seeds is a stack of one per seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from earlyexit.cost.system_times import system_times
from earlyexit.cost.timing import time_columns
from earlyexit.evaluation import claims
from earlyexit.evaluation.routing import kept_shares
from earlyexit.evaluation.systems import (
    candidate_policies,
    choose,
    quantile_policies,
    speedups,
    sweep,
)
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.training.systems import EXITS, REFERENCE, SYSTEMS, System

Batches = Sequence[tuple[Tensor, Tensor]]
Models = Mapping[str, EarlyExitModel]

FULL, ADAPTIVE, STATIC = "full depth", "adaptive", "static"  # kinds of policies
CHOSEN, CUT_OFF = "chosen", "cut off"  # modes at matched quality, beside full depth

MEASURES = {
    "positions": "speedup_layers",
    "layer FLOPs": "speedup_flops",
    "layer time": "time_layers",
    "total time": "time_total",
}

DEARER = 1.15  # FLOPs' speedup over the clock's, from which a verdict mentions it


def full_depth_table(models: Models, fit: Batches, test: Batches) -> pd.DataFrame:
    """Every system as trained, without early exit.

    Args:
        fit: its first batch says how many positions a sparse core keeps; test: is scored.

    Returns:
        Columns system, kept (share of positions that BK-Core visits), and those of
        :func:`earlyexit.evaluation.systems.run_policy`.
    """
    rows = []
    for name, model in models.items():
        kept = kept_shares(model, fit[:1])
        full = sweep(model, test, [None]).drop(columns="threshold").iloc[0]
        rows.append({"system": name, "kept": np.mean(kept) if kept else 1.0} | dict(full))
    return pd.DataFrame(rows)


def act_conversion(
    converted: EarlyExitModel,
    calibrated: EarlyExitModel,
    fit: Batches,
    test: Batches,
    shares: Sequence[float],
) -> pd.DataFrame:
    """A converted ACT model at several thresholds, its exits calibrated or not, and at ACT's own.

    Args:
        shares: of the scores on the first batch of ``fit`` that pass each threshold.

    Returns:
        :func:`earlyexit.evaluation.systems.sweep`, with a column exits.
    """
    policies = quantile_policies(converted, fit[0][0], "agreement", shares)
    parts = [
        sweep(converted, test, policies).assign(exits="as converted"),
        sweep(calibrated, test, policies).assign(exits="calibrated"),
        sweep(converted, test, [converted.act_policy()]).assign(exits="ACT itself"),
    ]
    return pd.concat(parts, ignore_index=True)


def conversion_error(
    act: EarlyExitModel, converted: EarlyExitModel, batch: tuple[Tensor, Tensor]
) -> float:
    """Largest difference of any token's NLL between ACT and its conversion at ACT's threshold, nats."""
    truth, (found, _) = act.nll(*batch), converted.nll(*batch, converted.act_policy())
    return (truth - found).abs().max().item()


@dataclass(frozen=True)
class SystemCurve:
    """What a system's policies do.

    Attributes:
        policies: one per row of the tables; None is full depth.
        fit: :func:`earlyexit.evaluation.systems.sweep` on the fit part.
        test: on the test split, with what is saved against the plain model, and the kind of the policy
            in a column policy.
    """

    policies: list[ExitPolicy | None]
    fit: pd.DataFrame
    test: pd.DataFrame

    def rows(self, *kinds: str) -> np.ndarray:
        """Which rows are policies of these kinds."""
        return self.test["policy"].isin(kinds).to_numpy()


def system_curves(
    models: Models, fit: Batches, test: Batches, shares: Sequence[float]
) -> dict[str, SystemCurve]:
    """Name → curve of every system over its thresholds, run for real.

    Args:
        models: ready to exit, the plain one first.
        shares: of the scores on the first batch of ``fit`` that pass each threshold.
    """
    systems: dict[str, System] = {system.name: system for system in SYSTEMS}
    curves: dict[str, SystemCurve] = {}
    reference = None
    for name, model in models.items():
        kinds = candidate_policies(systems[name], model, fit[0][0], shares)
        policies = [policy for group in kinds.values() for policy in group]
        on_fit, on_test = (sweep(model, part, policies) for part in (fit, test))
        reference = on_test.iloc[0] if reference is None else reference
        names = [kind for kind, group in kinds.items() for _ in group]
        on_test, static = speedups(on_test, reference), np.array(names) == STATIC
        setting = on_test["threshold"]  # of a static exit, its layer
        on_test = on_test.assign(
            policy=names, threshold=setting.mask(static), exit_layer=setting.where(static)
        )
        curves[name] = SystemCurve(policies, on_fit, on_test)
    return curves


def at_matched_quality(
    curves: Mapping[str, SystemCurve],
    models: Models,
    batch: tuple[Tensor, Tensor],
    epsilon: float,
    repeats: int,
) -> pd.DataFrame:
    """The cheapest policy of each system within ε of the plain model on the fit part, timed in turn.

    Args:
        curves: as :func:`system_curves` returns for ``models``.
        batch: token ids and targets ``(B, N)`` that are timed.

    Returns:
        Per system its chosen adaptive policy, the static one of the same quality (mode "cut off") and
        full depth: system, mode, matched_to ("the plain model", or "itself" where a system cannot get
        there), the columns of the curve's test table; and with intervals low to high the speedups
        time_layers and time_total against the plain model, and against_exits of the layers.
    """
    limit = curves[REFERENCE.name].fit["perplexity"].iloc[0]
    chosen, runs = {}, {}
    for name, curve in curves.items():
        for mode, kind in ((CHOSEN, ADAPTIVE), (CUT_OFF, STATIC)):
            if mode == CUT_OFF and not curve.rows(kind).any():
                continue
            k, matched_to = choose(curve.fit[curve.rows(FULL, kind)], limit, epsilon)
            chosen[name, mode] = dict(curve.test.iloc[k]) | {"matched_to": matched_to}
            runs[name, mode] = models[name], curve.policies[k]
        chosen[name, FULL] = dict(curve.test.iloc[0]) | {"matched_to": ""}
        runs[name, FULL] = models[name], None
    seconds, rows = system_times(runs, *batch, repeats), []
    for (name, mode), row in chosen.items():
        row = {"system": name, "mode": mode} | row
        for part in ("layers", "total"):
            taken, plain = seconds[part][name, mode], seconds[part][REFERENCE.name, FULL]
            row |= time_columns(plain, taken, f"time_{part}")
        layers = seconds["layers"]
        row |= time_columns(layers[EXITS.name, CHOSEN], layers[name, mode], "against_exits")
        rows.append(row)
    return pd.DataFrame(rows)


def claimed_products(matched: pd.DataFrame) -> pd.DataFrame:
    """The original's factors and products beside the measured ones, of one seed.

    Args:
        matched: as :func:`at_matched_quality` returns.

    Returns:
        Columns claim, claimed (NaN: nothing is), and a speedup per key of ``MEASURES``; those of time
        with _low and _high.
    """
    ends = {
        f"{measure}_{end}": f"{column}_{end}"
        for measure, column in MEASURES.items()
        if measure.endswith("time")
        for end in ("low", "high")
    }
    columns = MEASURES | ends
    values = matched.set_index(["mode", "system"])[list(columns.values())]
    alone, both = values.loc[FULL], values.loc[CHOSEN]
    scales, sparse, exits = alone.loc["multi-scale"], alone.loc["sparse"], both.loc["exits"]
    rows = {
        "several scales": (claims.MULTI_SCALE, scales),
        "sparse BK-Core": (claims.SPARSE, sparse),
        "exits": (claims.EXITS, exits),
        "layers cut off": (np.nan, values.loc[(CUT_OFF, "exits")]),
        "scales × exits (multiplied)": (claims.MULTI_SCALE_AND_EXITS, scales * exits),
        "scales + exits (measured)": (claims.MULTI_SCALE_AND_EXITS, both.loc["multi-scale"]),
        "sparse × exits (multiplied)": (claims.SPARSE_AND_EXITS, sparse * exits),
        "sparse + exits (measured)": (claims.SPARSE_AND_EXITS, both.loc["sparse"]),
    }
    return pd.DataFrame(
        [
            {"claim": name, "claimed": claimed} | {m: row[c] for m, c in columns.items()}
            for name, (claimed, row) in rows.items()
        ]
    )


def verdict_table(matched: pd.DataFrame) -> pd.DataFrame:
    """Each system's chosen policy against exits alone.

    Args:
        matched: stacked over the seeds.

    Returns:
        Columns seed, system, matched_to, quality_loss, quality_loss_full_depth, speedup_flops,
        time_layers, against_exits with its interval, flops_over_time.
    """
    of_full = matched[matched["mode"] == FULL][["seed", "system", "quality_loss"]]
    table = matched[matched["mode"] == CHOSEN].merge(
        of_full, on=["seed", "system"], suffixes=("", "_full_depth")
    )
    table["flops_over_time"] = table["speedup_flops"] / table["time_layers"]
    columns = ["seed", "system", "matched_to", "quality_loss", "quality_loss_full_depth"]
    columns += ["speedup_flops", "time_layers"]
    columns += ["against_exits", "against_exits_low", "against_exits_high", "flops_over_time"]
    return table[columns]


def verdicts(table: pd.DataFrame, epsilon: float) -> str:
    """A Markdown list: which systems are faster than exits alone, and why not.

    Args:
        table: as :func:`verdict_table` returns; epsilon: the matched quality loss.
    """
    mean = table.groupby("system", sort=False).mean(numeric_only=True)
    alone = mean.loc[EXITS.name, "quality_loss"]
    lines = []
    for name, rows in table.groupby("system", sort=False):
        if name in (REFERENCE.name, EXITS.name):
            continue
        row = mean.loc[name]
        why = [
            f"its layers take {1 / row['against_exits']:.2f} of the time of exits alone, at a loss of"
            f" {row['quality_loss']:+.1%} against {alone:+.1%}"
        ]
        if not (rows["matched_to"] == "the plain model").all():
            why.append(
                f"none of its policies is within {epsilon:.0%} of the plain model on the fit part, so it"
                f" is matched to itself (at full depth {row['quality_loss_full_depth']:+.1%} on the test"
                " split)"
            )
        if row["flops_over_time"] > DEARER:
            why.append(
                f"FLOPs promise {row['speedup_flops']:.2f}×, {row['flops_over_time']:.2f} times what the"
                " clock gives: the rest goes into gathering, scattering and smaller matrix products"
            )
        lines.append(f"- **{name}** {_comparison(rows)}: {'; '.join(why)}.")
    return "\n".join(lines)


def _comparison(rows: pd.DataFrame) -> str:
    if (rows["against_exits_low"] > 1).all():
        return "is faster"
    return "is slower" if (rows["against_exits_high"] < 1).all() else "cannot be told apart"
