"""Generation for models whose layers keep no O(1) state: every new token runs its whole window again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from earlyexit.exits.execution import _state
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.readers import Reader
from earlyexit.exits.tally import _Tally

if TYPE_CHECKING:
    from earlyexit.models.resnet_bk import EarlyExitLanguageModel


@torch.no_grad()
def generate(
    model: EarlyExitLanguageModel,
    prompt: Tensor,
    n_new: int,
    policy: ExitPolicy | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue ``prompt`` ``(B, N)`` by ``n_new`` tokens, in O(1) state per layer.

    Args:
        policy: exit policy; None runs full depth.
        temperature: 0 takes the most probable token, otherwise samples.

    Returns:
        Token ids ``(B, N + n_new)``, and the exit layer of every token run ``(B, N + n_new − 1)``.

    Raises:
        ValueError: prompt and continuation exceed n_seq, a policy for another depth, logits that are
            not finite, or see ``embed``.
    """
    inputs = model.embed(prompt)
    batch, length = prompt.shape
    if length + n_new > model.n_seq + 1:
        raise ValueError(
            f"{length} + {n_new} tokens exceed n_seq={model.n_seq}: shorten prompt or n_new"
        )
    policy = policy or ExitPolicy.static(model.n_layers, model.n_layers)
    states: list[Tensor | None] = [None] * model.n_layers
    ids, exits, was_training = prompt, [], model.training
    model.eval()
    try:
        for position in range(length + n_new - 1):
            if position < length:
                h = inputs[:, position]
            else:
                h = model.token_embedding(ids[:, position])
                h = h + model.position_embedding.weight[position]
            progress = h.new_full((batch,), position / model.n_seq)
            tally = _Tally(model, progress, policy, Reader())
            _step(model, h, states, tally)
            run = tally.finish()
            exits.append(run.exit_layers)
            if position >= length - 1:
                ids = torch.cat([ids, _choose(run.outputs, temperature, generator)], dim=1)
    finally:
        model.train(was_training)
    return ids, torch.stack(exits, dim=1) if exits else ids.new_zeros(batch, 0)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite: the weights hold NaN or infinity")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return (logits / temperature).softmax(dim=-1).multinomial(1, generator=generator)


def _step(
    model: EarlyExitLanguageModel, h: Tensor, states: list[Tensor | None], tally: _Tally
) -> None:
    """One position ``(B, D)`` through all layers; exited rows only feed the recursion."""
    for layer, block in enumerate(model.blocks):
        alive = tally.alive
        u = block.layer_norm(h)
        v = block.bk_layer.potentials(u)
        states[layer], features = block.bk_layer.bk_core.step(states[layer], v)
        if len(alive):
            before = h[alive]
            after = before + block.bk_layer.transform(u[alive], features[alive])
            h = h.index_copy(0, alive, after)
            tally.leave(_state(model, layer, after, before))


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
    """What :func:`earlyexit.exits.generation.generate` returns, in O(N²): right for any causal model.

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
