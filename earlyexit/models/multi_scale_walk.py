"""How a batch walks through a model of several scales, dense and compacted.

Layers work on blocks of tokens: a block leaves by the score of its first token, and a layer transforms
the blocks in which a token is left. Judging, reading and counting are those of every model.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.exits.protocol import ExitModel, Observation, Walk, exit_state


def any_left(tokens: Tensor, level: int) -> Tensor:
    """Which blocks of a level hold a marked token: ``(B, N)`` → ``(B, ⌈N / 2^level⌉)``."""
    size = 2**level
    padded = F.pad(tokens, (0, -tokens.shape[1] % size))
    return padded.view(len(tokens), -1, size).any(dim=-1)


def first_rows(tokens: Tensor, length: int, size: int) -> Tensor:
    """Row, among sorted flat token ids ``(T,)``, of the first token of each token's block."""
    position = tokens % length
    return torch.searchsorted(tokens, tokens - position % size)


class PyramidWalk(Walk):
    """What both ways of running share: what exits see, and what they carry along.

    Args:
        model: a :class:`earlyexit.models.multi_scale.MultiScaleLanguageModel`.
        history: whether the criterion looks at what earlier exits saw.
    """

    def __init__(self, model: ExitModel, x: Tensor, history: bool):
        self.model, self.shape, self.history = model, x.shape, history
        self.embedded = model.embed(x)
        self.alive = torch.arange(x.numel(), device=x.device)
        self.keeps = model.needs_all or history
        self.carried = model.start(self.embedded).flatten(0, 1) if self.keeps else None

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """What exits read of sorted flat token ids ``(T,)`` after the last layer: ``(T, D)``."""

    def mask(self) -> Tensor:
        """The running tokens ``(B, N)``."""
        marks = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.alive.device)
        return marks.index_fill(0, self.alive, True).view(self.shape)

    def carry(self, layer: int) -> None:
        """Keep what exits carry along of every token that shares a largest block with a running one."""
        if not self.keeps:
            return
        model, N = self.model, self.shape[1]
        top = max(model.levels)
        near = any_left(self.mask(), top).repeat_interleave(2**top, dim=1)[:, :N].flatten()
        self.seen = near.nonzero().squeeze(1)
        self.before = self.carried[self.seen]
        first = first_rows(self.seen, N, model.unit_size(layer))
        self.now = model.carry(layer, self.before, self.read(self.seen), first)
        self.carried = self.carried.index_copy(0, self.seen, self.now)

    def observe(self, layer: int) -> Observation:
        """The first tokens of the running tokens' blocks; with a history, every token near them."""
        alive, N, model = self.alive, self.shape[1], self.model
        first_of = alive - alive % N % model.unit_size(layer)
        if self.history:
            state = exit_state(model, layer, self.now, self.before)
            return Observation(state, self.seen, torch.searchsorted(self.seen, first_of))
        first = first_of.unique_consecutive()
        hidden = self.carried[first] if self.keeps else self.read(first)
        state = exit_state(model, layer, hidden, None)
        return Observation(state, first, torch.searchsorted(first, first_of))

    def states(self, rows: Tensor) -> Tensor:
        tokens = self.alive[rows]
        return self.carried[tokens] if self.keeps else self.read(tokens)

    def leave(self, layer: int, leaving: Tensor, staying: Tensor) -> None:
        self.alive = self.alive[staying]


class DensePyramidWalk(PyramidWalk):
    """Every layer runs on all positions; those without a running token are put back."""

    def __init__(self, model: ExitModel, x: Tensor, history: bool):
        super().__init__(model, x, history)
        self.reads = model.pyramid(x)

    def advance(self, layer: int) -> None:
        self.r = self.reads.send(self.mask() if layer else None).flatten(0, 1)
        self.carry(layer)

    def read(self, tokens: Tensor) -> Tensor:
        return self.r[tokens]


class CompactedPyramidWalk(PyramidWalk):
    """Blocks without a running token are not transformed: the recursion reads their potentials only."""

    def __init__(self, model: ExitModel, x: Tensor, history: bool):
        super().__init__(model, x, history)
        self.levels = [self.embedded]
        self.frozen = self.embedded.flatten(0, 1)  # r of tokens at the exit where they left

    def advance(self, layer: int) -> None:
        model, k = self.model, self.model.levels[layer]
        block, d = model.blocks[layer], model.d_model
        rows = any_left(self.mask(), k).flatten().nonzero().squeeze(1)
        if layer and k == len(self.levels):
            self.levels.append(model.pool(k, self.levels[-1]))
        elif layer:
            base = self.frozen if k == 0 else self.levels[k].flatten(0, 1)
            base = base.index_copy(0, rows, self._raised(k, k + 1, rows))
            self.levels = [*self.levels[:k], base.view(len(self.embedded), -1, d)]
        u = block.layer_norm(self.levels[k])
        features = block.bk_layer.bk_core(block.bk_layer.potentials(u)).flatten(0, 1)
        flat, u = self.levels[k].flatten(0, 1), u.flatten(0, 1)
        change = block.bk_layer.transform(u[rows], features[rows])
        self.levels[k] = flat.index_copy(0, rows, flat[rows] + change).view_as(self.levels[k])
        self.carry(layer)

    def read(self, tokens: Tensor) -> Tensor:
        return self._raised(0, len(self.levels) - 1, tokens)

    def _raised(self, k: int, level: int, rows: Tensor) -> Tensor:
        """Sorted rows of level k, with what the levels from ``level`` down to k + 1 add ``(R, D)``."""
        states = self.levels[k].flatten(0, 1)[rows]
        if k == level:
            return states
        fine, coarse = self.levels[k].shape[1], self.levels[k + 1].shape[1]
        parents = rows // fine * coarse + rows % fine // 2
        unique, where = parents.unique_consecutive(return_inverse=True)
        return states + self.model.up[k](self._raised(k + 1, level, unique))[where]

    def leave(self, layer: int, leaving: Tensor, staying: Tensor) -> None:
        tokens, r = self.alive[leaving], self.states(leaving)[:, : self.model.d_model]
        self.frozen = self.frozen.index_copy(0, tokens, r)
        super().leave(layer, leaving, staying)
