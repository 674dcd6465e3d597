"""A batch walks through a model of several scales in blocks of tokens, dense or compacted.

A block leaves by the score of its first token, and a layer transforms the blocks in which a token is
running. Judging, reading and counting are those of every model.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.exits.protocol import ExitModel, Observation, Walk, exit_state


def any_left(tokens: Tensor, level: int) -> Tensor:
    """Tell which blocks of a level hold a marked token: ``(B, N)`` → ``(B, ⌈N / 2^level⌉)``."""
    size = 2**level
    padded = F.pad(tokens, (0, -tokens.shape[1] % size))
    return padded.view(len(tokens), -1, size).any(dim=-1)


def first_rows(tokens: Tensor, length: int, size: int) -> Tensor:
    """Find the row, among sorted flat token indices ``(T,)``, of each token's block's first token."""
    position = tokens % length
    return torch.searchsorted(tokens, tokens - position % size)


class PyramidWalk(Walk):
    """Both ways of running share what exits see and what they carry along.

    Args:
        model: a :class:`earlyexit.models.multi_scale.MultiScaleLanguageModel`.
        history: whether the criterion looks at states of earlier exits.
    """

    def __init__(self, model: ExitModel, x: Tensor, history: bool):
        self.model, self.shape, self.history = model, x.shape, history
        self.embedded = model.embed(x)
        self.alive = torch.arange(x.numel(), device=x.device)
        self.keeps = model.needs_all or history
        self.carried = model.start(self.embedded).flatten(0, 1) if self.keeps else None

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """Return what exits read ``(T, D)`` of sorted flat token indices ``(T,)``."""

    def mask(self) -> Tensor:
        """Mark the running tokens ``(B, N)``."""
        marks = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.alive.device)
        return marks.index_fill(0, self.alive, True).view(self.shape)

    def carry(self, layer: int) -> None:
        """Keep what exits carry along of every token that shares a largest block with a running one."""
        if not self.keeps:
            return
        model, N = self.model, self.shape[1]
        top = max(model.levels)
        near = any_left(self.mask(), top).repeat_interleave(2**top, dim=1)[:, :N].flatten()
        self.near = near.nonzero().squeeze(1)
        self.before = self.carried[self.near]
        first = first_rows(self.near, N, model.unit_size(layer))
        self.after = model.carry(layer, self.before, self.read(self.near), first)
        self.carried = self.carried.index_copy(0, self.near, self.after)

    def observe(self, layer: int) -> Observation:
        """Return the first tokens of the running tokens' blocks; with a history all tokens near."""
        alive, N, model = self.alive, self.shape[1], self.model
        first_of = alive - alive % N % model.unit_size(layer)
        if self.history:
            state = exit_state(model, layer, self.after, self.before)
            return Observation(state, self.near, torch.searchsorted(self.near, first_of))
        first = first_of.unique_consecutive()
        hidden = self.carried[first] if self.keeps else self.read(first)
        state = exit_state(model, layer, hidden, None)
        return Observation(state, first, torch.searchsorted(first, first_of))

    def states(self, rows: Tensor) -> Tensor:
        tokens = self.alive[rows]
        return self.carried[tokens] if self.keeps else self.read(tokens)

    def leave(self, layer: int, leaving: Tensor, staying: Tensor, hidden: Tensor) -> None:
        self.alive = self.alive[staying]


class DensePyramidWalk(PyramidWalk):
    """Every layer runs on all positions, and those without a running token are put back."""

    def __init__(self, model: ExitModel, x: Tensor, history: bool):
        super().__init__(model, x, history)
        self.reads = model.pyramid(x)

    def advance(self, layer: int) -> None:
        self.r = self.reads.send(self.mask() if layer else None).flatten(0, 1)
        self.carry(layer)

    def read(self, tokens: Tensor) -> Tensor:
        return self.r[tokens]


class CompactedPyramidWalk(PyramidWalk):
    """Blocks without a running token are not transformed; the recursion reads what they hand on."""

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
        given, u = block.bk_layer.contribution(u), u.flatten(0, 1)[rows]
        flat = self.levels[k].flatten(0, 1)
        change = block.bk_layer.transform(u, block.bk_layer.mix(u, given, rows))
        self.levels[k] = flat.index_copy(0, rows, flat[rows] + change).view_as(self.levels[k])
        self.carry(layer)

    def read(self, tokens: Tensor) -> Tensor:
        return self._raised(0, len(self.levels) - 1, tokens)

    def _raised(self, k: int, level: int, rows: Tensor) -> Tensor:
        """Return sorted rows of level k, with what levels k + 1 to ``level`` add ``(R, D)``."""
        states = self.levels[k].flatten(0, 1)[rows]
        if k == level:
            return states
        fine, coarse = self.levels[k].shape[1], self.levels[k + 1].shape[1]
        parents = rows // fine * coarse + rows % fine // 2
        unique, inverse = parents.unique_consecutive(return_inverse=True)
        return states + self.model.up[k](self._raised(k + 1, level, unique))[inverse]

    def leave(self, layer: int, leaving: Tensor, staying: Tensor, hidden: Tensor) -> None:
        tokens, r = self.alive[leaving], hidden[:, : self.model.d_model]
        self.frozen = self.frozen.index_copy(0, tokens, r)
        super().leave(layer, leaving, staying, hidden)
