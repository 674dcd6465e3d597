"""Policies → one tidy table: each is run for real and gets one row with its loss and three speedups.

A row says which criterion decides and by which setting it was made: fitted to an ``epsilon``, with a
given ``threshold``, cutting off after one ``exit_layer``, or a model of another ``depth``. The columns
of the other settings are NaN. Speedups are against the same weights at full depth: in layers, in FLOPs
(checks, propagation and heads counted) and in wall-clock time with a 90 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from torch import Tensor

from earlyexit.calibration.thresholds import Unreachable, fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost.parts import exit_costs, policy_flops
from earlyexit.cost.timing import interleaved_times, time_columns
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

SETTINGS = ("epsilon", "threshold", "exit_layer", "depth")

SPEEDUPS = (
    "speedup_layers",
    "speedup_flops",
    "speedup_time",
    "speedup_time_low",
    "speedup_time_high",
)
QUALITY = ("perplexity", "quality_loss", "tokens")
COLUMNS = ("criterion", *SETTINGS, *QUALITY, *SPEEDUPS, "exited_early")

ORACLE_POINTS = 400  # prices that an oracle's front is searched over


@dataclass(frozen=True)
class Candidate:
    """A policy, and how a table calls it.

    Attributes:
        criterion: its name in the table.
        setting: the one of ``SETTINGS`` that it was made by.
        value: of that setting.
        policy: what is run.
    """

    criterion: str
    setting: str
    value: float
    policy: ExitPolicy

    @property
    def key(self) -> dict[str, str | float]:
        """The columns that say which policy a row is of."""
        return {"criterion": self.criterion, self.setting: self.value}


def static_exits(n_layers: int) -> list[Candidate]:
    """All tokens leaving at one exit, for every exit but the last."""
    return [
        Candidate("static", "exit_layer", layer, ExitPolicy.static(layer, n_layers))
        for layer in range(n_layers - 1)
    ]


def original_thresholds(thresholds: Iterable[float], n_layers: int) -> list[Candidate]:
    """Maximum probability at one threshold for all exits, as the original runs it."""
    return [
        Candidate("original's threshold", "threshold", t, ExitPolicy.constant(t, n_layers))
        for t in thresholds
    ]


def fitted(
    model: EarlyExitModel,
    trace: ExitTrace,
    criteria: Iterable[str],
    epsilons: Sequence[float],
) -> list[Candidate]:
    """A policy per criterion and ε; left out where the criterion saves nothing within that ε.

    Args:
        trace: of the fit part.
    """
    found = []
    for criterion, epsilon in product(criteria, epsilons):
        with suppress(Unreachable):
            policy = fitted_policy(model, trace, criterion, epsilon)
            found.append(Candidate(criterion, "epsilon", epsilon, policy))
    return found


def fitted_policy(
    model: EarlyExitModel, trace: ExitTrace, criterion: str, epsilon: float
) -> ExitPolicy:
    """Thresholds per layer that save most FLOPs at a quality loss of at most ``epsilon``.

    Args:
        trace: of the fit part.

    Raises:
        Unreachable: only full depth keeps to ε.
    """
    return fit_policy(trace, criterion, epsilon, costs=exit_costs(model, criterion))


def nearest_policy(
    candidates: Iterable[Candidate], criterion: str, epsilon: float, n_layers: int
) -> ExitPolicy:
    """The policy of a criterion fitted to the ε nearest to ``epsilon``; full depth without any."""
    of_criterion = {c.value: c.policy for c in candidates if c.criterion == criterion}
    if not of_criterion:
        return ExitPolicy.static(n_layers, n_layers)
    return of_criterion[nearest(of_criterion, epsilon)]


def compare(
    model: EarlyExitModel,
    candidates: Sequence[Candidate],
    loaders: Mapping[str, Iterable],
    batch: tuple[Tensor, Tensor],
    repeats: int,
    shallow: Mapping[int, EarlyExitModel] | None = None,
) -> pd.DataFrame:
    """Run every candidate for real, compacted.

    Args:
        loaders: criterion of a policy → pairs of token ids and targets ``(B, N)`` that its quality is
            read on, against full depth on the same tokens. ``"depth"`` is for static exits and shallow
            models.
        batch: token ids and targets ``(B, N)`` that everything is timed on, in turn.
        repeats: timed runs of each.
        shallow: depth → a model of fewer layers, run at its own full depth.

    Returns:
        One row per candidate and shallow model, with ``COLUMNS``.
    """
    (x, y), shallow, evaluator = batch, shallow or {}, evaluator_of(model)
    runs = {c: lambda p=c.policy: model.nll(x, y, p) for c in candidates}
    runs |= {depth: lambda m=other: m.nll(x, y) for depth, other in shallow.items()}
    seconds = interleaved_times({None: lambda: model.nll(x, y)} | runs, x.device, repeats)
    distinct = {id(part): part for part in loaders.values()}
    full = {k: evaluator.evaluate_policy(part)["perplexity"] for k, part in distinct.items()}
    rows = [
        c.key
        | run_row(model, c.policy, part := loaders[c.policy.criterion], full[id(part)])
        | time_columns(seconds[None], seconds[c])
        for c in candidates
    ]
    part, whole = loaders["depth"], exit_costs(model, "depth")[-1]
    rows += [
        {"criterion": "shallow twin", "depth": depth}
        | run_row(other, None, part, full[id(part)])
        | time_columns(seconds[None], seconds[depth])
        | {
            "speedup_layers": model.n_layers / depth,
            "speedup_flops": whole / exit_costs(other, "depth")[-1],
        }
        for depth, other in shallow.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def oracle(model: EarlyExitModel, trace: ExitTrace, epsilons: Sequence[float]) -> pd.DataFrame:
    """Exits chosen with hindsight about the last layer's prediction, on the trace.

    This is no run, so there is no time, and no check among its FLOPs.

    Returns:
        One row per ε, with ``COLUMNS``.
    """
    front, whole = trace.oracle("kl", n_points=ORACLE_POINTS), exit_costs(model, "depth")
    rows = []
    for epsilon in epsilons:
        within = front[front["quality_loss"] <= epsilon]
        price = within.loc[within["speedup_layers"].idxmax(), "price"]
        exits = (np.arange(trace.n_layers) + price * trace.kl).argmin(axis=1)
        found = trace.read_out(exits)
        rows.append(
            found
            | {
                "criterion": "oracle (kl)",
                "epsilon": epsilon,
                "tokens": trace.n_tokens,
                "speedup_flops": whole[-1] / whole[exits].mean(),
                "exited_early": (exits < trace.n_layers - 1).mean(),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def real_runs(
    model: EarlyExitModel,
    policies: Mapping[str, ExitPolicy],
    traces: Mapping[str, ExitTrace],
    loaders: Mapping[str, Iterable],
) -> pd.DataFrame:
    """What the trace says of policies, beside compacted runs over the same tokens.

    Args:
        policies: criterion → policy; traces and loaders: criterion → the tokens it is read on.

    Returns:
        Columns criterion, tokens, then perplexity and speedup_layers, each as ``trace_`` and ``real_``.
    """
    rows = []
    for criterion, policy in policies.items():
        traced = traces[criterion].evaluate(policy)
        real = run_row(model, policy, loaders[criterion])
        row = {"criterion": criterion, "tokens": real["tokens"]}
        for name in ("perplexity", "speedup_layers"):
            row |= {f"trace_{name}": traced[name], f"real_{name}": real[name]}
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------- what rows are made of


def run_row(
    model: EarlyExitModel,
    policy: ExitPolicy | None,
    loader: Iterable,
    full_perplexity: float = math.nan,
) -> dict[str, float]:
    """What a policy does to quality, layers and FLOPs when it is run for real; None is full depth.

    Args:
        full_perplexity: of the same tokens at full depth, that ``quality_loss`` is against.

    Returns:
        perplexity, quality_loss, tokens, speedup_layers, speedup_flops, exited_early (share of the
        tokens) and avg_exit_layer.
    """
    real = evaluator_of(model).evaluate_policy(loader, policy)
    shares = np.array(real["exit_distribution"]) / 100
    return {
        "perplexity": real["perplexity"],
        "quality_loss": real["perplexity"] / full_perplexity - 1,
        "tokens": real["total_tokens"],
        "speedup_layers": real["speedup_estimate"],
        "speedup_flops": policy_flops(model, shares, policy)["speedup_flops"],
        "exited_early": 1 - shares[-2:].sum(),
        "avg_exit_layer": real["avg_exit_layer"],
    }


def run_rows(
    model: EarlyExitModel, policies: Iterable[ExitPolicy | None], loader: Iterable
) -> pd.DataFrame:
    """:func:`run_row` of each policy, on the same tokens and against full depth on them."""
    full = run_row(model, None, loader)["perplexity"]
    return pd.DataFrame([run_row(model, policy, loader, full) for policy in policies])


def evaluator_of(model: EarlyExitModel) -> EarlyExitEvaluator:
    """An evaluator on the device where the model is."""
    return EarlyExitEvaluator(model, next(model.parameters()).device)


# ---------------------------------------------------------------------------- tables of tables


def stack(tables: Mapping[Hashable, pd.DataFrame], *names: str) -> pd.DataFrame:
    """Tables below each other, with their keys as first columns.

    Args:
        tables: key, or tuple of keys, → table.
        names: of the key columns.
    """
    whole = pd.concat(tables, names=[*names, None])
    return whole.reset_index(level=list(range(len(names)))).reset_index(drop=True)


def nearest(values: Iterable[float], wanted: float) -> float:
    """The value that is nearest to ``wanted``.

    Raises:
        ValueError: there are no values.
    """
    return min(values, key=lambda value: abs(value - wanted))
