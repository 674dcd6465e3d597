"""Generation for models whose layers keep no O(1) state: every new token runs its whole window again."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.exits import ExitPolicy
from earlyexit.model import EarlyExitLanguageModel

STATISTICS = ("avg_exit_layer", "exit_layer_counts")


@torch.no_grad()
def generate_by_rerunning(
    model: EarlyExitLanguageModel,
    prompt: Tensor,
    n_new: int,
    policy: ExitPolicy | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`earlyexit.execution.generate` returns, in O(N²): right for any causal model.

    Raises:
        ValueError: prompt and continuation exceed n_seq, or see ``embed``.
    """
    batch, length = prompt.shape
    if length + n_new > model.n_seq + 1:
        raise ValueError(
            f"{length} + {n_new} tokens exceed n_seq={model.n_seq}: shorten prompt or n_new"
        )
    ids, exits = prompt, prompt.new_full((batch, max(0, length + n_new - 1)), model.n_layers)
    was_training = model.training
    kept = {name: getattr(model, name).clone() for name in STATISTICS}
    model.eval()
    try:
        for _ in range(n_new):
            if policy is None:
                logits = model(ids)[:, -1]
            else:
                logits, info = model(ids, use_early_exit=True, policy=policy)
                logits, exits = logits[:, -1], info["exit_layers"]
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = (logits / temperature).softmax(dim=-1)
                new = probabilities.multinomial(1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
    finally:
        model.train(was_training)
        for name, value in kept.items():  # a token that ran many times would count many times
            getattr(model, name).copy_(value)
    return ids, exits
