"""The tables that compare combined systems: full depth, curves, matched quality, products, verdicts.

Models are given by the name of their system; :mod:`earlyexit.evaluation.systems` runs them.
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
    ADAPTIVE,
    CHOSEN,
    CUT_OFF,
    FULL,
    STATIC,
    Batches,
    Models,
    candidate_policies,
    choose,
    quantile_policies,
    speedups,
    sweep,
)
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.training.systems import CONTROLS, EXITS, REFERENCE, SYSTEMS

MEASURES = {
    "positions": "speedup_layers",
    "layer FLOPs": "speedup_flops",
    "layer time": "time_layers",
    "total time": "time_total",
}

DEARER = 1.15  # speedup in FLOPs over that in time, above which a verdict mentions it


def full_depth_table(models: Models, fit: Batches, test: Batches) -> pd.DataFrame:
    """Measure every system and control as trained, without early exit.

    Args:
        fit: batches; on the first, the positions that a sparse core keeps are counted.
        test: batches that are scored.

    Returns:
        Columns system, control (whether it is one), kept (share of positions that sparse cores visit; 1
        without any), and those of :func:`run_policy`.
    """
    parts, controls = [], {control.name for control in CONTROLS}
    for name, model in models.items():
        kept = np.mean(kept_shares(model, fit[:1]) or [1.0])
        full = sweep(model, test, [None]).drop(columns="threshold")
        row = {"system": [name], "control": name in controls, "kept": kept}
        parts.append(pd.DataFrame(row).join(full))
    return pd.concat(parts, ignore_index=True)


def worth_of_parts(alone: pd.DataFrame, epsilon: float) -> str:
    """Say by how much mixing and depth matter: what the reference loses without each.

    One matters if in no seed the control without it is within ε of the reference: where it is, a model
    that lacks it would itself count as matched.

    Args:
        alone: tables of :func:`full_depth_table`, stacked over the seeds, with the controls.
        epsilon: the matched quality loss.
    """
    of = alone.pivot(index="seed", columns="system", values="perplexity")
    plain, lines = of[REFERENCE.name], []
    for control, lost in zip(CONTROLS, ("mixing", "depth"), strict=True):
        loss = of[control.name] / plain - 1
        ends = "" if len(loss) == 1 else f", by seed {loss.min():+.1%} to {loss.max():+.1%}"
        verdict = (
            f"{lost} matters at this budget"
            if (loss > epsilon).all()
            else f"**{lost} does not matter at this budget**, and what is saved of it says little"
        )
        lines.append(
            f"- {control.name}: perplexity {of[control.name].mean():.1f} against {plain.mean():.1f}"
            f" ({loss.mean():+.1%}{ends}; more than {epsilon:.0%} would matter): {verdict}."
        )
    return "\n".join(lines)


def act_conversion(
    converted: EarlyExitModel,
    calibrated: EarlyExitModel,
    fit: Batches,
    test: Batches,
    shares: Sequence[float],
) -> pd.DataFrame:
    """Sweep the thresholds of a converted ACT model, calibrated or not, and run it at ACT's threshold.

    Args:
        shares: shares of the scores on the first batch of ``fit`` that pass each threshold.

    Returns:
        The rows of :func:`sweep`, with a column exits.
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
    """Return the largest difference (nats) of a token's NLL from ACT, converted at its threshold."""
    truth, (found, _) = act.nll(*batch), converted.nll(*batch, converted.act_policy())
    return (truth - found).abs().max().item()


@dataclass(frozen=True)
class SystemCurve:
    """A curve holds the policies of a system and their results.

    Attributes:
        policies: one per row of the tables; None is full depth.
        fit: :func:`sweep` on the fit part.
        test: :func:`sweep` on the test split, with the columns of :func:`speedups`, and with columns
            exit_layer and policy (its kind).
    """

    policies: list[ExitPolicy | None]
    fit: pd.DataFrame
    test: pd.DataFrame

    def rows(self, *kinds: str) -> np.ndarray:
        """Return a mask of the rows whose policies are of these kinds."""
        return self.test["policy"].isin(kinds).to_numpy()


