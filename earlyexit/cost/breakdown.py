"""Where the time goes: the parts of a layer and of a check one by one, and the parts of whole runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.cost.timing import interleaved_times
from earlyexit.cost.work import FULL_DEPTH
from earlyexit.exits.clock import PARTS, timed_parts
from earlyexit.exits.criteria import CRITERIA, Criterion, ExitState
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.block import MoEResNetBKLayer

ORIGINAL = "original's procedure"


def part_functions(
    model: EarlyExitLanguageModel, x: Tensor, layer: int = 0
) -> dict[tuple[str, str], Callable[[], object]]:
    """(group, part) → a call that runs just that part of ``layer`` on the batch ``x`` ``(B, N)``.

    Groups: "whole" (the block), "block" (its parts), "check" (deciding by each criterion), "head" (what
    scoring takes, and all logits). ``layer`` is not the last: nothing is decided there.
    """
    states = model.hidden_states(x)
    block, before, after = model.blocks[layer], states[layer], states[layer + 1]
    bk = block.bk_layer
    u = block.layer_norm(before)
    v = bk.potentials(u)
    features = bk.bk_core(v)
    mixed = u + scaled_projection(bk, features)
    head = model.blocks[-1].exit_classifier
    flat = head.features(states[-1]).flatten(0, 1)
    normalised = model.blocks[layer + 1].layer_norm(after).flatten(0, 1)
    state = ExitState(layer, after.flatten(0, 1), before.flatten(0, 1), normalised, model.gates)

    def project() -> None:
        for _ in head.unembedding.chunks(flat):
            pass

    functions: dict[tuple[str, str], Callable[[], object]] = {
        ("whole", "block"): lambda: block.hidden(before),
        ("block", "layer norm"): lambda: block.layer_norm(before),
        ("block", "potentials"): lambda: bk.potentials(u),
        ("block", "BK-Core"): lambda: bk.bk_core(v),
        ("block", "projection"): lambda: u + scaled_projection(bk, features),
        ("block", "experts and router"): lambda: bk.moe(mixed),
        ("head", "scoring one word"): lambda: head.unembedding.nll(flat, x.flatten()),
        ("head", "logits of all words"): project,
    }
    gated = model.gates is not None and bool(model.gates.trained)
    for name, rule in CRITERIA.items():
        if name == "depth" or (name in ("gate", "agreement") and not gated):
            continue
        if rule.reads == "logits":
            check = lambda rule=rule: _decide(rule, rule.of_features(head.unembedding, flat))  # noqa: E731
        else:
            check = lambda rule=rule: _decide(rule, rule.score(state))  # noqa: E731
        functions["check", rule.label] = check
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
def part_times(model: EarlyExitLanguageModel, x: Tensor, repeats: int) -> pd.DataFrame:
    """Median time of every part with its own caches warm, interleaved.

    Returns:
        Columns group, part, milliseconds, share_of_block (of the whole block's median).
    """
    model.eval()
    functions = part_functions(model, x)
    names = {" / ".join(key): key for key in functions}
    seconds = interleaved_times(
        {name: functions[key] for name, key in names.items()}, x.device, repeats
    )
    medians = {key: float(pd.Series(seconds[name]).median()) for name, key in names.items()}
    whole = medians["whole", "block"]
    return pd.DataFrame(
        [
            {
                "group": group,
                "part": part,
                "milliseconds": 1e3 * median,
                "share_of_block": median / whole,
            }
            for (group, part), median in medians.items()
        ]
    )


def execution_runs(
    model: EarlyExitLanguageModel,
    x: Tensor,
    y: Tensor,
    policy: ExitPolicy,
    original: EarlyExitLanguageModel,
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
    model: EarlyExitLanguageModel, runs: dict[str, Callable[[], object]], repeats: int
) -> pd.DataFrame:
    """Where the time of whole runs goes, and whether the parts add up to it.

    Every run is timed with a clock that is read off at part boundaries and, in turn with that, as it
    is. The first gives the parts, the second the total they have to add up to.

    Args:
        runs: see :func:`execution_runs`.

    Returns:
        One row per run and part: run, part, milliseconds (median), total_ms (median, no clock
        running), sum_ms (of the parts), gap (sum_ms / total_ms − 1).
    """
    return timed_runs({name: (model, run) for name, run in runs.items()}, {FULL_DEPTH}, repeats)


def timed_runs(
    runs: dict[str, tuple[EarlyExitLanguageModel, Callable[[], object]]],
    plain: Collection[str],
    repeats: int,
    quantile: float = 0.5,
) -> pd.DataFrame:
    """:func:`run_times` of runs that may have different models, all taken in turn.

    Args:
        plain: names of runs at full depth without exits.
        quantile: of the repeats, instead of their median.
    """
    device = next(next(iter(runs.values()))[0].parameters()).device
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    timed = {name: run for name, (_, run) in runs.items()}
    for name, (model, run) in runs.items():
        timed[f"{name}, clock"] = partial(_clocked, model, run, name in plain, parts[name])
    seconds = interleaved_times(timed, device, repeats)
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


def _clocked(model: EarlyExitLanguageModel, run: Callable, plain: bool, parts: list) -> None:
    """Run under a clock and keep its parts.

    Runs with exits mark their parts themselves. The plain forward, which knows nothing of parts, is
    marked where it enters the first block and the final head.
    """
    first, head = model.blocks[0].layer_norm, model.blocks[-1].exit_classifier.layer_norm
    with timed_parts(next(model.parameters()).device) as clock:
        hooks = []
        if plain:
            hooks.append(first.register_forward_pre_hook(lambda *_: clock.mark("rest")))
            hooks.append(head.register_forward_pre_hook(lambda *_: clock.mark("blocks")))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        if hooks:
            clock.mark("head")
    parts.append(clock.seconds)
