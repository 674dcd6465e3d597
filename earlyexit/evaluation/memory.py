"""Peak memory over the batch, over the length, and of whole processes, as tidy tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from earlyexit.cost.memory import peak_memory, peak_resident
from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
)
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn.config import ModelConfig


def memory_over_batches(
    model: EarlyExitModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    policy: ExitPolicy,
    threshold: float,
) -> pd.DataFrame:
    """Peak tensor memory of every execution on batches of different sizes.

    Args:
        batches: token ids and targets ``(B, N)``, one batch per size.
        policy: of this project's executions; threshold: of the original's procedure.

    Returns:
        As :func:`earlyexit.cost.memory.peak_memory`, with a column batch (windows).
    """
    parts = [peak_memory(model, x, y, policy, threshold).assign(batch=len(x)) for x, y in batches]
    return pd.concat(parts, ignore_index=True)


def memory_over_lengths(
    config: ModelConfig, lengths: Sequence[int], device: torch.device
) -> pd.DataFrame:
    """Peak tensor memory of every execution on one window of each length.

    Weights are random and exits constructed: half of the layers are executed on average.

    Args:
        config: of the model; its ``n_seq`` is replaced.

    Returns:
        As :func:`earlyexit.cost.memory.peak_memory`, with a column length (tokens).
    """
    shares, parts = geometric_shares(config.n_layers, (config.n_layers + 1) / 2), []
    for length in lengths:
        longer = replace(config, n_seq=length)
        model, x = random_model(longer).to(device), random_tokens(longer, 1, length).to(device)
        policy = policy_for_shares(model, x, shares)
        threshold = policy_for_shares(model, x, shares, "max_probability").thresholds[0]
        parts.append(peak_memory(model, x, x, policy, threshold).assign(length=length))
    return pd.concat(parts, ignore_index=True)


def resident_memory(
    config: ModelConfig,
    windows: int,
    policy: ExitPolicy,
    threshold: float,
    keys: Iterable[tuple[str, str]],
) -> pd.DataFrame:
    """How much the peak resident memory of a process grows, one process per execution (CPU).

    Args:
        windows: in the batch.
        policy: should be static, see :func:`earlyexit.cost.memory.peak_resident`.
        keys: pairs (output, execution), of ``earlyexit.cost.memory.executions``.

    Returns:
        Columns output, execution, resident_mib.
    """
    grown: Mapping[tuple[str, str], float] = {
        key: peak_resident(config, windows, policy, threshold, key) for key in keys
    }
    return pd.DataFrame(
        [
            {"output": output, "execution": execution, "resident_mib": mib}
            for (output, execution), mib in grown.items()
        ]
    )
