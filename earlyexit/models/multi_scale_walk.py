"""Running a model of several scales with exits, two ways with one answer.

As :mod:`earlyexit.exits.execution`, for layers that work on blocks of tokens: blocks leave by the
score of their first token, and a layer's experts see the blocks in which somebody is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.exits.criteria import ExitState
from earlyexit.exits.execution import Execution
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.readers import Reader
from earlyexit.exits.tally import ExitRun

if TYPE_CHECKING:
    from earlyexit.models.multi_scale import MultiScaleLanguageModel
    from earlyexit.nn.heads import ExitHead


def _choose(alive: Tensor | None, level: int, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where a block of the level ``(B, N', D)`` has a token left, else ``old``."""
    return new if alive is None else torch.where(any_left(alive, level)[..., None], new, old)


def any_left(tokens: Tensor, level: int) -> Tensor:
    """Which blocks of a level hold a marked token: ``(B, N)`` → ``(B, ⌈N / 2^level⌉)``."""
    size = 2**level
    padded = F.pad(tokens, (0, -tokens.shape[1] % size))
    return padded.view(len(tokens), -1, size).any(dim=-1)


def first_rows(tokens: Tensor, length: int, size: int) -> Tensor:
    """Row, among sorted flat token ids ``(T,)``, of the first token of each token's block."""
    position = tokens % length
    return torch.searchsorted(tokens, tokens - position % size)


def run(
    model: MultiScaleLanguageModel,
    x: Tensor,
    policy: ExitPolicy,
    read: Reader,
    execution: Execution = "compacted",
) -> ExitRun:
    """See :func:`earlyexit.exits.execution.run`; blocks leave by the score of their first token.

    A criterion that reads logits pays for its check apart from the prediction.
    """
    if execution not in ("compacted", "dense"):
        raise ValueError(f"execution={execution!r} must be 'compacted' or 'dense'")
    if len(policy.thresholds) != model.n_layers:
        raise ValueError(
            f"the policy has {len(policy.thresholds)} thresholds, the model {model.n_layers} layers"
        )
    exits = _Exits(model, x, policy)
    if execution == "dense":
        walk, alive = model.walk(x), None
        for layer in range(model.n_layers):
            r = walk.send(alive).flatten(0, 1)
            alive = exits.leave(layer, lambda tokens, r=r: r[tokens])
    else:
        _compacted(model, x, exits)
    return exits.finish(read)


