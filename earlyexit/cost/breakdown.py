"""Where the time goes: the parts of a layer and of a check one by one, and the parts of whole runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.cost.parts import FULL_DEPTH
from earlyexit.cost.timing import interleaved_times
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.clock import PARTS, timed_parts
from earlyexit.exits.criteria import CRITERIA, Criterion
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel, exit_state
from earlyexit.nn.block import MoEResNetBKLayer

ORIGINAL = "original's procedure"


def part_functions(
    model: ExitModel, x: Tensor, layer: int = 0
) -> dict[tuple[str, str], Callable[[], object]]:
    """(group, part) → a call that runs just that part of ``layer`` on the batch ``x`` ``(B, N)``.

    Groups: "whole" (the block), "block" (its parts), "check" (deciding by each criterion), "head" (what
    scoring takes, and all logits). ``layer`` is not the last: nothing is decided there.

    Args:
        model: of plain ResNet-BK layers.
    """
    states = model.hidden_states(x)
    before, after = states[layer], states[layer + 1]
    bk: MoEResNetBKLayer = model.blocks[layer].bk_layer
    u = model.normed(layer, before)
    v = model.contribution(layer, u)
    features = bk.bk_core(v)
    mixed = u + scaled_projection(bk, features)
    head = model.head(model.n_layers - 1)
    flat = head.features(states[-1]).flatten(0, 1)
    state = exit_state(model, layer, after.flatten(0, 1), before.flatten(0, 1))

    def score(rule: Criterion) -> Tensor:
        if rule.reads == "logits":
            return rule.of_features(head.unembedding, flat)
        return rule.score(state)

    functions: dict[tuple[str, str], Callable[[], object]] = {
        ("whole", "block"): lambda: model.layer(layer, before),
        ("block", "layer norm"): lambda: model.normed(layer, before),
        ("block", "potentials"): lambda: model.contribution(layer, u),
        ("block", "BK-Core"): lambda: bk.bk_core(v),
        ("block", "projection"): lambda: u + scaled_projection(bk, features),
        ("block", "experts and router"): lambda: bk.moe(mixed),
        ("head", "scoring one word"): lambda: head.unembedding.nll(flat, x.flatten()),
        ("head", "logits of all words"): lambda: sum(
            len(logits) for _, logits in head.unembedding.chunks(flat)
        ),
    }
    gated = model.gates is not None and bool(model.gates.trained)
    for rule in CRITERIA.values():
        if rule.name != "depth" and (gated or not rule.needs_gates):
            functions["check", rule.label] = lambda rule=rule: _decide(rule, score(rule))
    return functions


def scaled_projection(layer: MoEResNetBKLayer, features: Tensor) -> Tensor:
    """BK features ``(…, 2H)`` → what they add to the stream ``(…, D)``, as the layer computes it."""
    project, scale = layer.output_proj, layer.bk_scale
    return F.linear(features, scale * project.weight, scale * project.bias)


def _decide(rule: Criterion, score: Tensor) -> list[int]:
    """What a check does with its scores: compare, and tell the host how many leave."""
    passed = rule.passes(score, rule.bounds[0])
    return torch.stack([passed.sum(), torch.isnan(score).sum()]).tolist()


@torch.no_grad()
def part_times(model: ExitModel, x: Tensor, repeats: int) -> pd.DataFrame:
    """Median time of every part with its own caches warm, interleaved.

    Returns:
        Columns group, part, milliseconds, share_of_block (of the whole block's median).
    """
    model.eval()
    seconds = interleaved_times(part_functions(model, x), x.device, repeats)
    table = pd.DataFrame(
        [
            {"group": group, "part": part, "milliseconds": 1e3 * float(np.median(taken))}
            for (group, part), taken in seconds.items()
        ]
    )
    whole = table.loc[table["group"] == "whole", "milliseconds"].item()
    return table.assign(share_of_block=table["milliseconds"] / whole)


def execution_runs(
    model: EarlyExitModel,
    x: Tensor,
    y: Tensor,
    policy: ExitPolicy,
    original: EarlyExitModel,
    threshold: float,
) -> dict[str, Callable[[], object]]:
    """Scoring a batch ``(B, N)`` in every way there is.

    Args:
        policy: for this project's executions.
        original: the model that the original's procedure runs; its head is a plain matrix there.
        threshold: of maximum probability, for the original's procedure.
    """
    return {
        FULL_DEPTH: lambda: model.nll(x, y),
        "compacted": lambda: model.nll(x, y, policy),
        "dense": lambda: model.nll(x, y, policy, "dense"),
        ORIGINAL: lambda: original_early_exit(original, x, threshold),
    }


@torch.no_grad()
def run_times(
    runs: dict[Hashable, Callable[[], object]],
    device: torch.device,
    repeats: int,
    quantile: float = 0.5,
) -> pd.DataFrame:
    """Where the time of whole runs goes, and whether the parts add up to it.

    Every run is timed with a clock that is read off at part boundaries and, in turn with that, as it
    is. The first gives the parts, the second the total they have to add up to.

    Args:
        runs: see :func:`execution_runs`.
        quantile: of the repeats, instead of their median.

    Returns:
        One row per run and part: run, part, milliseconds (quantile), total_ms (quantile, no clock
        running), sum_ms (of the parts), gap (sum_ms / total_ms − 1).
    """
    parts: dict[Hashable, list[dict[str, float]]] = {name: [] for name in runs}

    def clocked(name: Hashable) -> None:
        with timed_parts(device) as clock:
            runs[name]()
        parts[name].append(clock.seconds)

    clocks = {(name, "clock"): partial(clocked, name) for name in runs}
    seconds = interleaved_times(runs | clocks, device, repeats)
    rows = []
    for name in runs:
        timed = parts[name][1::2]  # before each of them one ran untimed
        typical = 1e3 * pd.DataFrame(timed).quantile(quantile)
        total = 1e3 * float(np.quantile(seconds[name], quantile))
        rows += [
            {
                "run": name,
                "part": part,
                "milliseconds": typical[part],
                "total_ms": total,
                "sum_ms": typical.sum(),
                "gap": typical.sum() / total - 1,
            }
            for part in PARTS
        ]
    return pd.DataFrame(rows)
