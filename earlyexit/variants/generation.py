"""Generation for models whose layers keep no O(1) state: every new token runs its whole window again."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.exits import ExitPolicy
from earlyexit.model import EarlyExitLanguageModel


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
    policy = policy or ExitPolicy.static(model.n_layers, model.n_layers)
    ids, was_training = prompt, model.training
    exits = prompt.new_zeros(batch, 0)
    model.eval()
    try:
        for _ in range(n_new):
            logits, info = model(ids, use_early_exit=True, policy=policy)
            exits = info["exit_layers"]
            logits = logits[:, -1]
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = (logits / temperature).softmax(dim=-1)
                new = probabilities.multinomial(1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
    finally:
        model.train(was_training)
    return ids, exits
