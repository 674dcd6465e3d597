"""What a run needs at its peak, measured in a child process and by the allocator's record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pandas as pd
import torch
from torch import Tensor

from earlyexit.evaluator import original_early_exit
from earlyexit.exits import ExitPolicy
from earlyexit.model import EarlyExitLanguageModel, ModelConfig
from earlyexit.timing import peak_rss_bytes, peak_tensor_bytes

MIB = 2**20
RETURNED, SCORED = "logits returned", "scored in chunks"
NONE_EARLY = "compacted, none early"  # the control: what is saved here, exits do not save


def executions(
    model: EarlyExitLanguageModel, x: Tensor, y: Tensor, policy: ExitPolicy, threshold: float
) -> dict[tuple[str, str], Callable[[], object]]:
    """(output, execution) → one forward pass; ``policy`` for ours, ``threshold`` for the original's."""
    exits = {"use_early_exit": True, "policy": policy}
    nobody = {
        "use_early_exit": True,
        "policy": ExitPolicy.static(model.n_layers - 1, model.n_layers),
    }
    return {
        (RETURNED, "full depth"): lambda: model(x),
        (RETURNED, "compacted"): lambda: model(x, **exits),
        (RETURNED, NONE_EARLY): lambda: model(x, **nobody),
        (RETURNED, "dense"): lambda: model(x, execution="dense", **exits),
        (RETURNED, "original's procedure"): lambda: original_early_exit(model, x, threshold),
        (SCORED, "full depth"): lambda: model.nll(x, y),
        (SCORED, "compacted"): lambda: model.nll(x, y, policy),
    }


@torch.no_grad()
def peak_memory(
    model: EarlyExitLanguageModel, x: Tensor, y: Tensor, policy: ExitPolicy, threshold: float
) -> pd.DataFrame:
    """Peak tensor memory of every execution on one batch.

    Returns:
        Columns output, execution, logits_mib (the B·N·V logits returned), rest_mib, peak_mib.
    """
    model.eval()
    rows = []
    for (output, execution), run in executions(model, x, y, policy, threshold).items():
        run()  # warm-up: libraries keep workspaces of their own
        peak = peak_tensor_bytes(run, x.device) / MIB
        logits = x.numel() * model.vocab_size * 4 / MIB if output == RETURNED else 0.0
        rows.append(
            {
                "output": output,
                "execution": execution,
                "logits_mib": logits,
                "rest_mib": peak - logits,
                "peak_mib": peak,
            }
        )
    return pd.DataFrame(rows)


def peak_resident(
    config: ModelConfig, batch: int, policy: ExitPolicy, threshold: float, key: tuple[str, str]
) -> float:
    """Peak resident memory (MiB) that one execution adds, in a process of its own (CPU).

    The child has random weights of ``config``: what is kept in memory does not depend on them, except
    through which tokens exit, so ``policy`` should be a static one.
    """
    return peak_rss_bytes(_child, asdict(config), batch, policy, threshold, key) / MIB


def _child(work: bool, config: dict, batch: int, policy: ExitPolicy, threshold: float, key) -> None:
    torch.manual_seed(0)
    model = EarlyExitLanguageModel(**config).eval()
    x = torch.randint(config["vocab_size"], (batch, config["n_seq"]))
    run = executions(model, x, x, policy, threshold)[key]
    with torch.no_grad():
        model.nll(x[:1, :8], x[:1, :8])  # loads every library the work needs
        if work:
            run()


def memory_parts(model: EarlyExitLanguageModel, batch: int) -> pd.DataFrame:
    """What the model must hold, in MiB: parameters, one residual stream, one batch of logits."""
    config = model.config
    embedding = model.token_embedding.weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    tokens = batch * config.n_seq
    parts = {
        "parameters: vocabulary": embedding,
        "parameters: the rest": parameters - embedding,
        "one residual stream": tokens * config.d_model,
        "logits of one batch": tokens * config.vocab_size,
    }
    return pd.DataFrame([{"part": k, "mib": 4 * v / MIB} for k, v in parts.items()])
