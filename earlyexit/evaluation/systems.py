"""Quality, positions, FLOPs and time of any system, in the same units for all.

"Layers" are positions transformed per token: a layer at N/4 counts a quarter. Every speedup is against
the reference, a plain model of the same width at full depth without exit heads. FLOPs and time are
given twice: of the layers with all checks, and of everything, the vocabulary projection included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE
from earlyexit.cost.parts import (
    BLOCK,
    FINAL_HEAD,
    LAYER_NORM,
    PROPAGATION,
    check_flops,
    part_flops,
    total,
)
from earlyexit.evaluation.routing import kept_shares
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.act import ACTEarlyExitModel
from earlyexit.models.act_multi_scale import ACTMultiScaleExitModel
from earlyexit.models.multi_scale import MultiScaleLanguageModel, positions_run
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.training.systems import REFERENCE, System

SKIPPED = ("potentials", "BK-Core", "projection")  # what a sparse core saves at a skipped position


def layer_positions(model: EarlyExitLanguageModel) -> np.ndarray:
    """Positions per token of every layer at full depth ``(L,)``."""
    if isinstance(model, MultiScaleLanguageModel):
        return 0.5 ** np.array(model.levels)
    return np.ones(model.n_layers)


def run_positions(model: EarlyExitLanguageModel, exit_layers: Tensor) -> np.ndarray:
    """Positions per token that every layer transforms ``(L,)``, exits ``(B, N)`` as they were."""
    if isinstance(model, MultiScaleLanguageModel):
        return positions_run(model, exit_layers)
    layers = range(model.n_layers)
    return np.array([(exit_layers >= k).double().mean().item() for k in layers])


def flops(
    model: EarlyExitLanguageModel,
    positions: np.ndarray,
    early: float,
    criterion: str | None,
    kept: Sequence[float] = (),
) -> dict[str, float]:
    """FLOPs per token of a compacted run.

    Args:
        positions: as :func:`run_positions` gives.
        early: share of tokens that leave before the last layer.
        criterion: what is checked; None is full depth without checks.
        kept: share of positions that each sparse core visits.

    Returns:
        ``layers`` (blocks, propagation, pooling, halting and checks) and ``total`` (with the head).
    """
    c, parts, full = model.config, part_flops(model.config), layer_positions(model)
    d, out = c.d_model, 0.0
    for layer in range(model.n_layers):
        left = full[layer] - positions[layer]
        block, propagated = total(parts, BLOCK), total(parts, PROPAGATION)
        if len(kept):
            skip = 1 - kept[layer]
            block += 2 * d - skip * total(parts, SKIPPED)
            propagated += 2 * d - skip * total(parts, ("potentials", "BK-Core"))
        out += positions[layer] * block + left * propagated
    checked = positions[:-1]
    if isinstance(model, MultiScaleLanguageModel):
        for layer in range(1, model.n_layers):
            down = model.levels[layer] > model.levels[layer - 1]
            coarser = max(full[layer], full[layer - 1]) / 2
            run = full[layer] if down else coarser * positions[layer] / full[layer]
            out += run * (4 * d * d if down else 2 * d * d)
        out += early * 2 * d * d  # r of those who leave: at most one raise per token
    if isinstance(model, ACTEarlyExitModel | ACTMultiScaleExitModel):
        unit = (LAYER_NORM + 2 + 4) * d  # LayerNorm, w · h, two running sums
        out += checked.sum() * unit
    elif criterion is not None:
        out += checked.sum() * check_flops(c, criterion)
        if isinstance(model, MultiScaleLanguageModel):  # r of a block's first token, normalised
            climbs = np.array(model.levels[:-1])
            out += (checked * (LAYER_NORM * d + climbs * 2 * d * d)).sum()
    head = total(parts, FINAL_HEAD) + early * parts["translator"]
    return {"layers": out, "total": out + head}


@torch.no_grad()
def run_policy(
    model: EarlyExitLanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    policy: ExitPolicy | None,
    kept: Sequence[float] = (),
) -> dict[str, float]:
    """A compacted run over ``batches``; None is full depth without checks.

    Returns:
        ``perplexity``, ``layers`` (positions per token), ``mean_exit`` (layers run per token, each
        counting one), ``flops_layers`` and ``flops_total`` per token.
    """
    nll, count, tokens, early, depth = 0.0, 0, 0, 0.0, 0.0
    positions = np.zeros(model.n_layers)
    for x, y in batches:
        if policy is None:
            losses, exits = model.nll(x, y), torch.full_like(x, model.n_layers)
        else:
            losses, exits = model.nll(x, y, policy)
        scored = y != IGNORE
        nll += losses[scored].double().sum().item()
        count += int(scored.sum())
        tokens += x.numel()
        positions += run_positions(model, exits) * x.numel()
        early += (exits < model.n_layers - 1).sum().item()
        depth += (exits + 1).clamp_max(model.n_layers).sum().item()
    positions /= tokens
    criterion = policy.criterion if policy else None
    cost = flops(model, positions, early / tokens, criterion, kept)
    return {
        "perplexity": math.exp(nll / count),
        "layers": float(positions.sum()),
        "mean_exit": depth / tokens,
        "flops_layers": float(cost["layers"]),
        "flops_total": float(cost["total"]),
    }


@torch.no_grad()
def quantile_policies(
    model: EarlyExitLanguageModel, x: Tensor, criterion: str, shares: Sequence[float]
) -> list[ExitPolicy]:
    """One threshold for all exits per share: about that share of the scores at ``x`` passes it.

    Scores at a bound of the criterion (tokens that halted long ago) decide nothing and do not count.
    """
    rule, gates = CRITERIA[criterion], model.gates
    scores = []
    for layer, h in enumerate(model.hidden_states(x)[1:-1]):
        out = gates(layer, model.blocks[layer + 1].layer_norm(h.flatten(0, 1)))
        scores.append(out[:, 0].exp() if criterion == "gate" else out[:, 1].sigmoid())
    values, (low, high) = torch.cat(scores).double().cpu().numpy(), rule.bounds
    open_ones = values[(values > low) & (values < high)]
    values = open_ones if len(open_ones) else values
    cuts = np.quantile(values, [1 - s if rule.exit_above else s for s in shares])
    return [
        ExitPolicy.constant(float(np.clip(t, *rule.bounds)), model.n_layers, criterion)
        for t in cuts
    ]


def sweep(
    model: EarlyExitLanguageModel,
    batches: Sequence[tuple[Tensor, Tensor]],
    policies: Sequence[ExitPolicy | None],
) -> pd.DataFrame:
    """:func:`run_policy` of every policy; column ``threshold`` is NaN at full depth."""
    kept = kept_shares(model, batches[:1])
    rows = [
        {"threshold": p.thresholds[0] if p else math.nan} | run_policy(model, batches, p, kept)
        for p in policies
    ]
    return pd.DataFrame(rows)


def cheapest_within(curve: pd.DataFrame, limit: float) -> int | None:
    """Row of the fewest layer FLOPs with a perplexity ≤ ``limit``; None where there is none."""
    good = curve[curve["perplexity"] <= limit]
    return None if good.empty else int(good["flops_layers"].idxmin())


def choose(fit: pd.DataFrame, reference: float, tolerance: float) -> tuple[int, str]:
    """The cheapest row within ``tolerance`` of the reference's perplexity, or else of the best row.

    Args:
        fit: a system's :func:`sweep` over the fit part.
        reference: the plain model's perplexity on the same part.

    Returns:
        The row, and ``"the plain model"`` or ``"itself"``: what its quality is matched to.
    """
    row = cheapest_within(fit, (1 + tolerance) * reference)
    if row is not None:
        return row, "the plain model"
    return cheapest_within(fit, (1 + tolerance) * fit["perplexity"].min()), "itself"


def speedups(rows: pd.DataFrame, reference: pd.Series) -> pd.DataFrame:
    """``rows`` of :func:`run_policy` with what they save against a reference row.

    Returns:
        Also quality_loss, speedup_layers (positions), speedup_flops (of the layers) and
        speedup_flops_total.
    """
    return rows.assign(
        quality_loss=rows["perplexity"] / reference["perplexity"] - 1,
        speedup_layers=reference["layers"] / rows["layers"],
        speedup_flops=reference["flops_layers"] / rows["flops_layers"],
        speedup_flops_total=reference["flops_total"] / rows["flops_total"],
    )


def candidate_policies(
    system: System, model: EarlyExitLanguageModel, x: Tensor, shares: Sequence[float]
) -> dict[str, list[ExitPolicy | None]]:
    """What a system may do, by kind: full depth, a threshold per share of passing scores, one exit.

    Args:
        x: token ids ``(B, N)`` whose scores set the thresholds.
    """
    if system is REFERENCE:
        return {"full depth": [None]}
    layers = range(model.n_layers - 1)
    return {
        "full depth": [None],
        "adaptive": quantile_policies(model, x, system.criterion, shares),
        "static": [ExitPolicy.static(k, model.n_layers) for k in layers],
    }
