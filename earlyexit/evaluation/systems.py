"""Compare systems that combine ACT, several scales, a sparse BK-Core and exits, in the same units.

"Layers" are positions transformed per token: a layer at N/4 counts a quarter. Every speedup is against
the reference, a plain model of the same width at full depth without exit heads. FLOPs and time are
given twice: for the layers with all checks, and in total with the vocabulary projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE
from earlyexit.cost.parts import run_flops
from earlyexit.cost.synthetic import rule_threshold
from earlyexit.evaluation.evaluator import perplexity, run_batches
from earlyexit.evaluation.routing import kept_shares
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import exit_state
from earlyexit.exits.statistics import layers_executed
from earlyexit.training.systems import System

Batches = Sequence[tuple[Tensor, Tensor]]
Models = Mapping[str, EarlyExitModel]
FULL, ADAPTIVE, STATIC = "full depth", "adaptive", "static"  # kinds of policies
CHOSEN, CUT_OFF = "chosen", "cut off"  # modes at matched quality, beside full depth


@torch.no_grad()
def run_policy(
    model: EarlyExitModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    policy: ExitPolicy | None,
    kept: Sequence[float] = (),
) -> dict[str, float]:
    """Run a policy compacted over ``batches``; None is full depth without checks.

    Args:
        kept: share of positions that each sparse core visits, if it was measured.

    Returns:
        ``perplexity``, and per scored token ``layers`` (positions), ``mean_exit`` (layers run, at any
        scale), ``flops_layers`` (without the head) and ``flops_total``.
    """
    operations = model.operations()
    if len(kept):
        operations = replace(operations, kept=tuple(kept))
    nll, count, depth = 0.0, 0, 0.0
    positions = np.zeros(model.n_layers)
    for y, losses, exits in run_batches(model, batches, policy):
        scored = y != IGNORE
        nll += losses[scored].double().sum().item()
        count += int(scored.sum())
        exits = torch.where(scored, exits, -1)  # padding runs no layer
        positions += operations.run_positions(exits) * y.numel()
        depth += layers_executed(exits, model.n_layers).sum().item()
    positions /= count
    flops = run_flops(operations, positions, policy)
    return {
        "perplexity": perplexity(nll, count),
        "layers": float(positions.sum()),
        "mean_exit": depth / count,
        "flops_layers": flops["total"] - flops["head"],
        "flops_total": flops["total"],
    }


@torch.no_grad()
def quantile_policies(
    model: EarlyExitModel, x: Tensor, criterion: str, shares: Sequence[float]
) -> list[ExitPolicy]:
    """Return, per share, a policy with one threshold that about this share of scores at ``x`` passes.

    Scores at a bound of the criterion, as of tokens that have already halted, are not counted.
    """
    rule, scores = CRITERIA[criterion], []
    for layer, (before, after) in enumerate(pairwise(model.hidden_states(x)[:-1])):
        state = exit_state(model, layer, after.flatten(0, 1), before.flatten(0, 1))
        scores.append(rule.score(state))
    values, (low, high) = torch.cat(scores).double().cpu().numpy(), rule.bounds
    open_ones = values[(values > low) & (values < high)]
    values = open_ones if len(open_ones) else values
    cuts = (rule_threshold(rule, values, share) for share in shares)
    return [ExitPolicy.constant(cut, model.n_layers, criterion) for cut in cuts]


def sweep(
    model: EarlyExitModel,
    batches: Sequence[tuple[Tensor, Tensor]],
    policies: Sequence[ExitPolicy | None],
) -> pd.DataFrame:
    """Tabulate :func:`run_policy` of every policy; column ``threshold`` is NaN at full depth."""
    kept = kept_shares(model, batches[:1])
    rows = [
        {"threshold": p.thresholds[0] if p else math.nan} | run_policy(model, batches, p, kept)
        for p in policies
    ]
    return pd.DataFrame(rows)


def cheapest_within(curve: pd.DataFrame, limit: float) -> int | None:
    """Return the row of fewest layer FLOPs with a perplexity ≤ ``limit``, or None if there is none."""
    good = curve[curve["perplexity"] <= limit]
    return None if good.empty else int(good["flops_layers"].idxmin())


def choose(fit: pd.DataFrame, reference: float, epsilon: float) -> tuple[int, str]:
    """Choose the cheapest row within ``epsilon`` of the reference's perplexity, else of the best row's.

    Args:
        fit: a system's :func:`sweep` over the fit part.
        reference: the plain model's perplexity on the same part.

    Returns:
        The row, and whether it is matched to ``"the plain model"`` or to ``"itself"``.
    """
    row = cheapest_within(fit, (1 + epsilon) * reference)
    if row is not None:
        return row, "the plain model"
    return cheapest_within(fit, (1 + epsilon) * fit["perplexity"].min()), "itself"


def speedups(rows: pd.DataFrame, reference: pd.Series) -> pd.DataFrame:
    """Add the loss and the speedups against a reference row to ``rows`` of :func:`run_policy`.

    Returns:
        The rows with columns quality_loss, speedup_layers (positions), speedup_flops (of the layers)
        and speedup_flops_total added.
    """
    return rows.assign(
        quality_loss=rows["perplexity"] / reference["perplexity"] - 1,
        speedup_layers=reference["layers"] / rows["layers"],
        speedup_flops=reference["flops_layers"] / rows["flops_layers"],
        speedup_flops_total=reference["flops_total"] / rows["flops_total"],
    )


def candidate_policies(
    system: System, model: EarlyExitModel, x: Tensor, shares: Sequence[float]
) -> dict[str, list[ExitPolicy | None]]:
    """Return a system's policies by kind: full depth, one threshold per share, and static exits.

    A system without exits has full depth alone.

    Args:
        x: token ids ``(B, N)`` whose scores set the thresholds.
        shares: shares of these scores that pass each threshold.
    """
    if not system.exits:
        return {FULL: [None]}
    layers = range(model.n_layers - 1)
    return {
        FULL: [None],
        ADAPTIVE: quantile_policies(model, x, system.criterion, shares),
        STATIC: [ExitPolicy.static(k, model.n_layers) for k in layers],
    }
