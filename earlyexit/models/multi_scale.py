"""A model of several scales goes N → N/2 → N/4 → N/2 → N positions, with an exit after every scale.

Layer l of L = 2m + 1 works at level k = min(l, L − 1 − l), on ⌈N / 2^k⌉ positions, as a U-Net does
(Ronneberger et al. 2015; for language, Nawrot et al. 2022, Hourglass). Position j of level k serves
the block of tokens j·2^k … (j + 1)·2^k − 1 and knows tokens up to the block's first one:

    down   c_j = W [a_{2j−1}; a_{2j}]        the window of two that *ends* where the block begins,
    up     a_i ← a_i + U c_{⌊i/2⌋}           a skip connection, so that positions of a block differ.

So a pooled state reaches no position before its last token: the model is causal. Whether a block leaves
is decided from what is known at its first token: the exit after level k scores that token, and all
running tokens of the block follow. What an exit reads of token i is the same sum, carried up to full
resolution: r_i = h_i + U_1 (c¹ + U_2 c² …).

A block without a running token leaves the computation: its position keeps its state, and hands on
potentials and values that are made of it. Costs count positions: 1 + ½ + ¼ + ½ + 1 = 3.25 layers of N
positions for five.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.checked import refused
from earlyexit.exits.operations import Operations
from earlyexit.exits.protocol import Execution
from earlyexit.models.multi_scale_walk import (
    CompactedPyramidWalk,
    DensePyramidWalk,
    PyramidWalk,
    any_left,
    first_rows,
)
from earlyexit.models.sparse_bk import SparseBKLanguageModel, SparseConfig


@dataclass(frozen=True)
class MultiScaleConfig(SparseConfig):
    """Its fields are the arguments of :class:`MultiScaleLanguageModel`; keep < 1 makes layers sparse.

    Raises:
        ValueError: the number of layers is even or below three, the core is two-sided,
            exited tokens hand on anything but what is recomputed, or the base class refuses a value.
    """

    n_layers: int = 5
    _: KW_ONLY
    keep: float = 1.0

    @refused(TypeError, "n_layers={self.n_layers!r}: must be a whole number")
    def __post_init__(self):
        if self.n_layers < 3 or self.n_layers % 2 == 0:
            raise ValueError(
                f"n_layers={self.n_layers} must be odd and at least 3: down, and up again"
            )
        super().__post_init__()
        if not self.causal:
            raise ValueError("several scales need a causal BK-Core")
        if self.left_behind != "recomputed":
            raise ValueError(f"left_behind={self.left_behind!r}: several scales need 'recomputed'")


class MultiScaleLanguageModel(SparseBKLanguageModel):
    """This language model has layers that work at several scales; five layers go down to N/4.

    Its arguments are the fields of :class:`MultiScaleConfig`.
    """

    config_type = MultiScaleConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        d, layers = self.d_model, self.n_layers
        self.can_step = False
        self.levels = [min(layer, layers - 1 - layer) for layer in range(layers)]
        pairs = range(max(self.levels))
        self.down = nn.ModuleList(nn.Linear(2 * d, d, bias=False) for _ in pairs)
        self.up = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in pairs)
        with torch.no_grad():
            for pool in self.down:  # starts as the mean of the two
                pool.weight.copy_(torch.eye(d).repeat(1, 2) / 2)

    # ------------------------------------------------------------------ what exits decide and read

    def unit_size(self, layer: int) -> int:
        return 2 ** self.levels[layer]

    def operations(self, **changes) -> Operations:
        return super().operations(levels=self.levels, **changes)

    def walk(self, x: Tensor, execution: Execution, history: bool) -> PyramidWalk:
        kind = CompactedPyramidWalk if execution == "compacted" else DensePyramidWalk
        return kind(self, x, history)

    def start(self, h: Tensor) -> Tensor:
        """Return what exits carry along before the first layer ``(…, D)``, given its states."""
        return h

    def carry(self, layer: int, before: Tensor, read: Tensor, first: Tensor | None) -> Tensor:
        """Return what exits carry along after ``layer`` ``(T, ·)``.

        Args:
            before: what they carried at the exit before, for the same tokens ``(T, ·)``.
            read: r of the tokens ``(T, D)``.
            first: row of the first token of each token's block ``(T,)``.
        """
        return read

    needs_all = False  # whether :meth:`carry` must see every token at every exit

    def check_training(self, exit_sampling: str, layer_dropout: float) -> None:
        """Raise ValueError if layers are dropped or single tokens leave: the next scale differs."""
        super().check_training(exit_sampling, layer_dropout)
        if layer_dropout or exit_sampling == "tokens":
            raise ValueError(
                "layer_dropout and exit_sampling='tokens' do not fit a model of several scales:"
                " take exit_sampling='one'"
            )

    # ------------------------------------------------------------------ running

    def pool(self, level: int, fine: Tensor) -> Tensor:
        """Make the states of a level ``(B, ⌈N/2⌉, D)`` from those of the finer one ``(B, N, D)``."""
        B, N, D = fine.shape
        padded = F.pad(fine, (0, 0, 1, N % 2 - 1))  # windows (2j − 1, 2j), zero before 0
        return self.down[level - 1](padded.reshape(B, -1, 2 * D))

    def _raise(self, level: int, coarse: Tensor, length: int) -> Tensor:
        """Return what a level adds to the positions of the finer one ``(B, length, D)``."""
        return self.up[level - 1](coarse).repeat_interleave(2, dim=1)[:, :length]

    def pyramid(self, x: Tensor, read: bool = True) -> Generator[Tensor, Tensor | None, None]:
        """Run all layers on all positions, and yield r ``(B, N, D)`` after each.

        ``send`` takes the running tokens ``(B, N)``: positions without one keep their state.

        Args:
            read: if False, what is yielded before the last layer is what the layer computed, not r.
        """
        h = self.embed(x)
        levels, frozen, alive = [h], h, None
        for layer, block in enumerate(self.blocks):
            k = self.levels[layer]
            if layer and k == len(levels):
                levels.append(self.pool(k, levels[-1]))
            elif layer:
                raised = levels[k] + self._raise(k + 1, levels.pop(), levels[k].shape[1])
                levels[k] = _choose(alive, k, raised, frozen if k == 0 else levels[k])
            levels[k] = _choose(alive, k, block.hidden(levels[k]), levels[k])
            r = levels[k]
            for level in range(k, 0, -1) if read else ():
                r = levels[level - 1] + self._raise(level, r, levels[level - 1].shape[1])
            still_alive = yield r
            if still_alive is not None:
                frozen = r if alive is None else torch.where(alive[..., None], r, frozen)
                alive = still_alive

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Return what exits carry before the first and after every layer, L + 1 times ``(B, N, ·)``."""
        states = [self.start(self.embed(x))]
        B, N = x.shape
        for layer, r in enumerate(self.pyramid(x)):
            first = first_rows(torch.arange(B * N, device=x.device), N, self.unit_size(layer))
            before = states[-1].flatten(0, 1)
            states.append(self.carry(layer, before, r.flatten(0, 1), first).view(B, N, -1))
        return states

    def final_state(self, x: Tensor) -> Tensor:
        if self.needs_all:
            return self.hidden_states(x)[-1]
        *_, r = self.pyramid(x, read=False)
        return r


def _choose(alive: Tensor | None, level: int, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` where a block of the level ``(B, N′, D)`` has a running token, else ``old``."""
    return new if alive is None else torch.where(any_left(alive, level)[..., None], new, old)