class _Exits:
    """Who is still there, who left where, and with which features."""

    def __init__(self, model: MultiScaleLanguageModel, x: Tensor, policy: ExitPolicy):
        self.model, self.policy, self.shape = model, policy, x.shape
        self.alive = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
        self.progress = torch.arange(x.shape[1], device=x.device).repeat(len(x)) / model.n_seq
        self.exit_layers = torch.full_like(x.flatten(), model.n_layers)
        weight = model.token_embedding.weight
        self.scores = weight.new_full((x.numel(),), torch.nan)
        self.reading, self.streak = self.scores.clone(), torch.zeros_like(self.scores)
        # Only some criteria and models look at a token's earlier reads.
        self.keeps = model.needs_all or policy.rule.streak or policy.criterion == "saturation"
        self.carried = model.start(model.embed(x)).flatten(0, 1) if self.keeps else None
        self.left: tuple[Tensor, Tensor] | None = None  # who left at the last exit, and their r
        self.waiting: list[tuple[ExitHead, Tensor, Tensor]] = []

    def leave(self, layer: int, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Judge blocks by their first token; returns who is still there ``(B, N)``.

        Args:
            read: flat token ids ``(T,)``, sorted → their r ``(T, D)``.
        """
        model, policy, rule, N = self.model, self.policy, self.policy.rule, self.shape[1]
        size, last = model.block_size(layer), layer == model.n_layers - 1
        judge = policy.checks(layer)
        alive = self.alive.nonzero().squeeze(1)
        first = (alive - alive % N % size).unique_consecutive() if len(alive) else alive
        state = None
        if self.keeps:  # everyone in a block of the largest size that has somebody left
            near = any_left(self.alive.view(self.shape), max(model.levels))
            near = near.repeat_interleave(2 ** max(model.levels), dim=1)[:, :N].flatten()
            seen = near.nonzero().squeeze(1)
            before = self.carried[seen]
            state = model.carry(layer, before, read(seen), first_rows(seen, N, size))
            self.carried = self.carried.index_copy(0, seen, state)
        passed = torch.zeros_like(alive, dtype=torch.bool)
        score = self.scores[alive]
        if judge and len(alive):
            if self.keeps:
                rows = torch.searchsorted(seen, first)
                score = self._score(layer, state[rows], before[rows], first, seen, state)
            else:
                hidden = read(first)
                score = self._score(layer, hidden, hidden, first, first, hidden)
            if score.isnan().any() and not (last and rule.reads == "state"):
                raise ValueError(
                    f"{rule.name} is NaN at layer {layer}: the weights hold NaN or infinity"
                )
            score = score[torch.searchsorted(first, alive - alive % N % size)]
            passed = policy.passes(layer, score, self.progress[alive])
        gone = torch.ones_like(passed) if last else passed
        tokens = alive[gone]
        self.left = tokens, self.reading.new_zeros(len(tokens), model.d_model)
        if len(tokens):
            self.scores[tokens] = score[gone]
            self.exit_layers[tokens] = torch.where(passed[gone], layer, model.n_layers)
            leaving = self.carried[tokens] if self.keeps else read(tokens)
            self.left = tokens, leaving[:, : model.d_model]
            head = model.blocks[layer].exit_classifier
            self.waiting.append((head, tokens, head.features(leaving)))
            self.alive = self.alive.index_fill(0, tokens, False)
        return self.alive.view(self.shape)

    def _score(self, layer, hidden, before, first, seen, state) -> Tensor:
        """Score of the first tokens ``(F,)``."""
        model, rule = self.model, self.policy.rule
        head = model.blocks[layer].exit_classifier
        if rule.reads == "logits" and rule.streak:
            new = self._judge(head, state)
            same = new == self.reading[seen]
            self.streak[seen] = torch.where(same, self.streak[seen] + 1, 0)
            self.reading[seen] = new
            return torch.where(self.reading[first].isnan(), torch.nan, self.streak[first])
        if rule.reads == "logits":
            return self._judge(head, hidden)
        last = layer == model.n_layers - 1
        normalised = None if last else model.blocks[layer + 1].layer_norm(hidden)
        return rule.score(ExitState(layer, hidden, before, normalised, model.gates))

    def _judge(self, head: ExitHead, hidden: Tensor) -> Tensor:
        """What a criterion that reads logits says of hidden states ``(T, D)``: ``(T,)``."""
        return self.policy.rule.of_features(head.unembedding, head.features(hidden))

    def finish(self, read: Reader) -> ExitRun:
        """Project the predictions of all tokens, once each."""
        outputs = None
        for head, tokens, features in self.waiting:
            part = read.from_features(head.unembedding, features, tokens)
            if outputs is None:
                outputs = part.new_empty(len(self.exit_layers), *part.shape[1:])
            outputs = outputs.index_copy(0, tokens, part)
        return ExitRun(outputs, self.exit_layers, self.scores)


def _compacted(model: MultiScaleLanguageModel, x: Tensor, exits: _Exits) -> None:
    """Blocks without a token left are not transformed: the recursion reads their potentials only."""
    h, B = model.embed(x), len(x)
    levels, frozen = [h], h.flatten(0, 1)  # frozen: r of tokens at the exit where they left

    def raised(k: int, level: int, rows: Tensor) -> Tensor:
        """Sorted rows of level k, with what the levels from ``level`` down to k + 1 add ``(R, D)``."""
        own = levels[k].flatten(0, 1)[rows]
        if k == level:
            return own
        fine, coarse = levels[k].shape[1], levels[k + 1].shape[1]
        parents = rows // fine * coarse + rows % fine // 2
        unique, where = parents.unique_consecutive(return_inverse=True)
        return own + model.up[k](raised(k + 1, level, unique))[where]

    for layer, block in enumerate(model.blocks):
        k = model.levels[layer]
        rows = any_left(exits.alive.view(x.shape), k).flatten().nonzero().squeeze(1)
        if not len(rows):
            return
        if layer and k == len(levels):
            levels.append(model.pool(k, levels[-1]))
        elif layer:
            base = frozen if k == 0 else levels[k].flatten(0, 1)
            base = base.index_copy(0, rows, raised(k, k + 1, rows))
            levels = [*levels[:k], base.view(B, -1, model.d_model)]
        u = block.layer_norm(levels[k])
        features = block.bk_layer.bk_core(block.bk_layer.potentials(u)).flatten(0, 1)
        flat, u = levels[k].flatten(0, 1), u.flatten(0, 1)
        change = block.bk_layer.transform(u[rows], features[rows])
        levels[k] = flat.index_copy(0, rows, flat[rows] + change).view(B, -1, model.d_model)
        exits.leave(layer, lambda tokens, k=k: raised(0, k, tokens))
        tokens, r = exits.left
        frozen = frozen.index_copy(0, tokens, r)