def system_curves(
    models: Models, fit: Batches, test: Batches, shares: Sequence[float]
) -> dict[str, SystemCurve]:
    """Run every system at its thresholds and return its curve by name.

    Args:
        models: models with calibrated exits, the plain one first.
        shares: shares of the scores on the first batch of ``fit`` that pass each threshold.
    """
    systems, curves, reference = {s.name: s for s in SYSTEMS}, {}, None
    for name, model in models.items():
        kinds = candidate_policies(systems[name], model, fit[0][0], shares)
        policies = [policy for group in kinds.values() for policy in group]
        on_fit, on_test = (sweep(model, part, policies) for part in (fit, test))
        reference = on_test.iloc[0] if reference is None else reference
        names = [kind for kind, group in kinds.items() for _ in group]
        on_test, static = speedups(on_test, reference), np.array(names) == STATIC
        setting = on_test["threshold"]  # for a static exit this is its layer
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
    """Choose and time the cheapest policy of each system within ε of the plain model on the fit part.

    Args:
        curves: the curves that :func:`system_curves` returns for ``models``.
        batch: token ids and targets ``(B, N)`` on which runs are timed, interleaved.

    Returns:
        One row per system and mode ("chosen": adaptive, "cut off": static, or "full depth"): system,
        mode, matched_to ("the plain model", or "itself" if no policy is within ε of it), the columns of
        the curve's test table; and, with _low and _high, the speedups time_layers and time_total
        against the plain model, and against_exits of the layers against exits alone.
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
    seconds = system_times(runs, *batch, repeats)
    layers, total, plain = seconds["layers"], seconds["total"], (REFERENCE.name, FULL)
    rows = [
        {"system": key[0], "mode": key[1]}
        | row
        | time_columns(layers[plain], layers[key], "time_layers")
        | time_columns(total[plain], total[key], "time_total")
        | time_columns(layers[EXITS.name, CHOSEN], layers[key], "against_exits")
        for key, row in chosen.items()
    ]
    return pd.DataFrame(rows)


def claimed_products(matched: pd.DataFrame) -> pd.DataFrame:
    """Compare the original's factors and products with the measured ones, for one seed.

    Args:
        matched: the table that :func:`at_matched_quality` returns.

    Returns:
        Columns claim, claimed (NaN: no claim), and a speedup per key of ``MEASURES``; those of time
        with _low and _high.
    """
    timed = ("layer time", "total time")
    ends = {f"{m}_{end}": f"{MEASURES[m]}_{end}" for m in timed for end in ("low", "high")}
    values = matched.rename(columns={old: new for new, old in (MEASURES | ends).items()})
    values = values.set_index(["mode", "system"])[[*MEASURES, *ends]]
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
        [{"claim": name, "claimed": claimed, **row} for name, (claimed, row) in rows.items()]
    )


def verdict_table(matched: pd.DataFrame) -> pd.DataFrame:
    """Compare each system's chosen policy with exits alone.

    Args:
        matched: tables of :func:`at_matched_quality`, stacked over the seeds.

    Returns:
        Columns seed, system, matched_to, quality_loss, quality_loss_full_depth, speedup_flops,
        time_layers, against_exits with its interval, flops_over_time.
    """
    of_full = matched[matched["mode"] == FULL][["seed", "system", "quality_loss"]]
    table = matched[matched["mode"] == CHOSEN].merge(
        of_full, on=["seed", "system"], suffixes=("", "_full_depth")
    )
    table["flops_over_time"] = table["speedup_flops"] / table["time_layers"]
    columns = (
        "seed system matched_to quality_loss quality_loss_full_depth speedup_flops time_layers"
    )
    columns += " against_exits against_exits_low against_exits_high flops_over_time"
    return table[columns.split()]


def verdicts(table: pd.DataFrame, epsilon: float) -> str:
    """Write a Markdown list that says which systems are faster than exits alone, with reasons.

    Args:
        table: the table that :func:`verdict_table` returns.
        epsilon: the matched quality loss.
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
