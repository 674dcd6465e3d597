"""Text is generated with exits: in O(1) state per layer where a model can, else by running again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from earlyexit.checked import real, whole
from earlyexit.exits.execution import DenseWalk, run
from earlyexit.exits.policy import ExitPolicy, check_policy
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.readers import Reader
from earlyexit.exits.tally import ExitRun, Tally
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.unembedding import finite_words

# Maps the ids so far and a position to the run of the tokens at that position, one per sequence.
NextRun = Callable[[Tensor, int], ExitRun]


@torch.no_grad()
def generate(
    model: ExitModel,
    prompt: Tensor,
    n_new: int,
    policy: ExitPolicy | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue ``prompt`` ``(B, N)`` by ``n_new`` tokens.

    Args:
        policy: None runs full depth.
        temperature: 0 takes the most probable token; otherwise a token is sampled.

    Returns:
        Token ids ``(B, N + n_new)``, and the exit layer of every token run ``(B, N + n_new − 1)``.

    Raises:
        ValueError: prompt and continuation exceed n_seq, ``n_new`` or the temperature is negative, the
            policy is for another depth, logits are not finite, or ``embed`` refuses the prompt.
    """
    model.embed(prompt)  # refuses what cannot be run
    batch, length = prompt.shape
    n_new, temperature = whole("n_new", n_new), real("temperature", temperature, least=0)
    if length + n_new > model.n_seq + 1:
        raise ValueError(
            f"{length} + {n_new} tokens exceed n_seq={model.n_seq}: shorten prompt or n_new"
        )
    policy = ExitPolicy.static(model.n_layers, model.n_layers) if policy is None else policy
    check_policy(policy, model.n_layers)
    ids, exits = prompt.long(), []
    next_run = _stepping(model, policy) if model.can_step else _running_again(model, policy)
    with borrowed(model):
        for position in range(length + n_new - 1):
            result = next_run(ids, position)
            exits.append(result.exit_layers)
            if position >= length - 1:
                ids = torch.cat([ids, _choose(result.outputs, temperature, generator)], dim=1)
    return ids, torch.stack(exits, dim=1) if exits else ids.new_zeros(batch, 0)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    word = finite_words(*logits.max(dim=-1, keepdim=True))
    if temperature == 0:
        return word
    return (logits / temperature).softmax(dim=-1).multinomial(1, generator=generator)


def _running_again(model: ExitModel, policy: ExitPolicy) -> NextRun:
    """At every position run all that precedes it, in O(N²): this is right for any causal model."""

    def next_run(ids: Tensor, position: int) -> ExitRun:
        x = ids[:, : position + 1]
        result = run(model, x, policy, Reader())
        last = slice(position, None, position + 1)  # the last token of each sequence
        return ExitRun(result.outputs[last], result.exit_layers[last], result.scores[last])

    return next_run


def _stepping(model: ExitModel, policy: ExitPolicy) -> NextRun:
    memories = [None] * model.n_layers

    def next_run(ids: Tensor, position: int) -> ExitRun:
        walk = StepWalk(model, ids[:, position : position + 1], position, memories)
        progress = torch.full((len(ids),), position / model.n_seq, device=ids.device)
        tally = Tally(model, walk, progress.to(walk.h.dtype), policy, Reader())
        for layer in range(model.n_layers):
            walk.advance(layer)  # also when all have left: the memory of deeper layers goes on
            tally.judge(layer)
        return tally.finish()

    return next_run


class StepWalk(DenseWalk):
    """This walk runs one position of every sequence; exited rows only feed deeper layers' memory.

    Args:
        x: token ids ``(B, 1)`` at ``position``.
        memories: what :meth:`ExitModel.step` keeps of each layer; changed in place.
    """

    def __init__(self, model: ExitModel, x: Tensor, position: int, memories: list):
        self.model, self.memories = model, memories
        self.h = model.embed(x, start=position).squeeze(1)
        self.given: Tensor | None = None
        self.alive = torch.arange(len(x), device=x.device)

    def advance(self, layer: int) -> None:
        model, alive = self.model, self.alive
        u = model.normed(layer, self.h)
        given = handed = model.contribution(layer, u)
        if self.given is not None:
            exited = self.exited()[:, None]
            handed = torch.where(exited, model.handed_on(given, self.given), given)
            given = torch.where(exited, self.given, given)
        self.given = given
        mixed, self.memories[layer] = model.step(layer, u, handed, self.memories[layer])
        if len(alive):
            self.before = self.h[alive]
            self.after = model.update(layer, self.before, u[alive], mixed[alive])
            self.h = self.h.index_copy(0, alive, self.after)
