"""Run policies for real and write one tidy table, with the loss and three speedups of each.

A row names the criterion and the setting that its policy was made by: an ``epsilon`` it was fitted to, a
given ``threshold``, the one ``exit_layer`` of all tokens, or the ``depth`` of another model. The columns
of the other settings are NaN. Speedups are against the same weights at full depth: in layers, in FLOPs
(including checks, propagation and heads) and in wall-clock time with a 90 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
from torch import Tensor

from earlyexit.calibration.bounds import seed_interval
from earlyexit.calibration.stopping import fit_stopping_policy
from earlyexit.calibration.thresholds import Unreachable, fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.splits import Split
from earlyexit.cost.parts import exit_costs, policy_costs, policy_flops, stopping_costs
from earlyexit.cost.timing import interleaved_times, time_columns
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy

SETTINGS = ("epsilon", "threshold", "exit_layer", "depth")

SPEEDUPS = (
    "speedup_layers",
    "speedup_flops",
    "speedup_time",
    "speedup_time_low",
    "speedup_time_high",
)
QUALITY = ("perplexity", "quality_loss", "twin_loss", "tokens")
COLUMNS = ("criterion", *SETTINGS, *QUALITY, *SPEEDUPS, "exited_early")
ORACLE_POINTS = 400  # number of prices that the oracle's front is searched over


@dataclass(frozen=True)
class Candidate:
    """A candidate is a policy with the columns that identify it in a table.

    Attributes:
        criterion: the name of its criterion in the table.
        setting: the one of ``SETTINGS`` that it was made by.
        value: the value of that setting.
        policy: the policy that is run.
    """

    criterion: str
    setting: str
    value: float
    policy: ExitPolicy

    @property
    def key(self) -> dict[str, str | float]:
        """Return the columns that identify the policy of a row."""
        return {"criterion": self.criterion, self.setting: self.value}


def static_exits(n_layers: int) -> list[Candidate]:
    """Return a policy for every exit but the last, by which all tokens leave there."""
    return [
        Candidate("static", "exit_layer", layer, ExitPolicy.static(layer, n_layers))
        for layer in range(n_layers - 1)
    ]


def original_thresholds(thresholds: Iterable[float], n_layers: int) -> list[Candidate]:
    """Return policies that exit by maximum probability at one threshold, as the original does."""
    return [
        Candidate("original's threshold", "threshold", t, ExitPolicy.constant(t, n_layers))
        for t in thresholds
    ]


def fitted(
    model: EarlyExitModel,
    trace: ExitTrace,
    criteria: Iterable[str],
    epsilons: Sequence[float],
    fit: Callable[..., ExitPolicy] | None = None,
) -> list[Candidate]:
    """Return a policy per criterion and ε, without those whose criterion saves nothing within ε.

    Args:
        trace: trace of the fit part.
        fit: :func:`fitted_policy`, the default, :func:`stopping_policy`, or :func:`policy_within`,
            which leaves out none.
    """
    found = []
    for criterion, epsilon in product(criteria, epsilons):
        with suppress(Unreachable):
            policy = (fit or fitted_policy)(model, trace, criterion, epsilon)
            found.append(Candidate(criterion, "epsilon", epsilon, policy))
    return found


def fitted_policy(
    model: EarlyExitModel, trace: ExitTrace, criterion: str, epsilon: float
) -> ExitPolicy:
    """Fit thresholds per layer that save most FLOPs at a quality loss of at most ``epsilon``.

    Args:
        trace: trace of the fit part.

    Raises:
        Unreachable: only full depth stays within ε.
    """
    return fit_policy(trace, criterion, epsilon, costs=policy_costs(model, criterion))


def stopping_policy(
    model: EarlyExitModel, trace: ExitTrace, criterion: str, epsilon: float
) -> ExitPolicy:
    """Fit as :func:`fitted_policy`, and decide after which layer a run stops.

    Args:
        trace: trace of the fit part.

    Raises:
        Unreachable: only full depth stays within ε.
    """
    return fit_stopping_policy(trace, criterion, epsilon, stopping_costs(model, criterion))


def policy_within(
    model: EarlyExitModel, trace: ExitTrace, criterion: str, epsilon: float
) -> ExitPolicy:
    """Return :func:`stopping_policy`, or one by which no token leaves where none saves within ε."""
    try:
        return stopping_policy(model, trace, criterion, epsilon)
    except Unreachable:
        return ExitPolicy.constant(CRITERIA[criterion].never, model.n_layers, criterion)


def nearest_policy(
    candidates: Iterable[Candidate], criterion: str, epsilon: float, n_layers: int
) -> ExitPolicy:
    """Return a criterion's policy for the ε nearest to ``epsilon``, or full depth if it has none."""
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
    alone: Mapping[int, float] | None = None,
) -> pd.DataFrame:
    """Run every candidate in compacted execution and tabulate the results.

    Models trained alone stand beside them. Their weights are not needed: how long a model takes depends
    on its sizes, so models of their depths with new weights are timed.

    Args:
        loaders: criterion of a policy → pairs of token ids and targets ``(B, N)`` on which its quality
            is compared with full depth. ``"depth"`` is for static exits.
        batch: token ids and targets ``(B, N)`` on which all runs are timed, interleaved.
        repeats: number of timed runs of each.
        alone: depth → perplexity of a model trained alone, over the tokens of ``loaders["depth"]``.

    Returns:
        One row per candidate and model trained alone, with ``COLUMNS``. ``twin_loss`` is against the
        model trained alone that is as deep; NaN without one, or over other tokens.
    """
    (x, y), alone, evaluator = batch, alone or {}, evaluator_of(model)
    others = {depth: of_depth(model, depth) for depth in alone}
    runs = {c: lambda p=c.policy: model.nll(x, y, p) for c in candidates}
    runs |= {depth: lambda m=other: m.nll(x, y) for depth, other in others.items()}
    seconds = interleaved_times({None: lambda: model.nll(x, y)} | runs, x.device, repeats)
    distinct = {id(part): part for part in loaders.values()}
    full = {k: evaluator.evaluate_policy(part) for k, part in distinct.items()}
    rows = [
        c.key
        | run_row(
            model, c.policy, part := loaders[c.policy.criterion], full[id(part)]["perplexity"]
        )
        | time_columns(seconds[None], seconds[c])
        for c in candidates
    ]
    cost, whole = exit_costs(model, "depth")[-1], full[id(loaders["depth"])]
    rows += [
        {
            "criterion": "trained alone",
            "depth": depth,
            "perplexity": alone[depth],
            "exited_early": 0.0,
        }
        | {"quality_loss": alone[depth] / whole["perplexity"] - 1, "tokens": whole["total_tokens"]}
        | time_columns(seconds[None], seconds[depth])
        | {
            "speedup_layers": model.n_layers / depth,
            "speedup_flops": cost / exit_costs(other, "depth")[-1],
        }
        for depth, other in others.items()
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    same = table["tokens"] == whole["total_tokens"]
    twin = alone.get(model.n_layers, math.nan)
    return table.assign(twin_loss=(table["perplexity"] / twin - 1).where(same))


def of_depth(model: EarlyExitModel, depth: int) -> EarlyExitModel:
    """Return a model without gates, with new weights, that differs from ``model`` in depth."""
    config = replace(model.config, n_layers=depth, gate_hidden=None)
    return type(model).from_config(config).to(next(model.parameters()).device).eval()


def oracle(
    model: EarlyExitModel, trace: ExitTrace, epsilons: Sequence[float], loss: str = "kl"
) -> pd.DataFrame:
    """Choose exits by hindsight, on the trace.

    Nothing is run, so the table has no time, and its FLOPs contain no checks.

    Args:
        loss: what hindsight knows, ``"kl"``: the last layer's prediction, or ``"nll"``: the target.

    Returns:
        One row per ε, with ``COLUMNS``.
    """
    front, whole = trace.oracle(loss, n_points=ORACLE_POINTS), exit_costs(model, "depth")
    harm, rows = trace.kl if loss == "kl" else trace.nll, []
    for epsilon in epsilons:
        within = front[front["quality_loss"] <= epsilon]
        price = within.loc[within["speedup_layers"].idxmax(), "price"]
        exits = (np.arange(trace.n_layers) + price * harm).argmin(axis=1)
        rows.append(
            trace.read_out(exits)
            | {
                "criterion": f"oracle ({loss})",
                "epsilon": epsilon,
                "tokens": trace.n_tokens,
                "speedup_flops": whole[-1] / whole[exits].mean(),
                "exited_early": (exits < trace.n_layers - 1).mean(),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def bits_per_character(table: pd.DataFrame, split: Split) -> pd.Series:
    """Return each row's bits per character of words; NaN for rows over a part of the split.

    Args:
        table: columns perplexity, tokens.
    """
    bits = np.log2(table["perplexity"]) * split.n_tokens / split.n_characters
    return bits.where(table["tokens"] == split.n_tokens)


def real_runs(
    model: EarlyExitModel,
    policies: Mapping[str, ExitPolicy],
    traces: Mapping[str, ExitTrace],
    loaders: Mapping[str, Iterable],
) -> pd.DataFrame:
    """Compare the trace's estimate for each policy with a compacted run over the same tokens.

    Args:
        policies: criterion → policy.
        traces, loaders: criterion → the tokens that the policy is evaluated on.

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


# ---------------------------------------------------------------------------- rows


def run_row(
    model: EarlyExitModel,
    policy: ExitPolicy | None,
    loader: Iterable,
    full_perplexity: float = math.nan,
) -> dict[str, float]:
    """Measure quality, layers and FLOPs of a policy in a real run; None is full depth.

    Args:
        full_perplexity: perplexity of the same tokens at full depth, for ``quality_loss``.

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
    """Tabulate :func:`run_row` of each policy, with its loss against full depth on the same tokens."""
    full = run_row(model, None, loader)["perplexity"]
    return pd.DataFrame([run_row(model, policy, loader, full) for policy in policies])


def evaluator_of(model: EarlyExitModel) -> EarlyExitEvaluator:
    """Return an evaluator that runs on the model's device."""
    return EarlyExitEvaluator(model, next(model.parameters()).device)


# ---------------------------------------------------------------------------- stacked tables


def stack(tables: Mapping[Hashable, pd.DataFrame], *names: str) -> pd.DataFrame:
    """Stack tables below each other, with their keys as the first columns.

    Args:
        tables: key, or tuple of keys, → table.
        names: names of the key columns.
    """
    whole = pd.concat(tables, names=[*names, None])
    return whole.reset_index(level=list(range(len(names)))).reset_index(drop=True)


def over_seeds(table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Summarise a table of several seeds, each of which counts once.

    Args:
        table: stacked by seed, with a column seed.
        by: columns whose values are compared over the seeds.
        columns: columns that are summarised; NaN are left out.

    Returns:
        Columns ``by``, quantity, seeds, mean, low and high (95 % t interval over the seeds, NaN for
        one), least and largest (the range).
    """
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        for name in columns:
            values = group.groupby("seed")[name].mean().dropna()
            if values.empty:
                continue
            mean, low, high = seed_interval(values.to_numpy())
            found = {"seeds": len(values), "mean": mean, "low": low, "high": high}
            ends = {"least": values.min(), "largest": values.max()}
            rows.append(dict(zip(by, key, strict=True)) | {"quantity": name} | found | ends)
    return pd.DataFrame(rows)


def span(values: pd.Series, form: str = ".2f") -> str:
    """Format the mean over seeds, and the range, the least and the largest value, if they differ."""
    mean, ends = f"{values.mean():{form}}", [f"{v:{form}}" for v in (values.min(), values.max())]
    return mean if ends[0] == ends[1] else f"{mean} [{ends[0]}, {ends[1]}]"


def nearest(values: Iterable[float], wanted: float) -> float:
    """Return the value that is nearest to ``wanted``.

    Raises:
        ValueError: there are no values.
    """
    return min(values, key=lambda value: abs(value - wanted))
