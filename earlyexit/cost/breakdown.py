"""Measure the time of each part of a layer and of a check, and of each part of whole runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.cost.parts import FULL_DEPTH, batch_speedups
from earlyexit.cost.timing import INTERVAL, interleaved_times, median_ms, time_columns
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.clock import PARTS, timed_parts
from earlyexit.exits.criteria import CRITERIA, Criterion
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel, exit_state
from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.borrowed import borrowed

ORIGINAL = "original's procedure"


def part_functions(
    model: ExitModel, x: Tensor, layer: int = 0
) -> dict[tuple[str, str], Callable[[], object]]:
    """Return calls by (group, part) that run only that part of ``layer`` on ``x`` ``(B, N)``.

    Groups are "whole" (the block), "block" (its parts), "check" (the decision by each criterion) and
    "head" (scoring, and all logits). ``layer`` must not be the last, where no exit is decided.

    Args:
        model: a model of plain ResNet-BK layers, which mix by BK-Core.
    """
    states = model.hidden_states(x)
    before, after = states[layer], states[layer + 1]
    bk: MoEResNetBKLayer = model.blocks[layer].bk_layer
    whole = model.normed(layer, before)
    given, u = model.contribution(layer, whole), whole.flatten(0, 1)
    features = bk.mix(u, given, None)
    mixed = u + bk.mixing.read(u, features)
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
        ("block", "contribution"): lambda: model.contribution(layer, whole),
        ("block", "BK-Core"): lambda: bk.mix(u, given, None),
        ("block", "projection"): lambda: u + bk.mixing.read(u, features),
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


def _decide(rule: Criterion, score: Tensor) -> list[int]:
    """Compare scores with a threshold and transfer the counts of exits and of NaN, as a check does."""
    passed = rule.passes(score, rule.bounds[0])
    return torch.stack([passed.sum(), torch.isnan(score).sum()]).tolist()


@torch.no_grad()
def part_times(model: ExitModel, x: Tensor, repeats: int) -> pd.DataFrame:
    """Measure the median time of every part, interleaved and with warm caches.

    Returns:
        Columns group, part, milliseconds, share_of_block (of the whole block's median).
    """
    with borrowed(model):
        seconds = interleaved_times(part_functions(model, x), x.device, repeats)
    rows = [(*key, taken) for key, taken in median_ms(seconds).items()]
    table = pd.DataFrame(rows, columns=["group", "part", "milliseconds"])
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
    """Return calls that score a batch ``(B, N)`` in each execution, by its name.

    Args:
        policy: the exits of compacted and of dense execution.
        original: the model that the original's procedure runs, with a plain matrix as its head.
        threshold: the maximum probability at which the original's procedure exits.
    """
    return {
        FULL_DEPTH: lambda: model.nll(x, y),
        "compacted": lambda: model.nll(x, y, policy),
        "dense": lambda: model.nll(x, y, policy, "dense"),
        ORIGINAL: lambda: original_early_exit(original, x, threshold),
    }


def compaction_speedups(
    model: EarlyExitModel, x: Tensor, policies: Mapping[float, ExitPolicy], repeats: int
) -> pd.DataFrame:
    """Measure three speedups of compacted execution of a batch ``(B, N)``, interleaved.

    Args:
        policies: mean depth → the policy by which tokens execute so many layers on average.

    Returns:
        Columns depth, speedup_layers, speedup_flops, speedup_time with its 90 % interval low to high.
    """
    runs = {FULL_DEPTH: partial(model.nll, x, x)}
    runs |= {depth: partial(model.nll, x, x, policy) for depth, policy in policies.items()}
    seconds = interleaved_times(runs, x.device, repeats)
    rows = [
        {"depth": depth}
        | batch_speedups(model, x, x, policy)
        | {"speedup_layers": model.n_layers / depth}
        | time_columns(seconds[FULL_DEPTH], seconds[depth], *INTERVAL)
        for depth, policy in policies.items()
    ]
    return pd.DataFrame(rows)


@torch.no_grad()
def run_times(
    runs: dict[Hashable, Callable[[], object]],
    device: torch.device,
    repeats: int,
    quantile: float = 0.5,
) -> pd.DataFrame:
    """Measure the parts of whole runs, and how far their sum is from the total.

    Every run is timed with a clock that is read at the boundaries of parts, and, interleaved with that,
    without it. The first gives the parts, the second the total that they should add up to.

    Args:
        runs: calls by name, as :func:`execution_runs` returns.
        quantile: the quantile over the repeats; by default the median.

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
    tables = []
    for name in runs:
        timed = pd.DataFrame(parts[name][1::2])  # the even entries are the untimed warm-ups
        table = pd.DataFrame({"run": name, "part": PARTS})
        table["milliseconds"] = 1e3 * timed.quantile(quantile)[list(PARTS)].to_numpy()
        table["total_ms"] = 1e3 * float(np.quantile(seconds[name], quantile))
        tables.append(table.assign(sum_ms=table["milliseconds"].sum()))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(gap=table["sum_ms"] / table["total_ms"] - 1)
