"""Compare batches of windows that have a similar predicted depth with random batches.

Dense execution runs until a batch's last token has exited. Compacted execution does not, so grouping
only makes the batches of its layers more even in size. The prediction costs one layer: it is the score
of the first exit, averaged over the window. For comparison, "hindsight" groups by the executed depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from earlyexit.cost.parts import FULL_DEPTH
from earlyexit.cost.timing import interleaved_times, median_ms
from earlyexit.exits.execution import decide
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel, exit_state
from earlyexit.exits.statistics import layers_executed

SMALLEST_POOL = 64  # the least number of windows that batches are drawn from
BATCHES = 2  # the least number in a pool; one batch alone could not be grouped


@torch.no_grad()
def predicted_difficulty(
    model: ExitModel, x: Tensor, policy: ExitPolicy, batch: int = 32
) -> np.ndarray:
    """Predict how deep each window will run, from its tokens' mean score at the first exit.

    Args:
        x: windows of token ids ``(W, N)``.
        policy: its criterion must not read logits.
        batch: number of windows that are run at a time.

    Returns:
        One number per window ``(W,)``, larger where deeper runs are expected. Only layer 0 is run.

    Raises:
        ValueError: the criterion reads logits, or the model has one layer.
    """
    if policy.rule.reads == "logits" or model.n_layers < 2:
        raise ValueError("a cheap prediction needs a criterion of the state, and a second layer")
    means = []
    for part in x.split(batch):
        before = model.embed(part)
        after = model.layer(0, before)
        state = exit_state(model, 0, after.flatten(0, 1), before.flatten(0, 1))
        means.append(policy.rule.score(state).view_as(part).double().mean(dim=1))
    score = torch.cat(means).cpu().numpy()
    return -score if policy.rule.exit_above else score


def executed_depth(model: ExitModel, x: Tensor, policy: ExitPolicy, batch: int = 32) -> np.ndarray:
    """Return the layers that every token ``(W, N)`` executes in a real run."""
    exits = torch.cat([decide(model, p, policy).exit_layers.view_as(p) for p in x.split(batch)])
    return layers_executed(exits, model.n_layers).cpu().numpy()


def batches(
    difficulty: np.ndarray | None, windows: int, size: int, seed: int = 0
) -> list[np.ndarray]:
    """Return the window indices of each batch, by rising ``difficulty``, or at random if it is None.

    Raises:
        ValueError: the size is below 1, or there is not one difficulty per window.
    """
    if size < 1:
        raise ValueError(f"batch size {size} must be at least 1")
    if difficulty is None:
        order = np.random.default_rng(seed).permutation(windows)
    elif len(difficulty) != windows:
        raise ValueError(f"{len(difficulty)} difficulties for {windows} windows")
    else:
        order = np.argsort(difficulty, kind="stable")
    return np.split(order, range(size, windows, size))


@torch.no_grad()
def throughput(
    model: ExitModel,
    x: Tensor,
    policy: ExitPolicy,
    batch_sizes: Sequence[int],
    repeats: int = 3,
) -> pd.DataFrame:
    """Measure tokens per second of layers and checks, without the output head, which all share.

    Args:
        x: windows ``(W, N)``; each batch size uses the first 64, or two batches if these are more.

    Returns:
        One row per batch, execution and grouping ("random", "first exit", "hindsight"; "" at full
        depth): tokens_per_second, layers_run (until a batch's last token has exited, mean over
        batches), speedup_time (wall-clock, against full depth at the same batch size), windows.
    """
    never, rows = ExitPolicy.static(model.n_layers, model.n_layers), []
    for size in tqdm(batch_sizes, desc="batch sizes", leave=False):
        pool = x[: max(SMALLEST_POOL, BATCHES * size)]
        depth = executed_depth(model, pool, policy)
        signals = {
            "random": None,
            "first exit": predicted_difficulty(model, pool, policy),
            "hindsight": depth.max(axis=1) + depth.mean(axis=1) / model.n_layers,
        }
        runs, slowest = {}, {"": float(model.n_layers)}
        for grouping, signal in signals.items():
            groups = batches(signal, len(pool), size)
            parts = [pool[torch.from_numpy(g).to(pool.device)] for g in groups]
            slowest[grouping] = float(np.mean([depth[g].max() for g in groups]))
            for execution in ("compacted", "dense"):
                runs[execution, grouping] = partial(_run_all, model, parts, policy, execution)
            if signal is None:
                runs[FULL_DEPTH, ""] = partial(_run_all, model, parts, never, "compacted")
        medians = median_ms(interleaved_times(runs, x.device, repeats))
        rows += [
            {
                "batch": size,
                "execution": execution,
                "grouping": grouping,
                "tokens_per_second": 1e3 * pool.numel() / median,
                "layers_run": slowest[grouping],
                "speedup_time": medians[FULL_DEPTH, ""] / median,
                "windows": len(pool),
            }
            for (execution, grouping), median in medians.items()
        ]
    return pd.DataFrame(rows)


def _run_all(model: ExitModel, parts: list[Tensor], policy: ExitPolicy, execution: str) -> None:
    for part in parts:
        decide(model, part, policy, execution)
